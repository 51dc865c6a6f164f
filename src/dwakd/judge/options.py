"""Options of the judge, declared once and validated when they are created."""

from __future__ import annotations

from pydantic import Field

from dwakd.evaluation.options import Count
from dwakd.validation import Options


class JudgeOptions(Options):
    """Which answers are compared, in which order, and how the judge is asked. The defaults follow the paper."""

    answers_seed: int | None = Field(
        None, description="Compare the answers that were sampled with this seed; by default the greedy ones."
    )
    limit: Count = Field(100, description="Maximum number of prompts of each test set, which are drawn with the seed.")
    seed: int = Field(42, ge=0, description="Seed of the prompts that are drawn and of the order of the answers.")
    both_orders: bool = Field(False, description="Ask in both orders; an answer wins only if it wins in both.")
    length_control: bool = Field(False, description="Also estimate the win rate for answers of equal length.")
    prompt: str | None = Field(None, description="File of another prompt, with {question}, {first} and {second}.")
    request: list[str] = Field(
        [], description="Argument of the requests, such as max_tokens=512; null removes one. May be repeated."
    )
    batch_size: Count = Field(8, description="Requests at a time.")
    requests_per_minute: float | None = Field(None, gt=0, description="Start at most this many requests a minute.")
    price_in: float | None = Field(None, ge=0, description="Price of a million prompt tokens, for the estimate.")
    price_out: float | None = Field(None, ge=0, description="Price of a million reply tokens, for the estimate.")
