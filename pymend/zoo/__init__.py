"""Models without a hub: SmolLM2 from a package, small ones trained on the built-in facts."""
