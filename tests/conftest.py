"""The environment of the whole suite, set before any test module is imported."""

import os

# Triton's interpreter runs its kernels on a CPU; Triton reads this once, when it is first imported
os.environ.setdefault("TRITON_INTERPRET", "1")
