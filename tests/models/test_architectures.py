"""Test every causal class of transformers: a slow test that runs with `make test-slow` only."""

import pytest
import torch

from dwakd import DistillConfig, DistillTrainer, load_causal_lm
from dwakd.errors import UserError
from tests.builders import byte_bpe
from tests.models.architectures import MODEL_TYPES, small_model

IDS = torch.randint(2, 380, (2, 12), generator=torch.Generator().manual_seed(5))
ROWS = [{"prompt": f"Which colour has the {name}?", "response": f"It is {name}."} for name in ("door", "cat", "sea")]
ALTERED_ON_LOADING = {"youtu": "transformers sets the embedding of its padding token to zero"}


@pytest.mark.slow
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_causal_class_trains_and_can_be_read_back_or_is_refused(model_type, gradient_checkpointing, tmp_path):
    """An unsupported architecture is refused before the first step; all others can be trained, saved and loaded."""
    try:
        model = small_model(model_type)
    except Exception as error:
        pytest.skip(f"cannot be built small: {error}")
    refusal = None
    try:
        trainer = DistillTrainer(
            model=model,
            args=DistillConfig(
                output_dir=str(tmp_path),
                method="sft",
                max_steps=1,
                max_length=256,
                max_prompt_length=128,
                gradient_checkpointing=gradient_checkpointing,
                template="plain",
                use_cpu=True,
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=ROWS,
            processing_class=byte_bpe(),
        )
    except UserError as error:
        refusal = str(error)
    if refusal is not None:
        assert type(model).__name__ in refusal
        pytest.skip(f"refused: {refusal}")
    trainer.train()
    trainer.save_model(str(tmp_path))
    if model_type in ALTERED_ON_LOADING:
        pytest.xfail(ALTERED_ON_LOADING[model_type])
    with torch.no_grad():
        expected = trainer.student.eval()(input_ids=IDS, use_cache=False).logits
        found = load_causal_lm(str(tmp_path))(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected)
