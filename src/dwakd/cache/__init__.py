"""The teacher's final hidden states on disk: built once, verified, and read through memory maps."""
