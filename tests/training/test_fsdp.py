"""Test training that is sharded by FSDP2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from dwakd.errors import UserError
from dwakd.models.loading import load_causal_lm
from dwakd.training.sharding import check_plugin
from tests.training.builders import assert_same

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"


@pytest.mark.slow
def test_sharded_ranks_equal_one_process(tmp_path):
    """2 and 4 ranks with DTensors give losses and weights of one process; a step gathers the head only once.

    If the gradient of a gathered head were not averaged over the ranks, or were that of one rank only, the weights would
    differ after the first step.
    """
    run_module("tests.training.fsdp_rank", tmp_path)


@pytest.mark.slow
def test_checkpoints_of_four_ranks_resume_on_two_and_on_one(tmp_path):
    """Every run ends with the same plain folder and the same logged values as a run that was never sharded or stopped."""
    run_module("tests.training.fsdp_trainer_rank", tmp_path)
    names = "model.safetensors", "distillation/maps.safetensors"
    expected = [load_file(tmp_path / "alone" / name) for name in names]
    start = load_file(tmp_path / "alone" / "checkpoint-2" / names[0])
    assert max(float((start[name] - tensor).abs().max()) for name, tensor in expected[0].items()) > 1e-3
    history = json.loads((tmp_path / "alone" / "trainer_state.json").read_text())["log_history"]
    for run in ("four", "resumed_on_two", "resumed_on_one"):
        for name, tensors in zip(names, expected, strict=True):
            assert_same(load_file(tmp_path / run / name), tensors, atol=2e-5)
        logged = json.loads((tmp_path / run / "trainer_state.json").read_text())["log_history"]
        for got, wanted in zip(logged, history, strict=True):
            for term in {"loss", "grad_norm", "dtw_hidden", "eval_loss", "eval_ce"} & wanted.keys():
                assert got[term] == pytest.approx(wanted[term], rel=1e-4), (run, term)
        assert load_causal_lm(str(tmp_path / run)).config.tie_word_embeddings
    # an adapter, trained with parameters in bfloat16: the loss and the saved weights are float32
    adapters = [load_file(tmp_path / run / "adapter_model.safetensors") for run in ("adapter", "adapter_alone")]
    assert {name: (t.shape, t.dtype) for name, t in adapters[0].items()} == {
        name: (t.shape, t.dtype) for name, t in adapters[1].items()
    }
    assert any(bool(tensor.any()) for name, tensor in adapters[0].items() if "lora_B" in name)
    losses = [
        json.loads((tmp_path / run / "trainer_state.json").read_text())["log_history"][0]["loss"]
        for run in ("adapter", "adapter_alone")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0] != float(torch.tensor(losses[0]).bfloat16())


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_accelerate_reads_the_configs(name, monkeypatch):
    """`accelerate launch` accepts each config, and the FSDP plugin that it sets up passes dwakd's check."""
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[name]
    args = launch_command_parser().parse_args(["--config_file", str(path), "-m", "dwakd", "train", "recipe.yaml"])
    args, _, _ = _validate_launch_command(args)
    assert args.num_processes == 8
    if name == "fsdp2":
        for key, value in prepare_multi_gpu_env(args).items():
            if key.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
                monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        check_plugin(plugin)
        assert plugin.fsdp_version == 2
        assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
        assert str(plugin.state_dict_type).endswith("SHARDED_STATE_DICT")
    if name == "zero3":
        assert (args.zero_stage, str(args.zero3_init_flag).lower()) == (3, "false")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"fsdp_version": 1}, "fsdp_version: 2"), ({"cpu_ram_efficient_loading": True}, "efficient_loading: false")],
)
def test_options_of_fsdp_that_cannot_work_are_refused(options, message, monkeypatch):
    """FSDP1 gives views of flat parameters; with efficient loading, all ranks but the first have no weights to check."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    with pytest.raises(UserError, match=message):
        check_plugin(FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **options}))


def run_module(module: str, folder: Path) -> None:
    """Run a module, which forks its ranks, in a new process."""
    result = subprocess.run(
        [sys.executable, "-m", module, str(folder)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
