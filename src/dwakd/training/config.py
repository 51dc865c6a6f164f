"""The training arguments, under their name in the public interface."""

from dwakd.recipe.training import DistillConfig as DistillConfig
