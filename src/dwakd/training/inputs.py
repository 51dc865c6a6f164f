"""What a trainer accepts: models and tokenizers by name or loaded, data in any of the usual forms."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import REFUSED, EncodedPairs, align_by_spelling, encode_pairs
from dwakd.data.sources import EVAL_SPLITS, TRAIN_SPLITS, Example, load_examples
from dwakd.errors import UserError
from dwakd.losses import method_class
from dwakd.models.head import embedding_table, model_name, output_head
from dwakd.models.loading import align_special_tokens, check_vocabulary, load_causal_lm, load_tokenizer, quiet_peft
from dwakd.models.rows import check_head
from dwakd.models.trainable import check_training
from dwakd.training.config import DistillConfig
from dwakd.training.student import check_student

Rows: TypeAlias = str | Path | Dataset | IterableDataset | Mapping[str, Any] | list[dict[str, Any]] | list[Example]
Source: TypeAlias = Rows | EncodedPairs
Model: TypeAlias = PreTrainedModel | PeftModel
Pair: TypeAlias = tuple[Model, PreTrainedTokenizerBase]


def checked_args(args: Any) -> DistillConfig:
    """The arguments, if they are ours and this process can train with them."""
    args = args or DistillConfig()
    if not isinstance(args, DistillConfig):
        raise UserError(f"args must be a dwakd.DistillConfig, which takes every option of {type(args).__name__}")
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to one process: start one for each with torchrun "
            f"--nproc-per-node={args.n_gpu}, or set CUDA_VISIBLE_DEVICES to one of them"
        )
    if args.accelerator_config.dispatch_batches:
        raise UserError(
            "accelerator_config.dispatch_batches cannot be used, as each process makes its own batches; leave it out"
        )
    return args


def add_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The student with adapters to train; refuses adapters that change matrices outside themselves or cannot be saved."""
    try:
        with quiet_peft():
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"peft_config (student.peft): {error}") from error
    output_head(adapted)
    embedding_table(adapted)
    check_student(adapted)
    return adapted


def load_pair(model: str | Model, tokenizer: PreTrainedTokenizerBase | None, args: DistillConfig, name: str) -> Pair:
    """A model with its tokenizer, loaded if given by name, and checked to be one that losses can use.

    Raises:
        UserError: no tokenizer beside a loaded model, a head that is not the whole way from hidden states to logits, or
            a tokenizer with more tokens than the model.
    """
    if isinstance(model, str):
        tokenizer = tokenizer or load_tokenizer(model, trust_remote_code=args.trust_remote_code)
        model = load_causal_lm(model, trust_remote_code=args.trust_remote_code)
    if tokenizer is None:
        raise UserError(f"{name} is missing: a model that is given loaded needs its tokenizer beside it")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer given as {name} has no end-of-sequence token; set its eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_head(model)
    check_vocabulary(model, tokenizer, model_name(model))
    align_special_tokens(model, tokenizer)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < args.max_length:
        raise UserError(
            f"data.max_length is {args.max_length}, but {model_name(model)} has only {positions} positions; lower it"
        )
    return model, tokenizer


def load_student_pair(
    model: str | Model,
    tokenizer: PreTrainedTokenizerBase | None,
    args: DistillConfig,
    peft_config: PeftConfig | None,
    train_dataset: Any,
) -> Pair:
    """The student with its tokenizer; one that is to be trained is checked before teachers and data are prepared.

    Raises:
        UserError: as `load_pair`, `check_training` and `check_student`; or an adapter for a model that has one.
    """
    model, tokenizer = load_pair(model, tokenizer, args, "processing_class")
    if isinstance(model, PeftModel) and peft_config is not None:
        raise UserError(
            "the student has an adapter already: leave out peft_config, or give the model without the adapter"
        )
    if train_dataset is not None:
        check_training(model, gradient_checkpointing=args.gradient_checkpointing)
        if peft_config is None:
            check_student(model)
    return model, tokenizer


def make_encoder(tokenizer: PreTrainedTokenizerBase, args: DistillConfig, date: str | None = None) -> TextEncoder:
    """The encoder that the data options of `args` describe; `date` is what a chat template prints as today's."""
    return TextEncoder(tokenizer, args.template, args.bos, args.special_tokens_in_prompts, date=date)


def encode_source(
    source: Source | None,
    encoders: tuple[TextEncoder, ...],
    args: DistillConfig,
    role: str,
    name: str | None = None,
) -> tuple[list[Example], EncodedPairs | None]:
    """The examples of a data set and what the method wants of their tokens.

    Args:
        source: the data set, if there is one.
        encoders: of the student and of each teacher.
        args: columns, template and truncation.
        role: "train" or "eval".
        name: what messages call it.
    """
    if source is None:
        return [], None
    examples, pairs = ([], source) if isinstance(source, EncodedPairs) else _encode(source, encoders, args, role, name)
    if method_class(args.method).options_type.needs_edit_alignment:
        align_by_spelling(pairs, *encoders)
    return examples, pairs


def _encode(
    source: Rows,
    encoders: tuple[TextEncoder, ...],
    args: DistillConfig,
    role: str,
    name: str | None,
) -> tuple[list[Example], EncodedPairs]:
    name = name or (str(source) if isinstance(source, str | Path) else f"the {role} dataset")
    if isinstance(source, list) and source and isinstance(source[0], Example):
        examples = [example for example in source if isinstance(example, Example)]
    else:
        examples = load_examples(
            source,
            split=EVAL_SPLITS if role == "eval" else TRAIN_SPLITS,
            prompt=args.prompt_column,
            response=args.response_column,
            input=args.input_column,
            invalid_rows=args.invalid_rows,
            name=name,
        )
    pairs = encode_pairs(
        examples,
        *encoders,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        invalid_rows=args.invalid_rows,
        source=name,
    )
    refused = set(pairs.report.get(REFUSED, ()))  # no prompt can be rendered, so none can be answered
    return [example for example in examples if example.index not in refused], pairs


def check_batches(pairs: EncodedPairs | None, args: DistillConfig) -> None:
    """Refuse to leave out the last batch where it is the only one.

    Raises:
        UserError: as said.
    """
    size = args.train_batch_size * args.world_size
    if pairs is not None and args.dataloader_drop_last and len(pairs) < size:
        raise UserError(
            f"the {len(pairs)} rows to train on are fewer than a batch of {size}, which training.dataloader_drop_last "
            "leaves out: lower training.per_device_train_batch_size, or switch it off"
        )
