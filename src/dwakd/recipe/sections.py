"""The sections of a recipe that describe models, data, evaluation and comparisons."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from peft import LoraConfig
from pydantic import AfterValidator, Field, WithJsonSchema

from dwakd.data.prompts import check_template
from dwakd.recipe.options import Count, Json, Share, options_of
from dwakd.validation import Section, parse

Dtype = Literal["float32", "bfloat16", "float16"]
PeftOptions = options_of(LoraConfig)


def _check_peft(options: dict[str, Any]) -> dict[str, Any]:
    parse(PeftOptions, options, "student.peft.")
    try:
        lora_config(options)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(str(error)) from error
    return options


def lora_config(options: dict[str, Any]) -> LoraConfig:
    """Return the LoraConfig that the option `student.peft` describes."""
    return LoraConfig(**{"task_type": "CAUSAL_LM", **options})


Peft = Annotated[dict[str, Any], AfterValidator(_check_peft), WithJsonSchema(PeftOptions.model_json_schema())]


def _check_template(template: str) -> str:
    check_template(template)
    return template


class ModelSection(Section):
    """Which model to load, and how."""

    model: str = Field(description="Folder, id on the Hugging Face Hub, gguf:PATH or package:NAME/FILE.")
    revision: str | None = Field(None, description="Branch, tag or commit of a model on the hub.")
    dtype: Dtype = Field("float32", description="Type of the weights.")
    trust_remote_code: bool = Field(False, description="Whether to run modelling code from the hub.")


class StudentSection(ModelSection):
    """The student, which is trained."""

    peft: Peft | None = Field(None, description="Options of peft.LoraConfig. An adapter is trained, not the weights.")


class TeacherSection(ModelSection):
    """A teacher."""

    weight: Share = Field(1.0, description="Weight among several teachers, relative to theirs.")
    adapter: str | None = Field(None, description="Folder of a PEFT adapter to merge into the teacher.")
    cache: str | None = Field(None, description="Folder of the teacher's hidden states. It is built if it is missing.")
    cache_dtype: Dtype | None = Field(
        None, description="Type of the stored hidden states. By default it is the teacher's, which stores them exactly."
    )


class DataSection(Section):
    """The data to train on, and how rows become text and tokens of both models."""

    train: str = Field(description="Training set: a json, jsonl, csv or parquet file, or an id on the hub.")
    eval: str | None = Field(None, description="Evaluation set.")
    prompt: str | None = Field(None, description="Column of the prompt. By default it is guessed.")
    response: str | None = Field(None, description="Column of the response. By default it is guessed.")
    input: str | None = Field(None, description="Column of the optional input. By default it is guessed.")
    template: Annotated[str, AfterValidator(_check_template)] = Field(
        "alpaca", description="How a row becomes a prompt: alpaca, chat, plain, or a format string with {instruction}."
    )
    bos: Literal["auto", "never"] = Field(
        "auto", description="Whether texts begin with the BOS token: as is usual for each model, or never."
    )
    special_tokens_in_prompts: Literal["parse", "text"] = Field(
        "parse", description="Whether the names of special tokens in a row's prompt become tokens or remain text."
    )
    max_length: Count = Field(512, description="Most tokens of prompt and response. Longer rows are truncated.")
    max_prompt_length: Count = Field(256, description="Most tokens of a prompt.")
    invalid_rows: Literal["error", "skip"] = Field(
        "error", description="Whether malformed rows, empty responses and too long prompts are an error or skipped."
    )
    limit: Count | None = Field(None, description="Only the first rows of the training set.")
    eval_limit: Count | None = Field(None, description="Only the first rows of the evaluation set.")


class EvaluationSection(Section):
    """The test sets to answer after the training."""

    test: list[str] = Field([], description="Files or ids on the hub.")
    seeds: Count = Field(5, description="Number of sampling seeds: 10, 20, 30 and so on.")
    max_new_tokens: Count = Field(256, description="Most tokens of an answer.")
    batch_size: Count = Field(16, description="Prompts in one forward pass. It does not change the answers.")
    limit: Count | None = Field(None, description="Only the first rows of each test set.")


class CompareSection(Section):
    """What `dwakd compare` trains."""

    methods: list[str] = Field([], description="Methods. By default all that work with these models.")
    seeds: list[int] = Field([1], description="Training seeds.")
    options: dict[str, dict[str, Json]] = Field({}, description="Options of each method, by its name.")
