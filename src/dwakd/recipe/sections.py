"""The sections of a recipe that describe models, data, evaluation and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from peft import LoraConfig
from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from dwakd.data.templates import TEMPLATE_CHOICES, check_date, check_template
from dwakd.errors import UserError
from dwakd.recipe.from_dataclass import Json, options_of
from dwakd.validation import Options, Section, parse

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=1e-30, le=1e30)]
Dtype = Literal["float32", "bfloat16", "float16"]


PeftOptions = options_of(LoraConfig)


def _check_peft(options: dict[str, Any]) -> dict[str, Any]:
    parse(PeftOptions, options, "student.peft.")
    try:
        check_task_type(lora_config(options))
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(str(error)) from error
    return options


def lora_config(options: dict[str, Any]) -> LoraConfig:
    """Return the LoraConfig that the option `student.peft` describes."""
    return LoraConfig(**{"task_type": "CAUSAL_LM", **options})


def check_task_type(config: Any) -> None:
    """Raise UserError if an adapter is for another task, because it could not be loaded with AutoPeftModelForCausalLM."""
    if config.task_type not in (None, "CAUSAL_LM"):
        kind = getattr(config.task_type, "value", config.task_type)
        raise UserError(f"task_type of the adapter must be CAUSAL_LM, got {kind}")


def _check_template(template: str) -> str:
    check_template(template)
    return template


Peft = Annotated[dict[str, Any], AfterValidator(_check_peft), WithJsonSchema(PeftOptions.model_json_schema())]


class ModelSection(Section):
    """Which model to load, and how."""

    model: str = Field(description="Folder, id on the Hugging Face Hub, gguf:PATH or package:NAME/FILE.")
    revision: str | None = Field(None, description="Branch, tag or commit of a model on the hub.")
    dtype: Dtype = Field("float32", description="Type of the weights.")
    trust_remote_code: bool = Field(False, description="Whether to run modelling code from the hub.")
    attn_implementation: str | None = Field(
        None, description="Attention function of transformers, such as eager, sdpa or flash_attention_2."
    )
    quantization_config: dict[str, Json] | None = Field(
        None, description="Options of a quantisation of transformers, such as {load_in_4bit: true}."
    )
    chat_template_path: str | None = Field(
        None, description="A file with a chat template, or another model's folder or hub id, for data.template: chat."
    )

    def loading(self) -> dict[str, Any]:
        """Return the options of `load_causal_lm` that are given, with the dtype as one of torch."""
        names = {"revision", "trust_remote_code", "adapter", "attn_implementation", "quantization_config"}
        given = self.model_dump(include={*names, "device_map", "tp_plan", "dtype"}, exclude_none=True)
        return given | {"dtype": getattr(torch, given.get("dtype", "float32"))}


class LoadingOptions(Section):
    """The keyword arguments of `from_pretrained` that `model_init_kwargs` may have."""

    revision: str | None = None
    dtype: Dtype | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    quantization_config: Any = None
    device_map: Any = None
    tp_plan: Literal["auto"] | dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        """Read the older name `torch_dtype`, and dtypes of torch."""
        named = {"dtype" if name == "torch_dtype" else name: value for name, value in given.items()}
        return {n: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for n, v in named.items()}


class StudentSection(ModelSection):
    """The student, which is trained."""

    peft: Peft | None = Field(None, description="Options of peft.LoraConfig. An adapter is trained, not the weights.")


def _without_password(url: str) -> str:
    if "@" in url.partition("://")[2].partition("/")[0]:
        # not a ValueError, whose message would contain the value
        raise UserError(
            "base_url and teacher.url must not contain a password, because recipes are stored: set the environment variable "
            "OPENAI_API_KEY"
        )
    return url


Address = Annotated[str, AfterValidator(_without_password)]
_SERVER = "the address of a server that runs the teacher"
_LOCAL = ("dtype", "attn_implementation", "quantization_config", "device_map", "tp_plan", "adapter", "cache_dtype")


class TeacherSection(ModelSection):
    """A teacher."""

    name: str | None = Field(
        None, min_length=1, description="Name of this teacher for data.teacher_key. By default its number, from 1."
    )
    weight: Share = Field(1.0, description="Weight of this teacher, relative to those of the others.")
    dtype: Dtype | None = Field(None, description="Type of the weights. By default bfloat16 on GPUs, else float32.")  # type: ignore[assignment]
    device_map: str | dict[str, int | str] | None = Field(
        None, description="Devices of the layers, such as auto, which divides the teacher among the GPUs of a process."
    )
    tp_plan: Literal["auto"] | dict[str, str] | None = Field(
        None, description="Tensor parallelism: auto divides each layer of the teacher among the processes of torchrun."
    )
    adapter: str | None = Field(None, description="Folder of a PEFT adapter to merge into the teacher.")
    cache: str | None = Field(
        None,
        description="Folder of a cache, which is built if it is missing, or the fsspec address of a complete cache, such as "
        "s3://bucket/cache. Training from a cache does not run the teacher.",
    )
    cache_dtype: Dtype | None = Field(
        None, description="Type of the stored hidden states. By default it is that of the teacher, without rounding."
    )
    url: Address | None = Field(
        None,
        description="Address of a server with the API of OpenAI that gives the log-probabilities of a prompt, such as "
        "http://localhost:8000/v1. Only the tokenizer of the model is then loaded, and only alm can be trained.",
    )
    served_model: str | None = Field(None, description="Name of the model on the server. By default it is model.")
    api: Literal["echo", "prompt_logprobs", "echo_text"] = Field(
        "echo",
        description="What is sent to the server: token ids with echo, token ids with vLLM's prompt_logprobs, or text with echo "
        "for servers that take no token ids.",
    )
    batch_size: Count = Field(16, description="Number of parallel requests to the server.")

    @model_validator(mode="after")
    def _check_combinations(self) -> TeacherSection:
        for name in ("device_map", "adapter", "cache") if self.tp_plan is not None else ():
            if getattr(self, name) is not None:
                raise ValueError(f"tp_plan cannot be combined with {name}: leave out one of them")
        for name in ("served_model", "api", "batch_size") if self.url is None else _LOCAL:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} {'requires' if self.url is None else 'cannot be combined with'} url, {_SERVER}"
                )
        return self


def check_teacher_key(column: str, names: Sequence[str], weights: Sequence[float]) -> None:
    """Raise UserError unless there are several teachers with different names and equal weights."""
    if len(names) < 2:
        raise UserError(f"data.teacher_key names the column {column!r}, but there are not several teachers: remove it")
    if len(set(names)) < len(names):
        raise UserError(f"teacher.name must differ between teachers for data.teacher_key, got {', '.join(names)}")
    if len(set(weights)) > 1:
        raise UserError(f"teacher.weight is not used with data.teacher_key ({column!r}): remove the weights")


class DataSection(Section):
    """The data to train on, and how rows become text and tokens of both models."""

    train: str = Field(description="Training set: a json, jsonl, csv or parquet file, or an id on the hub.")
    eval: str | None = Field(None, description="Evaluation set.")
    prompt: str | None = Field(None, description="Column of the prompt. By default it is found by its name.")
    response: str | None = Field(None, description="Column of the response. By default it is found by its name.")
    input: str | None = Field(None, description="Column of the optional input. By default it is found by its name.")
    teacher_prompt: str | None = Field(
        None,
        description="Column of a prompt that only the teachers read, instead of the row's. Its length is not limited.",
    )
    teacher_key: str | None = Field(
        None, description="Column with the name of the teacher, one of several, that a row is distilled from."
    )
    supervise: Literal["last", "all"] = Field(
        "last", description="Train on the last assistant turn of a conversation, or on all of them, each as an example."
    )
    template: Annotated[str, AfterValidator(_check_template)] = Field(
        "alpaca", description=f"How a row becomes a prompt: {TEMPLATE_CHOICES}."
    )
    bos: Literal["auto", "never"] = Field(
        "auto", description="auto adds the BOS token if the model's tokenizer does; never leaves it out."
    )
    special_tokens_in_prompts: Literal["parse", "text"] = Field(
        "parse", description="parse reads the text of a special token in a prompt as this token; text reads it as text."
    )
    template_date: Annotated[str | None, BeforeValidator(check_date)] = Field(
        None, description="Date that chat templates print, such as 2026-01-31. By default the day of the run's start."
    )
    max_length: Count = Field(512, description="Maximum tokens of prompt and response. Longer rows are truncated.")
    max_prompt_length: Count = Field(256, description="Maximum number of tokens of a prompt.")
    invalid_rows: Literal["error", "skip"] = Field(
        "error", description="Whether malformed rows, empty responses and long prompts are an error or skipped."
    )
    responses: Literal["given", "teacher"] = Field(
        "given", description="Train on the responses of the rows, or on the teacher's answers to generate.prompts."
    )
    streaming: bool = Field(
        False, description="Whether to read and encode the training set during the training; needs training.max_steps."
    )
    limit: Count | None = Field(None, description="Only the first rows of the training set.")
    eval_limit: Count | None = Field(None, description="Only the first rows of the evaluation set.")


class EndpointSection(Section):
    """A server with the API of OpenAI. Its key, if it needs one, is read from the variable OPENAI_API_KEY."""

    base_url: Address = Field(description="Address of the API, such as http://localhost:8000/v1.")
    model: str = Field(description="Name of the model on the server.")


class GenerateSection(Options):
    """Which prompts the teacher answers, how it decodes, and which answers are left out."""

    prompts: list[str] = Field([], description="Files or ids on the hub. By default the recipe's data.train.")
    output: str | None = Field(None, description="The jsonl file of the answers. It is made if it is missing.")
    endpoint: EndpointSection | None = Field(None, description="A server that answers instead of the teacher.")
    api: Literal["chat", "completions"] = Field(
        "chat",
        description="chat sends the messages of a row to the endpoint, which has a chat template. completions sends the text "
        "that data.template makes of the row, which a base model continues.",
    )
    samples: Count = Field(1, description="Answers to each prompt; several need a temperature above 0.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0 decodes greedily.")
    top_p: float = Field(1.0, gt=0, le=1, description="Total probability of the most probable tokens to keep.")
    seed: int = Field(0, ge=0, description="Seed of the sampling; sample number i, from 0, has the seed plus i.")
    max_new_tokens: Count = Field(256, description="Maximum number of tokens of an answer; longer ones are left out.")
    batch_size: Count = Field(16, description="Prompts in one forward pass, or requests at a time to an endpoint.")
    limit: Count | None = Field(None, description="Only the first prompts of each file.")
    min_characters: Count = Field(1, description="Leave out answers with fewer characters.")
    max_characters: Count | None = Field(None, description="Leave out answers with more characters.")
    max_repetition: float | None = Field(
        None, ge=0, le=1, description="Leave out answers with a larger fraction of repeated four-word sequences."
    )
    min_log_prob: float | None = Field(
        None, le=0, description="Leave out answers whose tokens have a lower mean log-probability under the teacher."
    )

    @model_validator(mode="after")
    def _samples_differ(self) -> GenerateSection:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 requires a temperature above 0: greedy answers are all equal")
        return self


class EvaluationSection(Section):
    """The test sets to answer after the training."""

    test: list[str] = Field([], description="Files or ids on the hub.")
    text: list[str] = Field(
        [], description="Files or ids with a column text, whose bits per byte are computed without a prompt."
    )
    seeds: Count = Field(5, description="Number of sampling seeds: 10, 20, 30 and so on.")
    temperatures: list[float] = Field([1.0], description="Sampling temperatures. Each has its own scores.")
    decoding: Literal["plain", "minillm"] = Field(
        "plain",
        description="plain, or minillm as in the published tables: no 6-gram occurs twice in prompt and answer.",
    )
    max_new_tokens: Count = Field(256, description="Maximum number of tokens of an answer.")
    max_length: Count = Field(512, description="Maximum number of tokens of prompt and response in bits per byte.")
    batch_size: Count = Field(16, description="Prompts in one forward pass. It does not change the answers.")
    limit: Count | None = Field(None, description="Only the first rows of each test set.")


class CompareSection(Section):
    """What `dwakd compare` trains."""

    methods: list[str] = Field(
        [],
        description="Methods, or names of rows. By default all rows or, without rows, all methods that work with these models "
        "and with training.lmbda.",
    )
    seeds: list[Seed] = Field([1], description="Training seeds.")
    rows: dict[str, dict[str, Json]] = Field(
        {},
        description="Rows of the table by their names. Each row contains the options that it changes, such as loss.method or "
        "data.train, with their values.",
    )
