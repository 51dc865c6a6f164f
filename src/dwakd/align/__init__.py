"""Pure functions that pair tokens of two tokenizers: by bytes covered, by spelling, by vocabulary."""
