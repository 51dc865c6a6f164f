"""The choice of an implementation."""

import logging

import pytest

from dwakd.kernels.dispatch import is_usable, resolve


def test_auto_takes_the_first_that_supports_the_input():
    """A slow implementation that is chosen without a word costs hours; an unsupported one fails in training."""
    assert resolve("soft_dtw", "auto", {"cpu": None, "triton": "a GPU"}) == "cpu"
    assert resolve("sinkhorn", "auto", {"batched": None}) == "batched"
    assert resolve("soft_dtw", "auto", {"cpu": "a CPU", "triton": "a GPU"}) == "naive"
    assert resolve("soft_dtw", "naive", {"cpu": None}) == "naive"


def test_what_is_not_supported_is_named():
    """A kernel that quietly runs another implementation hides that it is slow."""
    with pytest.raises(ValueError, match="warp: unknown impl 'gpu'; valid are 'auto', 'naive', 'cpu'"):
        resolve("warp", "gpu", {"cpu": None})
    with pytest.raises(ValueError, match="warp: impl 'cpu' requires float32"):
        resolve("warp", "cpu", {"cpu": "float32, got float64"})


def test_a_missing_kernel_is_logged_once(caplog):
    """The user reads why training is slow, once and not in every step."""
    with caplog.at_level(logging.WARNING):
        assert [resolve("warp", "auto", {"cpu": None}) for _ in range(2)] == ["naive", "naive"]
    is_usable.cache_clear()
    (record,) = caplog.records
    assert all(part in record.message for part in ("warp runs in plain torch", "numba", "dwakd.kernels.warp"))
