"""Instruction data from captions and boxes: `python -m datagen`. Nothing imports this room."""
