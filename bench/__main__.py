"""Runs `python -m bench`, see table.py."""

from bench.table import main

if __name__ == "__main__":  # the processes of worker.py import this file, too
    main()
