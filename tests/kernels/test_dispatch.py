"""Test the choice of a kernel implementation."""

import logging

import pytest

from dwakd.kernels.dispatch import is_usable, resolve


def test_auto_takes_the_first_preferred_one_that_supports_the_input():
    """With "auto", the first preferred implementation that supports the input is selected, else the naive one."""
    both = ("cpu", "triton")
    assert resolve("soft_dtw", "auto", {"cpu": None, "triton": "a GPU"}, both) == "cpu"
    assert resolve("sinkhorn", "auto", {"slow": None, "batched": None}, ["batched"]) == "batched"
    assert resolve("soft_dtw", "auto", {"cpu": "a CPU", "triton": "a GPU"}, both) == "naive"
    assert resolve("soft_dtw", "auto", {"cpu": "a CPU", "slow": None}, ["cpu"]) == "naive"
    assert resolve("soft_dtw", "naive", {"cpu": None}, ["cpu"]) == "naive"


def test_what_is_not_supported_is_named():
    """An implementation that is unknown or does not support the input raises a ValueError instead of running another one."""
    with pytest.raises(ValueError, match="warp: unknown impl 'gpu'; valid are 'auto', 'naive', 'cpu'"):
        resolve("warp", "gpu", {"cpu": None}, ["cpu"])
    with pytest.raises(ValueError, match="warp: impl 'cpu' requires float32"):
        resolve("warp", "cpu", {"cpu": "float32, got float64"}, ["cpu"])


def test_a_missing_kernel_is_logged_once(caplog):
    """If a compiled kernel cannot be imported, the reason is logged once."""
    with caplog.at_level(logging.WARNING):
        assert [resolve("warp", "auto", {"cpu": None}, ["cpu"]) for _ in range(2)] == ["naive", "naive"]
    is_usable.cache_clear()
    (record,) = caplog.records
    assert all(part in record.message for part in ("warp runs in plain torch", "numba", "dwakd.kernels.warp"))
