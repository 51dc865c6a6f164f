"""Numerical kernels. Each has a version in plain torch: its specification, its fallback and its reference in tests."""

from dwakd.kernels.head_loss import head_loss
from dwakd.kernels.sinkhorn import sinkhorn
from dwakd.kernels.soft_dtw import soft_dtw
from dwakd.kernels.sorted_distance import sorted_distance

__all__ = ["head_loss", "sinkhorn", "soft_dtw", "sorted_distance"]
