"""Numbers of the training arguments are checked when they are given."""

import pytest

from dwakd import DistillConfig, UserError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("warmup_steps", float("inf")),
        ("per_device_train_batch_size", 2.5),
        ("gradient_accumulation_steps", float("inf")),
        ("max_steps", 1.5),
        ("seed", 2**70),
        ("eval_max_new_tokens", 4.5),
        ("neftune_noise_alpha", float("inf")),
        ("lr_scheduler_kwargs", {"num_cycles": float("inf")}),
        ("adam_epsilon", float("inf")),
        ("weight_decay", float("inf")),
        ("eval_delay", float("nan")),
        ("teacher_weights", ["a", 1]),
        ("teacher_weights", 3),
        ("teacher_weights", [1e40, 1.0]),
    ],
)
def test_numbers_that_no_run_can_use_are_refused_by_name(tmp_path, name, value):
    """They would end in an error of Python after the models are loaded, or train nothing."""
    config = DistillConfig(output_dir=str(tmp_path), use_cpu=True)
    setattr(config, name, value)  # the types that the tests check would refuse some in the constructor
    with pytest.raises(UserError, match=name):
        config.__post_init__()
