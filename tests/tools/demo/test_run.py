"""Test the demo from the corpus to the table."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwakd.errors import UserError
from dwakd.tools.demo.run import METHODS, QUICK, run_demo


def test_every_model_is_trained_evaluated_and_saved(tmp_path):
    """The demo trains, evaluates and saves every model."""
    folder = tmp_path / "demo"
    run_demo(folder, seed=1, quick=True)
    content = json.loads((folder / "demo.json").read_text())
    for name in ("teacher", *METHODS):
        assert content[name]["num_examples"] == QUICK.num_test
        assert content[name]["bits_per_byte"]["value"] > 0
        model, tokenizer = (kind.from_pretrained(folder / name) for kind in (AutoModelForCausalLM, AutoTokenizer))
        assert model.config.vocab_size == len(tokenizer)
    with pytest.raises(UserError, match="is not empty"):
        run_demo(folder, seed=1, quick=True)


@pytest.mark.parametrize("seed", [-1, 2**32 - 1])
def test_seeds_out_of_range(tmp_path, seed):
    """A seed out of range is refused before anything is trained."""
    with pytest.raises(UserError, match="--seed"):
        run_demo(tmp_path / "demo", seed=seed, quick=True)
