"""Distil with DWA-KD in a subclass of TRL's SFTTrainer: `python examples/sft_trainer.py` (requires `pip install trl`)."""

import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from own_loop import ROWS, tiny

import dwakd

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    sys.exit(f"this example requires TRL, which cannot be imported ({error}): pip install trl")


class DistillationSFTTrainer(SFTTrainer):
    """Replace the loss of SFTTrainer by a loss of dwakd. Rows are encoded for both models by `dwakd.encode_rows`."""

    def __init__(self, *args: Any, teacher: Any, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=dwakd.collate, **kwargs)
        self.teacher = teacher.to(self.args.device)
        widths = dwakd.model_widths(self.model, teacher)
        self.loss_function = dwakd.DwaKdLoss(widths=widths).to(self.args.device)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args)
        optimizer.add_param_group({"params": list(self.loss_function.parameters()), "lr": 1e-3})
        return optimizer

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        sides = dwakd.paired_sides(model, self.teacher, inputs)
        return self.loss_function(*sides).loss


def main() -> list[float]:
    """Train the student for some steps and return the logged losses."""
    torch.manual_seed(0)
    (student, student_tokenizer), (teacher, teacher_tokenizer) = tiny(280, 32), tiny(340, 48)
    pairs = dwakd.encode_rows(ROWS, student_tokenizer, teacher_tokenizer, template="plain")
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            max_steps=10,
            per_device_train_batch_size=3,
            logging_steps=2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = DistillationSFTTrainer(
            student,
            args=args,
            teacher=teacher,
            train_dataset=Dataset.from_list([pairs[index] for index in range(len(pairs))]),
            processing_class=student_tokenizer,
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
