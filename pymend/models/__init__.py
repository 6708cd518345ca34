"""What can be edited in a model, found by structure; the lists of the paper."""
