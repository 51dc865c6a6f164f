"""The teacher's final hidden states on disk: built once, verified, read through memory maps."""
