"""The part of the trainer that makes the micro-batches of an optimiser step and runs them."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from dwakd.batch import PairedBatch
from dwakd.data.stream import RowBatches, StreamedRows, collate_stream, use_one_thread
from dwakd.training.balance import TermBalance
from dwakd.training.callbacks import RunCallback
from dwakd.training.hub import HubTrainer
from dwakd.training.on_policy import StudentAnswers
from dwakd.training.sampler import LengthGroupedSampler, cut_repeats, split_by_tokens
from dwakd.training.teacher import Teacher
from dwakd.training.teachers import MicroBatch, run_teachers


class StepTrainer(HubTrainer):
    """Run the teachers on all micro-batches of an optimiser step, then forward and backward on each of them."""

    args: Any
    teachers: list[Teacher]
    student_answers: StudentAnswers | None
    clock: RunCallback
    balance: TermBalance
    student: Any
    _distiller: Any

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches to train on. Those of a stream are read here and encoded ahead in `dataloader_num_workers`."""
        rows, args = self.train_dataset, self.args
        if not isinstance(rows, StreamedRows):
            return super().get_train_dataloader()
        return DataLoader(
            rows,
            batch_sampler=RowBatches(rows.rows, self._train_batch_size, args.process_index, args.world_size),
            collate_fn=partial(collate_stream, collate=self.data_collator),
            num_workers=args.dataloader_num_workers,
            worker_init_fn=use_one_thread,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        pairs, args = train_dataset or self.train_dataset, self.args
        step_size = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return LengthGroupedSampler(pairs.student_lengths, step_size, seed, lambda: int(self.state.epoch or 0))

    def get_batch_samples(
        self, epoch_iterator: Iterator[PairedBatch], num_batches: int, device: torch.device
    ) -> tuple[list[list[MicroBatch]], Tensor | None]:
        """Run the teachers first, so that N(.) and the reduction are computed over the whole optimiser batch.

        transformers expects one item for each batch. With `max_tokens_per_batch`, the last one has all micro-batches.
        """
        self.step_started = time.perf_counter()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if isinstance(self.train_dataset, StreamedRows):
            batches = [self.train_dataset.accept(batch, self.data_collator) for batch in batches]
        if not batches:
            return batches, None
        micro_batches = self._micro_batches(batches, self.student_answers, self.args.max_tokens_per_batch)
        num_tokens = torch.tensor(self.clock.add_tokens([micro.batch for micro in micro_batches]), device=device)
        if self.args.world_size > 1:
            num_tokens = self.accelerator.gather(num_tokens).sum()
        num_tokens = num_tokens.clamp(min=1)  # no row of a stream may be usable in this step
        self._distiller.loss.set_step(self.state.global_step)
        self._distiller.term_scales = self.balance.scales
        if self.args.max_tokens_per_batch is None:
            return [[micro] for micro in micro_batches], num_tokens
        return [*([] for _ in batches[1:]), micro_batches], num_tokens

    def _micro_batches(
        self, batches: list[PairedBatch], answer: StudentAnswers | None = None, max_tokens: int | None = None
    ) -> list[MicroBatch]:
        gather = self.accelerator.gather if self.args.world_size > 1 else None
        kept = cut_repeats(batches, self.accelerator.gradient_state, self.args)
        if answer is not None:
            kept = answer.replace(kept, self.student, self.state.global_step)
        kept = [batch.to(self.args.device) for batch in kept]
        if max_tokens is not None:
            kept = split_by_tokens(kept, max_tokens, gather, packed=self.args.padding_free)
        return run_teachers(kept, self.teachers, gather)

    def training_step(
        self, model: nn.Module, inputs: list[MicroBatch], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward on each micro-batch. Ranks sum their gradients only once in an optimiser step."""
        loss = torch.zeros((), device=self.args.device)
        for micro in inputs:
            with nullcontext() if micro is inputs[-1] else self.accelerator.no_sync(model):
                loss += super().training_step(model, micro, num_items_in_batch)
        return loss

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        return inputs
