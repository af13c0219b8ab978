"""Checkpoints and adapters in every published layout, in and out; data.py, the scripts and the rooms above may
call it."""
