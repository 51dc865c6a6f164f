"""One rank of two that answer and then train; test_run.py starts it."""

import sys
from pathlib import Path

import torch

from dwakd.answers.store import AnswerFile
from dwakd.recipe.recipe import load_recipe
from dwakd.training.end_of_run import end_of_run
from dwakd.training.run import train
from tests.shards import record_shards

if __name__ == "__main__":
    recipe, folder = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    record_shards(AnswerFile, folder)
    options = ["data.responses=teacher", f"generate.output={folder / 'answers.jsonl'}", "training.ddp_backend=gloo"]
    options += ["training.per_device_train_batch_size=2"]
    train(load_recipe(recipe, options), folder / "run")
    end_of_run()
