"""Load and check what a trainer is given: models and tokenizers by name or as objects, and data sets of any form."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dwakd.data.encoded import EncodedPairs, EncodedRow, RowWriter
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import REFUSED, SpellingAligner, align_by_spelling, check_encoded, check_lengths, encode_pairs
from dwakd.data.sources import EVAL_SPLITS, TRAIN_SPLITS, Example, RowSource
from dwakd.data.stream import StreamedRows
from dwakd.environment import supports_bfloat16
from dwakd.errors import UserError
from dwakd.evaluation.generate import answerable_prompts
from dwakd.models.head import model_name, uses_flash_attention
from dwakd.models.loading import (
    align_special_tokens,
    check_positions,
    check_vocabulary,
    load_causal_lm,
    load_tokenizer,
    on_device,
    set_chat_template,
)
from dwakd.models.rows import check_head
from dwakd.recipe.sections import LoadingOptions
from dwakd.recipe.training import DistillConfig
from dwakd.training.stored import stored_pairs

logger = logging.getLogger(__name__)

Rows: TypeAlias = (
    str | Path | Dataset | IterableDataset | Mapping[str, Any] | list[dict[str, Any]] | list[Example] | RowSource
)
Source: TypeAlias = Rows | EncodedPairs | StreamedRows
Model: TypeAlias = PreTrainedModel | PeftModel


def loading_options(args: DistillConfig, role: str) -> dict[str, Any]:
    """Return the keyword arguments of `load_causal_lm` for models given by name; `role` is empty or "teacher_"."""
    given = LoadingOptions.model_validate(getattr(args, f"{role}model_init_kwargs") or {}).model_dump(
        exclude_unset=True
    )
    for name in ("tp_plan", "device_map"):
        if not role and given.get(name) is not None:
            raise UserError(
                f"model_init_kwargs: {name} is for teachers, because the student is trained: shard it with FSDP2"
            )
    dtype = "bfloat16" if role and supports_bfloat16(use_cpu=args.use_cpu) else "float32"
    options = {"trust_remote_code": args.trust_remote_code, "dtype": dtype, **given}
    return options | {"dtype": getattr(torch, options["dtype"])}


def check_named(args: DistillConfig, role: str, models: Sequence[Any]) -> None:
    """Raise UserError if there are options of loading for a role, but no model that is loaded."""
    if getattr(args, f"{role}model_init_kwargs") and not any(isinstance(model, str) for model in models):
        raise UserError(
            f"{role}model_init_kwargs requires a {role}model given by name; leave it out for a loaded model"
        )


def check_tokenizer_type(tokenizer: Any, name: str) -> None:
    """Raise UserError if the argument `name` is given and is not a tokenizer, but for example its name or a processor."""
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        given = repr(tokenizer) if isinstance(tokenizer, str) else f"a {type(tokenizer).__name__}"
        raise UserError(
            f"{name} must be a tokenizer, got {given}; pass AutoTokenizer.from_pretrained(...), or leave it out for a model "
            "given by name"
        )


def load_pair(
    model: str | Model, tokenizer: PreTrainedTokenizerBase | None, args: DistillConfig, name: str
) -> tuple[Model, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer if they are given by name, and check that losses can use them.

    The student's tokenizer gets the chat template of `args`.

    Raises:
        UserError: a loaded model has no tokenizer (the argument `name`), this argument is no tokenizer, the logits of the model
            are not its head applied to its hidden states, or the tokenizer has no end of sequence or more tokens than the
            model.
    """
    role = name.removesuffix("processing_class")
    check_tokenizer_type(tokenizer, name)
    if isinstance(model, str):
        options = loading_options(args, role)
        own = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
        tokenizer = tokenizer or load_tokenizer(model, **own)
        model = load_causal_lm(model, **options)
    if tokenizer is None:
        raise UserError(f"{name} is missing: a model that is passed as an object needs its tokenizer")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer given as {name} has no end-of-sequence token; set its eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not role and args.chat_template_path is not None:
        set_chat_template(tokenizer, args.chat_template_path, trust_remote_code=args.trust_remote_code)
    if uses_flash_attention(model):
        on_device(model, args.device)
    check_head(model)
    check_vocabulary(model, tokenizer, model_name(model))
    align_special_tokens(model, tokenizer)
    check_positions(model.config, model_name(model), args.max_length)
    return model, tokenizer


def evaluation_sets(source: Source | None) -> dict[str, Source]:
    """Return the evaluation sets by name. A single one has an empty name.

    A dict is several sets, as in transformers. A `DatasetDict`, and a dict with a split `train`, is one data set.
    """
    if source is None:
        return {}
    splits = isinstance(source, DatasetDict | IterableDatasetDict)
    if not isinstance(source, Mapping) or splits or "train" in source:
        return {"": source}
    if not source:
        raise UserError("eval_dataset is an empty dict: give a data set, or data sets by their names")
    return dict(source)


def encode_source(
    source: Source | None, encoders: tuple[TextEncoder, ...], args: DistillConfig, role: str, name: str | None = None
) -> tuple[list[Example], Any]:
    """Read and encode a data set, if there is one.

    Args:
        source: the data set.
        encoders: the encoder of the student, then that of each teacher.
        args: the training arguments.
        role: "train" or "eval", which decides the split to read.
        name: name of the data set in messages.

    Returns:
        The examples whose prompts can be rendered (only of an evaluation set that is not encoded yet), and the EncodedPairs,
        or the StreamedRows to train on with `streaming`.
    """
    if source is None:
        return [], None
    name = name or (str(source) if isinstance(source, str | Path) else f"the {role} dataset")
    if isinstance(source, StreamedRows):
        return [], source
    if isinstance(source, EncodedPairs):
        _check_pairs(source, encoders, args, role)
        if args.method_options.needs_edit_alignment:
            align_by_spelling(source, *encoders)
        return [], source
    need_response = role == "eval" or args.lmbda < 1
    rows = _rows(source, args, role, name, need_response=need_response)
    if isinstance(source, IterableDataset) and not (args.streaming and role == "train"):
        streams = ", or set streaming to read it during the training" if role == "train" else ""
        logger.warning("%s is an IterableDataset, of which all rows are read into memory now%s", name, streams)
    if args.streaming and role == "train":
        return [], _stream(rows, encoders, args, need_response=need_response)
    examples = [] if isinstance(rows, RowSource) and role == "train" else list(rows)

    def encode(writer: RowWriter | None = None) -> EncodedPairs:
        given = examples or rows
        return encode_pairs(
            given if need_response else (replace(example, response="", answer=None) for example in given),
            *encoders,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            invalid_rows=args.invalid_rows,
            source=name,
            need_response=need_response,
            finish=Finisher(encoders, args, name),
            writer=writer,
        )

    if isinstance(rows, RowSource) and not examples:
        return [], stored_pairs(rows, encoders, args, encode)
    pairs = encode()
    refused = set(pairs.report.get(REFUSED, ()))
    return [example for example in examples if example.index not in refused], pairs


def _check_pairs(pairs: EncodedPairs, encoders: tuple[TextEncoder, ...], args: DistillConfig, role: str) -> None:
    """Refuse rows that were encoded for other models or options."""
    check_encoded(pairs, encoders)
    if args.teacher_key is not None and len(encoders) > 1 and any(row.chosen is None for row in pairs.examined):
        raise UserError(f"{pairs.source}: teacher_key requires rows that are not encoded yet")
    answers = args.lmbda and role == "train"
    if answers and any(row.student.num_prompt >= args.max_length for row in pairs.examined):
        raise UserError(f"{pairs.source}: prompts leave no room for the student's answers: raise max_length")


def _rows(source: Rows, args: DistillConfig, role: str, name: str, *, need_response: bool) -> RowSource | list[Example]:
    if isinstance(source, list) and source and isinstance(source[0], Example):
        return [example for example in source if isinstance(example, Example)]
    if isinstance(source, RowSource):
        return replace(source, name=name)
    return RowSource(
        source,
        split=EVAL_SPLITS if role == "eval" else TRAIN_SPLITS,
        prompt=args.prompt_column,
        response=args.response_column,
        input=args.input_column,
        teacher_prompt=args.teacher_prompt_column,
        teacher_key=args.teacher_key,
        supervise=args.supervise,
        need_response=need_response,
        invalid_rows=args.invalid_rows,
        name=name,
    )


def _stream(
    rows: RowSource | list[Example], encoders: tuple[TextEncoder, ...], args: DistillConfig, *, need_response: bool
) -> StreamedRows:
    if not isinstance(rows, RowSource):
        raise UserError("data.streaming requires a file, a hub id or a data set to stream: these rows are in memory")
    if rows.teacher_prompt is not None:
        raise UserError("data.teacher_prompt needs all rows, to find the longest prompt: set data.streaming: false")
    check_lengths(args.max_length, args.max_prompt_length)
    next(rows.stream(), None)
    limits = {"max_length": args.max_length, "max_prompt_length": args.max_prompt_length}
    finish = Finisher(encoders, args, rows.title)
    return StreamedRows(rows, encoders, {**limits, "need_response": need_response}, finish)


class Finisher:
    """Set the teacher of each row, and align its tokens if the method needs it; `source` is the name in messages."""

    def __init__(self, encoders: tuple[TextEncoder, ...], args: DistillConfig, source: str) -> None:
        self._source, self._key, count = source, args.teacher_key, len(encoders) - 1
        self._names = args.teacher_names or [str(number + 1) for number in range(count)]
        self._chooses = args.teacher_key is not None and count > 0
        self._align = SpellingAligner(*encoders) if args.method_options.needs_edit_alignment else None

    def __call__(self, row: EncodedRow, example: Example) -> EncodedRow:
        """Return the row; raise UserError if it does not name a teacher."""
        if self._chooses:
            if example.teacher not in self._names:
                raise UserError(
                    f"{self._source}, {example.place}: the column {self._key!r} must name one of the teachers "
                    f"{', '.join(self._names)}, got {example.teacher!r}: correct the row, or set teacher.name"
                )
            row = replace(row, chosen=self._names.index(example.teacher))
        return row if self._align is None else self._align(row)


def refuse_encoded(sources: dict[str, Source]) -> None:
    """Raise UserError if an evaluation set is encoded already, so that its prompts cannot be answered."""
    for name, source in sources.items():
        if isinstance(source, EncodedPairs):
            raise UserError(
                f"{f'the evaluation set {name}' if name else 'eval_dataset'} is encoded already, so its prompts cannot be "
                "answered: pass its rows, or leave out eval_rouge_l and compute_metrics"
            )


def encode_evaluation(
    sources: dict[str, Source],
    encoders: tuple[TextEncoder, ...],
    args: DistillConfig,
    label: str | None,
    answering: Model | None,
) -> dict[str, tuple[list[Example], EncodedPairs]]:
    """Encode the evaluation sets by `encode_source`, and check that the model `answering` can answer their prompts."""
    sets = {}
    if answering is not None:
        refuse_encoded(sources)
    for name, source in sources.items():
        shown = f"{label or 'the eval dataset'} {name}" if name else label
        examples, pairs = encode_source(source, encoders, args, "eval", shown)
        if answering is not None:
            answerable_prompts(answering, encoders[0], examples, shown or "the eval dataset")
        if pairs is not None:
            sets[name] = examples, pairs
    return sets
