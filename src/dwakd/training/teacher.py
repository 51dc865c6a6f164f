"""The frozen teacher: never wrapped, never saved, never in train mode."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dwakd.batch import ModelSide, OutputHead
from dwakd.data.collator import NO_TOKEN
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import EncodedPairs
from dwakd.losses import needs_attention
from dwakd.models.invariant import response_states
from dwakd.models.rows import embedding_table, output_head, response_rows, true_places
from dwakd.training.config import DistillConfig

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


class Teacher(ABC):
    """Gives the teacher's response rows of a batch; a plain object, so that no wrapper or checkpoint finds it.

    `OnlineTeacher` runs the model on each batch, `dwakd.training.cached.CachedTeacher` reads what it once gave: the
    same rows, to the last bit in float32 on a CPU.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    """The teacher's tokenizer, if the teacher brings one."""

    @property
    @abstractmethod
    def head(self) -> OutputHead:
        """The teacher's output head, a constant."""

    @property
    @abstractmethod
    def table(self) -> Float[Tensor, "vocab embedding"]:
        """The teacher's input-embedding table."""

    @property
    def date(self) -> str | None:
        """The ISO date that chat templates have to print as today's, if the teacher prescribes one."""
        return None

    @property
    def embedding_size(self) -> int:
        return self.table.shape[1]

    def prepare(self, encoder: TextEncoder, args: DistillConfig, sets: dict[str, EncodedPairs | None]) -> None:
        """Told once, before training, what will be asked for: the sets "train" and "eval" as `encoder` has them."""
        return

    def collator(self, collate: Collator) -> Collator:
        """The collator to use, given the one that makes the batches."""
        return collate

    @abstractmethod
    def states(self, batch: dict[str, Any]) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, " tokens"] | None]:
        """Final hidden states of the response rows of one collated batch, on its device, without gradient.

        And the attention to them, if the method that `prepare` was told of reads it.
        """

    def rows(self, batch: dict[str, Any]) -> ModelSide:
        """Rows of one collated batch, on the device of the batch, without gradient."""
        hidden, attention = self.states(batch)
        table, mask = self.table.detach(), batch["teacher_response_mask"]
        counts = host_counts(batch, "teacher", "num_rows")
        places = true_places(mask, counts)
        targets = batch["teacher_target_ids"].flatten()[places]
        aligned = batch.get("teacher_aligned_rows")
        return ModelSide(
            hidden=hidden,
            input_embeddings=table[batch["teacher_input_ids"].flatten()[places]],
            target_embeddings=table[targets],
            target_ids=targets,
            lengths=mask.sum(dim=1),
            byte_ends=batch["teacher_byte_ends"].flatten()[places],
            head=self.head,
            aligned_rows=None if aligned is None else aligned[aligned != NO_TOKEN],
            attention=attention,
        ).with_counts(counts)


class OnlineTeacher(Teacher):
    """Runs the teacher on each batch.

    Args:
        model: a causal language model; set to eval mode and frozen here.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.with_attention = False

    def prepare(self, encoder: TextEncoder, args: DistillConfig, sets: dict[str, EncodedPairs | None]) -> None:
        self.with_attention = needs_attention(args.method, args.loss_options)

    @property
    def head(self) -> OutputHead:
        return output_head(self.model).detached()

    @property
    def table(self) -> Float[Tensor, "vocab embedding"]:
        return embedding_table(self.model)

    def states(self, batch: dict[str, Any]) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, " tokens"] | None]:
        ids = batch["teacher_input_ids"]
        if self.model.device != ids.device:
            self.model.to(ids.device)
        lengths = host_counts(batch, "teacher", "num_tokens") or batch["teacher_attention_mask"].sum(1).tolist()
        num_rows = host_counts(batch, "teacher", "num_rows") or batch["teacher_response_mask"].sum(1).tolist()
        sequences = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        found = response_states(self.model, sequences, num_rows, attention=self.with_attention)
        weights = [weights for _, weights in found if weights is not None]
        return torch.cat([hidden for hidden, _ in found]), torch.cat(weights) if weights else None


def side_rows(model: torch.nn.Module, batch: dict[str, Any], side: str, *, attention: bool = False) -> ModelSide:
    """Response rows of one side ("student" or "teacher") of a collated batch."""
    names = ("input_ids", "attention_mask", "target_ids", "response_mask", "byte_ends")
    tensors = {name: batch[f"{side}_{name}"] for name in names}
    return response_rows(model, **tensors, attention=attention, num_rows=host_counts(batch, side, "num_rows"))


def host_counts(batch: dict[str, Any], side: str, name: str) -> list[int] | None:
    """A list of the collator's, of those examples that the batch still has; None where a batch was made without it."""
    counts: list[int] | None = batch.get(f"{side}_{name}")
    return None if counts is None else counts[: len(batch[f"{side}_input_ids"])]
