"""Options of generation and evaluation, declared once and validated when they are created."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dwakd.data.templates import TEMPLATE_CHOICES
from dwakd.validation import Options

Count = Annotated[int, Field(ge=1)]
NO_REPEAT_NGRAM_SIZES = {"plain": 0, "minillm": 6}
"""For each value of `decoding`: no n-gram of this size occurs twice in prompt and answer; 0 allows all n-grams."""


class DecodingOptions(Options):
    """Options that all passes over the rows share."""

    max_new_tokens: Count = Field(256, description="Maximum number of tokens of an answer.")
    top_p: float = Field(1.0, gt=0, le=1, description="Total probability of the most probable tokens to keep.")
    batch_size: Count = Field(16, description="Prompts in one forward pass; changes the speed, not the answers.")


class GenerationOptions(DecodingOptions):
    """Options of `generate_answers`: one answer for each row."""

    seed: int | None = Field(ge=0, description="Seed of the sampling, or None to decode greedily.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; divides the logits.")
    no_repeat_ngram_size: int = Field(0, ge=0, description="No n-gram of this size occurs twice; 0 allows all n-grams.")


class EvalOptions(DecodingOptions):
    """Options of `evaluate_model`.

    The defaults are those of the papers on DSKD and DWA-KD, with a greedy pass in addition. The code that computed the
    published tables also used `decoding="minillm"`, which the papers do not mention.
    """

    seeds: Count = Field(5, description="Number of sampling seeds: 10, 20, 30 and so on.")
    temperatures: list[float] = Field(
        [1.0],
        description="Sampling temperatures, each with its own scores over all seeds. Repeat the option for several.",
    )
    decoding: Literal["plain", "minillm"] = Field(
        "plain",
        description="plain, or minillm as in the published tables: no 6-gram of tokens occurs twice in prompt and answer.",
    )
    do_sample: bool = Field(True, description="Report sampled answers, once for each seed.")
    greedy: bool = Field(True, description="Also report greedy answers.")
    max_length: Count = Field(512, description="Maximum number of tokens of prompt and response in bits per byte.")

    @model_validator(mode="after")
    def _check(self) -> EvalOptions:
        if not (self.do_sample or self.greedy):
            raise ValueError("do_sample and greedy are both false, so there are no answers: set one of them to true")
        if not self.temperatures or min(self.temperatures) <= 0 or len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"temperatures must be one or more different numbers above 0, got {self.temperatures}")
        if self.decoding == "minillm" and (self.temperatures != [1.0] or self.top_p != 1):
            raise ValueError(
                f"decoding minillm has temperature 1 and top_p 1, but temperatures are {self.temperatures} and top_p is "
                f"{self.top_p}: leave them out, or set decoding to plain"
            )
        return self

    def passes(self) -> list[GenerationOptions]:
        """Return the options of each pass over the rows: all seeds of each temperature, then the greedy one."""
        shared = self.model_dump(include=set(DecodingOptions.model_fields))
        shared["no_repeat_ngram_size"] = NO_REPEAT_NGRAM_SIZES[self.decoding]
        seeds = range(10, 10 * self.seeds + 1, 10) if self.do_sample else ()
        drawn = [(seed, temperature) for temperature in self.temperatures for seed in seeds]
        sampled = [GenerationOptions(seed=seed, temperature=temperature, **shared) for seed, temperature in drawn]
        return [*sampled, *([GenerationOptions(seed=None, **shared)] if self.greedy else [])]


class RowOptions(Options):
    """How the rows of a file or hub data set are read and become prompts; None leaves a choice to the reader."""

    prompt: str | None = Field(None, description="Column of the prompt.")
    response: str | None = Field(None, description="Column of the response or the references.")
    input: str | None = Field(None, description="Column of the optional input.")
    limit: int | None = Field(None, ge=1, description="Only the first rows of each set.")
    template: str | None = Field(None, description=f"How a row becomes a prompt: {TEMPLATE_CHOICES}.")
    bos: str | None = Field(None, description="Beginning of a text: auto or never.")
    special_tokens_in_prompts: str | None = Field(None, description="Special tokens in prompts: parse or text.")

    def reading(self) -> dict[str, Any]:
        """Return the keyword arguments for `load_examples`."""
        return self.model_dump(include={"prompt", "response", "input", "limit"})

    def rendering(self, **defaults: str) -> dict[str, Any]:
        """Return the keyword arguments for `TextEncoder`, with these defaults where an option is None."""
        given = self.model_dump(include={"template", "bos", "special_tokens_in_prompts"}, exclude_none=True)
        return {**defaults, **given}
