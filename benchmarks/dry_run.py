"""Compare what `dwakd train --dry-run` predicts with what the training then needs.

    python -m benchmarks.dry_run RECIPE [section.option=value ...] [--processor-time]

Prediction and training run in one process each. `--processor-time` measures the time of the processor instead of the clock,
for a machine that other programs use.
"""

import json
import subprocess
import sys
import tempfile
import time

PROCESSOR = "--processor-time"


def child(task: str, folder: str, recipe_file: str, overrides: list[str]) -> dict[str, float]:
    """Predict or train, and return the seconds of training and the peak of the memory in bytes."""
    if PROCESSOR in overrides:
        time.perf_counter = time.time = time.process_time
    from dwakd.inspection.prediction import predict
    from dwakd.recipe.recipe import load_recipe
    from dwakd.training.run import peak_memory_bytes, train

    recipe = load_recipe(recipe_file, [item for item in overrides if item != PROCESSOR])
    if task == "predict":
        found, _ = predict(recipe)
        return {"seconds": found.seconds, "step_seconds": found.step_seconds, "bytes": found.peak_bytes}
    trainer = train(recipe, folder)
    (seconds,) = (entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry)
    steps = trainer.clock.seconds
    return {"seconds": seconds, "step_seconds": sum(steps) / len(steps), "bytes": peak_memory_bytes() or 0}


def main() -> None:
    recipe_file, *overrides = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for task in ("predict", "train"):
            command = [sys.executable, "-m", "benchmarks.dry_run", "--child", task, folder, recipe_file, *overrides]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
    predicted, actual = results
    for name, value in actual.items():
        print(f"{name}: predicted {predicted[name]:.4g}, actual {value:.4g}, ratio {predicted[name] / value:.2f}")


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        print(json.dumps(child(sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:])))
    else:
        main()
