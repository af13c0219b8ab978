"""python -m bench: the table of table.py."""

from bench.table import main

main()
