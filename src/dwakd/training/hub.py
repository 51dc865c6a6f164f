"""Write the model card of a student and upload it to the Hugging Face Hub, without other files of the run."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from dwakd.errors import UserError, reason_of
from dwakd.evaluation.card import CARD
from dwakd.folders import without_paths
from dwakd.training.card import write_card
from dwakd.training.checkpoints import CheckpointTrainer

_FILES = re.compile(
    r".*\.(safetensors|jinja|model|py)|(.*config|.*\.index|tokenizer|vocab|chat_template|\w+_tokens(_map)?)\.json|"
    r"(vocab|merges)\.txt|README\.md"
)
"""Names of the files of a student. Others, such as results of other commands, can contain paths."""
_METADATA = {"tasks": "pipeline_tag", "finetuned_from": "base_model", "dataset": "datasets"}


class UploadError(UserError):
    """The student is saved, but could not be uploaded."""


class HubTrainer(CheckpointTrainer):
    """A Trainer that uploads weights, config, tokenizer, card and the trained maps of the loss, and nothing else.

    The recipe is part of the card. Absolute paths in it and in configs are replaced by their last part.
    """

    recipe: dict[str, Any]
    """The sections of the recipe for the card."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        try:
            super().init_hf_repo(token, private)
        except Exception as error:  # the hub and the network raise many unrelated types
            raise UserError(f"push_to_hub: {' '.join(str(error).split())}") from error

    def create_model_card(self, language: str | None = None, license: str | None = None, **given: Any) -> None:
        """Write README.md, or update the parts of it that dwakd has written; the options are those of transformers."""
        if self.is_world_process_zero():
            name, tags = given.pop("model_name", None), given.pop("tags", None)
            given = {_METADATA[key]: value for key, value in given.items() if key in _METADATA}
            given |= {"language": language, "license": license, "tags": [tags] if isinstance(tags, str) else tags}
            write_card(self.recipe, Path(self.args.output_dir), name, **given)

    def push_to_hub(self, commit_message: str | None = "End of training", blocking: bool = True, **options: Any) -> Any:
        """Save the student and its card, and upload them; `options` are those of transformers."""
        token, revision, private = (options.pop(name, None) for name in ("token", "revision", "private"))
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**options)
        self._finish_current_push()
        return self.upload(Path(self.args.output_dir), commit_message, blocking, token=token, revision=revision)

    def upload(self, folder: Path, message: str | None, blocking: bool = True, only: str = "", **options: Any) -> Any:
        """Commit the files of a student, or `only` one of them, to the repository."""
        files = [path for path in sorted(folder.iterdir()) if _FILES.fullmatch(path.name)]
        nested = [path for name in ("distillation", "additional_chat_templates") for path in (folder / name).rglob("*")]
        operations = [
            CommitOperationAdd(path.relative_to(folder).as_posix(), _content(path))
            for path in (*files, *nested)
            if path.is_file() and not path.name.startswith((".", "_")) and only in ("", path.name)
        ]
        options["token"] = options.get("token") or self.args.hub_token
        options["revision"] = options.get("revision") or self.args.hub_revision
        options |= {"commit_message": message or "Upload a student", "run_as_future": not blocking}
        try:
            return HfApi().create_commit(str(self.hub_model_id), operations, **options)
        except Exception as error:  # the hub and the network raise many unrelated types
            raise UploadError(
                f"push_to_hub: could not upload the student in {folder} ({reason_of(error):.200}); check the network and "
                "the token, and start the command again with --resume"
            ) from error

    def push_card(self) -> None:
        """Upload the model card alone, after an evaluation has changed it."""
        self.upload(Path(self.args.output_dir), "Add results", only=CARD)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        previous = self.push_in_progress  # type: ignore[has-type]
        busy = previous is not None and not previous.is_done() and not self.args.hub_always_push
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END and not busy:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            job = self.upload(Path(checkpoint_folder), f"Training in progress, step {self.state.global_step}", False)
            self.push_in_progress = PushInProgress([*([] if previous is None else previous.jobs), job])


def _content(path: Path) -> str | bytes:
    if path.name not in ("config.json", "adapter_config.json"):
        return str(path)
    return json.dumps(without_paths(json.loads(path.read_text(encoding="utf-8"))), indent=2).encode()
