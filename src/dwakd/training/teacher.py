"""The frozen teacher: never wrapped, never saved, never in train mode."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dwakd.batch import ModelSide
from dwakd.models.head import OutputHead
from dwakd.models.rows import embedding_table, output_head, response_rows


class Teacher(ABC):
    """Gives the teacher's response rows of a batch; a plain object, so that no wrapper or checkpoint finds it."""

    embedding_size: int

    @property
    @abstractmethod
    def head(self) -> OutputHead:
        """The teacher's output head."""

    @abstractmethod
    def rows(self, batch: dict[str, Tensor]) -> ModelSide:
        """Rows of one collated batch, on the device of the batch, without gradient."""


class OnlineTeacher(Teacher):
    """Runs the teacher on each batch.

    Args:
        model: a causal language model; set to eval mode and frozen here.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.embedding_size = embedding_table(model).shape[1]

    @property
    def head(self) -> OutputHead:
        return output_head(self.model).detached()

    def rows(self, batch: dict[str, Tensor]) -> ModelSide:
        if self.model.device != batch["teacher_input_ids"].device:
            self.model.to(batch["teacher_input_ids"].device)
        with torch.no_grad():
            return side_rows(self.model, batch, "teacher")


def side_rows(model: torch.nn.Module, batch: dict[str, Tensor], side: str) -> ModelSide:
    """Response rows of one side ("student" or "teacher") of a collated batch."""
    names = ("input_ids", "attention_mask", "target_ids", "response_mask", "byte_ends")
    return response_rows(model, *(batch[f"{side}_{name}"] for name in names))
