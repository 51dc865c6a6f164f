"""Checkpoints and the plain folder of a student, on one process or sharded by FSDP2 or DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dwakd.errors import UserError
from dwakd.models.head import gathered
from dwakd.models.saving import save_causal_lm
from dwakd.training.callbacks import FiniteCheck
from dwakd.training.card import write_card
from dwakd.training.distiller import LOSS_STATE
from dwakd.training.hub import HubTrainer


def check_plugin(plugin: Any) -> None:
    """Refuse options of accelerate's FSDP plugin with which a student cannot be distilled."""
    if plugin.fsdp_version != 2:
        raise UserError("FSDP1 is not supported: set fsdp_version: 2 in the accelerate config")
    if plugin.cpu_ram_efficient_loading:
        fix = "set fsdp_cpu_ram_efficient_loading: false in the accelerate config"
        raise UserError(f"the student is checked before training, which needs its weights on every process: {fix}")


class ShardedTrainer(HubTrainer):
    """A Trainer that saves and loads its student in the same way, whether or not parameters are sharded.

    Every checkpoint contains the gathered student. With FSDP, it also contains shards, which any number of processes loads.
    """

    finite: FiniteCheck
    student: Any
    _distiller: Any

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed may shard the student."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def create_accelerator_and_postprocess(self) -> None:
        """Check the options of FSDP. With mixed precision, reduce gradients in float32 and cast no inputs or losses."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            check_plugin(plugin)
            policy = plugin.mixed_precision_policy
            if policy is not None:
                plugin.mixed_precision_policy = type(policy)(
                    policy.param_dtype, torch.float32, cast_forward_inputs=False
                )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student and its card, and the trained maps of the loss in a subfolder, which readers of models ignore."""
        self.finite.finish()
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            # transformers would save the shards only
            self._save(output_dir, self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)
        loss = self._distiller.loss
        maps = {name: gathered(tensor).detach() for name, tensor in loss.state_dict(keep_vars=True).items()}
        if self.is_world_process_zero() and not _internal_call:
            write_card(self.recipe, Path(output_dir or self.args.output_dir))
        if self.args.should_save and (_internal_call or any(True for _ in loss.parameters())):
            options = json.dumps({"method": self.args.method, **self.args.loss_options})
            path = Path(output_dir or self.args.output_dir) / LOSS_STATE
            path.parent.mkdir(exist_ok=True)
            save_file(maps, path, {"loss": options})

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        if state_dict is not None:  # of the Distiller, with tied parameters under each of their names
            names = [name for name, _ in self._distiller.named_parameters(remove_duplicate=False)]
            others = set(names).difference(name for name, _ in self._distiller.named_parameters())
            state_dict = {
                name.removeprefix("student."): tensor
                for name, tensor in state_dict.items()
                if name.startswith("student.") and name not in others
            }
        try:
            save_causal_lm(self.student, folder, state_dict)
        finally:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        has_shards = _has_fsdp_state(resume_from_checkpoint)
        if has_shards != self.is_fsdp_enabled:
            saved, fix = ("with", "with FSDP; one process is enough") if has_shards else ("without", "without FSDP")
            raise UserError(f"{resume_from_checkpoint} was saved {saved} FSDP: resume the run {fix}")
        if self.is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._distiller.load_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.check_checkpoint(self.state.best_model_checkpoint)
        if self.is_sharded:
            super()._load_best_model()
        else:
            self._distiller.load_checkpoint(self.state.best_model_checkpoint)


def _has_fsdp_state(checkpoint: str) -> bool:
    return any((Path(checkpoint) / name).exists() for name in ("pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"))
