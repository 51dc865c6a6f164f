"""Measure time and memory of dwakd and its peers; see `python -m benchmarks.step --help` and `docs/performance.md`."""
