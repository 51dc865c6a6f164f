"""What dwakd costs, beside its peers: `python -m benchmarks.step --help`, and likewise `memory`."""
