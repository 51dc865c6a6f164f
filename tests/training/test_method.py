"""Methods that compare one vocabulary, built from real tokenizers."""

import pytest

from dwakd import DistillConfig, DistillTrainer
from dwakd.errors import UserError
from tests.builders import tiny_model
from tests.training.builders import ROWS, TOKENIZERS, trainer

ONE_TOKENIZER = [("kd", {}), ("dskd", {"attention": False})]


@pytest.mark.parametrize(("method", "options"), ONE_TOKENIZER)
def test_two_tokenizers_are_refused(tmp_path, method, options):
    """Rows of two tokenizers have nothing to do with each other; nor have their vocabularies."""
    with pytest.raises(UserError, match=f"method {method} requires a teacher with the student's tokenizer"):
        trainer(tmp_path, method=method, loss_options=options, two_tokenizers=True)


@pytest.mark.parametrize(("method", "options"), ONE_TOKENIZER)
def test_one_tokenizer_and_heads_of_two_widths_train(tmp_path, method, options):
    """Models of one family pad their heads differently: that is no other tokenizer."""
    tokenizer = TOKENIZERS[0]
    run = DistillTrainer(
        model=tiny_model("llama", len(tokenizer), seed=1),
        teacher_model=tiny_model("gemma2", len(tokenizer) + 3, seed=2),
        args=DistillConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            template="plain",
            use_cpu=True,
            method=method,
            loss_options=options,
        ),
        train_dataset=ROWS,
        processing_class=tokenizer,
        teacher_processing_class=tokenizer,
    )
    assert run.train().training_loss > 0
