"""Applications built from the package: shrink, similarity and the demo. Only the command line imports them."""
