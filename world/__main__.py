"""python -m world write --out DIR --n N --seed S: the embedded world as a data set, see shapes.py."""

from world.shapes import main

main()
