"""A teacher answers prompts: `answer_prompts` for rows in memory, `answer_recipe` for a recipe."""

from dwakd.answers.answers import repetition
from dwakd.answers.run import answer_prompts, answer_recipe
from dwakd.recipe.sections import GenerateSection

__all__ = ["GenerateSection", "answer_prompts", "answer_recipe", "repetition"]
