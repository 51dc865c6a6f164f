"""Soft-DTW of a ragged batch. Each kernel is a module of this package with a function `solve`, as in `naive.py`."""

from dwakd.kernels.soft_dtw.function import Impl, expected_alignment, soft_dtw

__all__ = ["Impl", "expected_alignment", "soft_dtw"]
