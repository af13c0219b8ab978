"""Benchmarks: their files, how a question is asked, how an answer is scored; eval.py and world/ call it."""
