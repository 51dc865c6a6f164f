"""A thin `transformers.Trainer`: exact reduction, teachers that run before the step, and projectors with their own rate."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from dwakd.data.collator import collate
from dwakd.data.encoded import EncodedPairs
from dwakd.data.sources import Example
from dwakd.data.stream import StreamedRows
from dwakd.errors import UserError
from dwakd.models.checks import check_packing, check_training
from dwakd.models.loading import add_end_token
from dwakd.recipe.checks import check_stream
from dwakd.recipe.training import DistillConfig
from dwakd.training import inputs as given
from dwakd.training.arguments import check_batches, checked_args
from dwakd.training.balance import TermBalance
from dwakd.training.callbacks import FiniteCheck, RunCallback, TermsProgressCallback
from dwakd.training.card import recipe_of
from dwakd.training.distiller import Distiller, build_method
from dwakd.training.evaluation import choose_best, eval_loader, generated_metrics, mean_terms
from dwakd.training.on_policy import StudentAnswers, check_end_tokens
from dwakd.training.sharding import ShardedTrainer
from dwakd.training.steps import StepTrainer
from dwakd.training.student import add_adapter, check_optimizer, check_student, disable_dropout, freeze_unused
from dwakd.training.teacher import CachedTeacher, Teacher
from dwakd.training.teachers import AnyTeacher, MicroBatch, load_teachers, make_encoders, sets_of_teacher
from dwakd.validation import unknown_option


class DistillTrainer(ShardedTrainer, StepTrainer):
    """Distil a teacher into a student whose tokenizer may differ.

    Args:
        model: the student: a model, or a name or folder for `load_causal_lm`.
        teacher_model: the teacher, given like the student or as a `Teacher`; a list for several. Not needed by `sft`.
        train_dataset: a hub id, a file, a `datasets.Dataset`, a list of rows or examples, or encoded pairs.
        eval_dataset: the same, or several sets by name, whose metrics are named eval_NAME_loss and so on. In a
            `DatasetDict` or a dict with the key `train`, it is `validation` or else `test`.
        processing_class: the student's tokenizer. It is loaded with a student given by name.
        teacher_processing_class: the teacher's tokenizer, loaded with a teacher given by name. A list for several.
        peft_config: trains adapters on the student instead of its weights.
        compute_metrics: takes an EvalPrediction whose predictions are the generated answers and whose label_ids are the
            references, both lists. It implies generation during evaluation.
        dataset_names: names of the data sets "train" and "eval" in messages. Default: their source.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: AnyTeacher | list[AnyTeacher] | None = None,
        args: DistillConfig | None = None,
        train_dataset: given.Source | None = None,
        eval_dataset: given.Source | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        dataset_names: dict[str, str] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            name = next(iter(unknown))
            raise unknown_option(name, name, [*inspect.signature(DistillTrainer).parameters][:-1])
        args = checked_args(args, teacher_model)
        names = dataset_names or {}
        sources = given.evaluation_sets(eval_dataset)
        choose_best(args, list(sources), own_metrics=compute_metrics is not None)
        self.recipe = recipe_of(args, model, teacher_model, train_dataset, peft=peft_config is not None)
        given.check_named(args, "", [model])
        model, processing_class = given.load_pair(model, processing_class, args, "processing_class")
        if train_dataset is not None:
            check_training(model, gradient_checkpointing=args.gradient_checkpointing)
            if args.padding_free:
                check_packing(model)
            if peft_config is None:
                check_student(model)
        found = load_teachers(model, teacher_model, teacher_processing_class, args)
        self.teachers: list[Teacher] = [teacher for teacher, _ in found]
        self.encoders = make_encoders([(None, processing_class), *found], args, model)
        self.student_encoder = self.encoders[0]
        check_end_tokens(args, self.encoders)
        add_end_token(model, self.student_encoder.end_token_id)
        _, train_pairs = given.encode_source(train_dataset, self.encoders, args, "train", names.get("train"))
        answering = model if args.eval_rouge_l or compute_metrics else None
        self.eval_sets = given.encode_evaluation(sources, self.encoders, args, names.get("eval"), answering)
        eval_pairs = {name: pairs for name, (_, pairs) in self.eval_sets.items()}
        sets = {f"eval {name}".rstrip(): pairs for name, pairs in eval_pairs.items()}
        if isinstance(train_pairs, EncodedPairs):
            sets = {"train": train_pairs, **sets}
        check_stream(args, next((teacher for teacher in self.teachers if isinstance(teacher, CachedTeacher)), None))
        for index, (teacher, encoder) in enumerate(zip(self.teachers, self.encoders[1:], strict=True)):
            teacher.prepare(encoder, args, sets_of_teacher(sets, index))
        set_seed(args.seed)
        loss = build_method(args, model, self.teachers, self.encoders)
        model = add_adapter(model, peft_config)
        if train_dataset is not None:
            freeze_unused(model)
        check_batches(sets.get("train"), args)
        if args.disable_dropout:
            disable_dropout(model)
        listed = callbacks if isinstance(callbacks, list | tuple) else [callbacks] if callbacks else []
        self._uses_cache = getattr(model.config, "use_cache", None)
        self.metrics_function = compute_metrics
        self.clock, self.finite, self.balance = RunCallback(self), FiniteCheck(self), TermBalance(self)
        self.student_answers = StudentAnswers(args, self.encoders, self.clock.answers) if args.lmbda else None
        super().__init__(
            model=Distiller(model, loss, packed=args.padding_free, neftune=args.neftune_noise_alpha is not None),
            args=args,
            data_collator=partial(collate, find_places=[teacher.find_place for teacher in self.teachers]),
            train_dataset=train_pairs,
            eval_dataset=eval_pairs.get("", eval_pairs or None),
            processing_class=processing_class,
            callbacks=[self.clock, self.finite, self.balance, *listed],
            optimizers=optimizers,
        )
        check_optimizer(optimizers[0], self.model)
        self._set_cache(self._uses_cache)
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(TermsProgressCallback)

    @property
    def student(self) -> PreTrainedModel | PeftModel:
        """The student, unwrapped."""
        return self._distiller.student

    @property
    def _distiller(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def compute_loss(
        self, model: nn.Module, inputs: MicroBatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch, sides, scales = inputs
        every = self.args.term_gradient_steps
        measure = bool(every) and self.state.global_step % every == 0
        output = model(
            batch.student, sides, scales, num_items_in_batch, num_sampled=batch.num_sampled, term_gradients=measure
        )
        if self.args.lmbda == 1:
            for values in (output["terms"], output.get("gradient_squares", {})):
                values.pop("ce", None)
        self.finite.add(output["loss"], output["terms"], batch.example_ids)
        self.clock.add_output(output, batch.weight)
        # Wrappers average gradients over ranks; the division by the global number of tokens requires their sum.
        loss = output["loss"] * self.accelerator.num_processes * batch.weight
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the terms, and the other values of `RunCallback.metrics`, since the last log."""
        if "loss" in logs:
            logs |= self.clock.metrics()
            if self.args.max_skipped_steps:  # JSON has no NaN
                logs = {name: value for name, value in logs.items() if math.isfinite(value)}
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as in transformers; raise UserError if a loss or a parameter becomes NaN or infinite."""
        if self.train_dataset is None:
            raise UserError("there is nothing to train on: give train_dataset")
        answering = {"lmbda": self.student_answers, "eval_rouge_l": self.args.eval_rouge_l or self.metrics_function}
        for option in [name for name, value in answering.items() if value and self.is_sharded]:
            raise UserError(f"training.{option}: a student sharded by FSDP or DeepSpeed cannot answer prompts; use DDP")
        for name in ("max_tokens_per_batch", "max_skipped_steps"):
            if getattr(self.args, name) and self.is_deepspeed_enabled:
                raise UserError(f"training.{name} cannot be used with DeepSpeed, which runs the steps itself")
        self._set_cache(False)
        try:
            output = super().train(*args, **kwargs)
        finally:
            self._set_cache(self._uses_cache)  # the saved student is that of the user
        self.finite.finish()
        if isinstance(self.train_dataset, StreamedRows):
            self.train_dataset.report()
        return output

    def _set_cache(self, value: bool | None) -> None:
        if self._uses_cache is not None:
            self.student.config.use_cache = value

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create AdamW with `learning_rate` for the student and `projector_learning_rate` for the loss's own maps."""
        if self.optimizer is None:  # type: ignore[has-type]
            module = model or self.model
            decayed = set(self.get_decay_parameter_names(module))
            groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    of_student = "student" in name.split(".")[:2]  # a wrapper may add one word in front
                    groups.setdefault((of_student, name in decayed), []).append(parameter)
            rates, decay = (self.args.projector_learning_rate, self.args.learning_rate), self.args.weight_decay
            listed = [
                {"params": own, "lr": rates[of_student], "weight_decay": decay if is_decayed else 0.0}
                for (of_student, is_decayed), own in groups.items()
            ]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, module)
            self.optimizer = optimizer_class(listed, **options)
        return self.optimizer

    def evaluate(
        self, eval_dataset: given.Source | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute every term in nats per student response token, bits per byte, and ROUGE-L if `args` asks for it.

        N(.) is computed for each batch, so the terms of distillation depend a little on `per_device_eval_batch_size`.
        `ce`, `bits_per_byte` and `rouge_l` do not. Metrics of several sets have the prefix eval_NAME.

        Args:
            eval_dataset: as in the constructor. Default: those of the constructor. Rows that are encoded already have no
                ROUGE-L, and no metrics of `compute_metrics`.
            ignore_keys: unused.
        """
        sets, own = self.eval_sets, eval_dataset is None
        if not own:
            sources = given.evaluation_sets(eval_dataset)
            encoded = any(isinstance(source, EncodedPairs) for source in sources.values())
            answers = (self.args.eval_rouge_l or self.metrics_function) and not encoded
            student = self.student if answers else None
            sets = given.encode_evaluation(sources, self.encoders, self.args, None, student)
        if not sets:
            raise UserError("there is nothing to evaluate on: give eval_dataset")
        found: dict[str, float] = {}
        for name, (examples, pairs) in sets.items():
            metrics = self._evaluate_set(pairs, examples, name)
            prefix = f"{metric_key_prefix}_{name}_" if name else f"{metric_key_prefix}_"
            metrics = {prefix + key.removeprefix(prefix): value for key, value in metrics.items()}
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
            found |= metrics
        return found

    def _evaluate_set(self, pairs: EncodedPairs, examples: list[Example], name: str) -> dict[str, float]:
        with torch.random.fork_rng():  # a run must not depend on how often it is evaluated
            loader = self.accelerator.prepare(eval_loader(pairs, self.args, self.data_collator))
            bar = tqdm(loader, "evaluating", delay=2, leave=False, disable=self.args.disable_tqdm)
            batches = (self._micro_batches([batch])[0] for batch in bar)
            metrics = mean_terms(self._distiller, batches, self.accelerator.reduce)
            if examples and (self.args.eval_rouge_l or self.metrics_function):
                chosen, metric = choose_best(self.args, list(self.eval_sets), own_metrics=True)
                best = metric if name == chosen else "loss"
                own = self.student, self.student_encoder, examples, self.args, self.metrics_function
                metrics |= generated_metrics(*own, best=best)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported, because the logits of a batch are never computed as a whole."""
        raise UserError("DistillTrainer has no predict; use dwakd.evaluation.generate.generate_answers for answers")
