"""A model of transformers that answers prompts in this process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftModel

from dwakd.answers.answers import Answer, Finish
from dwakd.data.encoding import TextEncoder
from dwakd.data.rows import Example
from dwakd.errors import UserError
from dwakd.evaluation.generate import answerable_prompts, generate_batch, plan_batches
from dwakd.evaluation.options import GenerationOptions
from dwakd.models.rows import evaluating
from dwakd.recipe.sections import GenerateSection

Advance = Callable[[int], Any]
"""Called with the number of answers that were finished since the last call."""
_DIGITS = 4


class LocalTeacher:
    """A loaded teacher. An answer depends only on the teacher, the options, the prompt and its number.

    Args:
        model: a causal language model.
        encoder: renders and tokenises the prompts.
        options: how to decode.
        skip: whether prompts that do not fit are refused, instead of an error.
    """

    def __init__(self, model: Any, encoder: TextEncoder, options: GenerateSection, *, skip: bool = False) -> None:
        self.model, self.encoder, self.skip = model, encoder, skip
        self.base = model.get_base_model() if isinstance(model, PeftModel) else model
        shared = options.model_dump(include={"max_new_tokens", "top_p", "batch_size"})
        seeds = [options.seed + sample if options.temperature else None for sample in range(options.samples)]
        self._passes = [
            GenerationOptions(seed=seed, temperature=options.temperature or 1.0, **shared) for seed in seeds
        ]

    def check(self, examples: Sequence[Example], source: str) -> None:
        """Raise a UserError that names the row if a prompt is empty or leaves no room for an answer, unless `skip`."""
        if not self.skip:
            answerable_prompts(self.model, self.encoder, examples, source)

    def fits(self, example: Example) -> bool:
        """Return whether the teacher can answer a prompt."""
        try:
            answerable_prompts(self.model, self.encoder, [example])
        except UserError:
            return False
        return True

    def answer(self, first: int, examples: Sequence[Example], advance: Advance) -> list[list[Answer]]:
        """Return the samples of each prompt; `first` is the number of the first prompt among all prompts."""
        known = [row for row, example in enumerate(examples) if not self.skip or self.fits(example)]
        batches = plan_batches(self.model, self.encoder, [examples[row] for row in known], self._passes[0])
        refused = [Answer("", 0, "refused", None)] * len(self._passes)
        answers: list[list[Answer]] = [refused] * len(examples)
        for row in known:
            answers[row] = []
        advance((len(examples) - len(known)) * len(self._passes))
        with evaluating(self.model):
            for options in self._passes:
                for batch in batches:
                    rows = [known[row] for row in batch.rows]
                    numbered = batch._replace(rows=[first + row for row in rows])
                    found = generate_batch(self.base, self.encoder, numbered, options)
                    for row, one in zip(rows, found, strict=True):
                        if not math.isfinite(one.log_prob):
                            raise UserError(
                                "the teacher's probabilities are NaN: check its weights, or load it with another "
                                "teacher.dtype, such as bfloat16"
                            )
                        finish: Finish = "end" if one.ended else "cut"
                        count = len(one.ids) + one.ended
                        answers[row].append(Answer(one.text, count, finish, round(one.log_prob, _DIGITS)))
                    advance(len(found))
        return answers
