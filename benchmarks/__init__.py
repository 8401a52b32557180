"""Benchmarks: verify first, then time. Start with `python benchmarks/run.py --help`."""
