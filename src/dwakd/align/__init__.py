"""Pure functions that pair the tokens of two tokenizers by byte offsets, by spelling or by vocabulary."""
