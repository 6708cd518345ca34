"""How a model is run: tokens, hooks, the frozen prefix, captured factors, losses, answers."""
