"""Options of generation and evaluation, declared once and validated when they are created."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from dwakd.validation import Options

Count = Annotated[int, Field(ge=1)]


class DecodingOptions(Options):
    """How a model's answers are decoded, apart from the seed."""

    max_new_tokens: Count = Field(256, description="Most tokens of an answer.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; divides the logits.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens that together reach this.")
    batch_size: Count = Field(16, description="Prompts in one forward pass; changes the speed, not the answers.")


class GenerationOptions(DecodingOptions):
    """Options of `generate_answers`: one answer for each row."""

    seed: int | None = Field(ge=0, description="Seed of the sampling, or None to decode greedily.")


class EvalOptions(DecodingOptions):
    """Options of `evaluate_model`. The defaults are the protocol of DSKD and DWA-KD, with a greedy pass in addition."""

    seeds: Count = Field(5, description="Number of sampling seeds: 10, 20, 30 and so on.")
    do_sample: bool = Field(True, description="Report sampled answers, once for each seed.")
    greedy: bool = Field(True, description="Also report greedy answers.")
    max_length: Count = Field(512, description="Most tokens of prompt and response in bits per byte.")

    @model_validator(mode="after")
    def _has_a_pass(self) -> EvalOptions:
        if not (self.do_sample or self.greedy):
            raise ValueError("do_sample and greedy are both false, so there are no answers: set one of them to true")
        return self

    def passes(self) -> list[GenerationOptions]:
        """Return the options of each pass over the rows: one for each seed, then the greedy one."""
        shared = self.model_dump(include=set(DecodingOptions.model_fields))
        seeds = range(10, 10 * self.seeds + 1, 10) if self.do_sample else ()
        return [GenerationOptions(seed=seed, **shared) for seed in (*seeds, *([None] if self.greedy else []))]


class RowOptions(Options):
    """How the rows of a file or hub data set are read and become prompts; None leaves a choice to the reader."""

    prompt: str | None = Field(None, description="Column of the prompt.")
    response: str | None = Field(None, description="Column of the response or the references.")
    input: str | None = Field(None, description="Column of the optional input.")
    limit: int | None = Field(None, ge=1, description="Only the first rows of each set.")
    template: str | None = Field(None, description="alpaca, chat, plain or a format string that renders the prompt.")
    bos: str | None = Field(None, description="Beginning of a text: auto or never.")
    special_tokens_in_prompts: str | None = Field(None, description="Special tokens in prompts: parse or text.")

    def reading(self) -> dict[str, Any]:
        """Return the keyword arguments for `load_examples`."""
        return self.model_dump(include={"prompt", "response", "input", "limit"})

    def rendering(self, **defaults: str) -> dict[str, str]:
        """Return the keyword arguments for `TextEncoder`, with these defaults where an option is None."""
        given = self.model_dump(include={"template", "bos", "special_tokens_in_prompts"}, exclude_none=True)
        return {**defaults, **given}
