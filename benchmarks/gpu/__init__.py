"""Everything about one GPU in one command: ``make gpu OUT=folder``."""
