"""Recipes: YAML files that describe a training run, read and validated before data and models are loaded."""
