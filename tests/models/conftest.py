"""Fixtures of the tests of models."""

import pytest
from huggingface_hub import HfApi

from dwakd.models import specs


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no network in the tests")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    specs.only_cached.cache_clear()
