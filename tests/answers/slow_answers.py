"""A generation that waits after each shard, so that test_run.py can kill it between two shards."""

import sys
import time

from dwakd.answers import answer_recipe
from dwakd.answers.store import AnswerFile
from dwakd.recipe.recipe import load_recipe

if __name__ == "__main__":
    recipe, output = sys.argv[1:]
    write = AnswerFile.write_shard

    def slow(self, shard, answers):
        write(self, shard, answers)
        time.sleep(0.4)

    AnswerFile.write_shard = slow  # type: ignore[method-assign]
    answer_recipe(load_recipe(recipe, command="generate"), output=output)
