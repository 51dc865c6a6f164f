"""A language model compares the answers of two runs, pair by pair: the work of `dwakd judge`."""
