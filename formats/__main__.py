"""python -m formats inspect|convert, see weights.py."""

from formats.weights import main

main()
