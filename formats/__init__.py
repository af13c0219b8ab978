"""Reads and writes checkpoints and adapters in every published layout. data.py, the scripts, training/, evaluation/ and
world/ may import it."""
