"""The ops: one module each, with ``eager()`` (the same mathematics in torch) beside the wrapper."""
