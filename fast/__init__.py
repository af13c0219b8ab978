"""Faster layers for a built model: subclasses with the same parameters, state dict and numbers as the plain ones. Only
the scripts and the tools switch them on, by accelerate(model); the book never imports this room."""
