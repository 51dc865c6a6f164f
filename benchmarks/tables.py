"""Write the tables and the figure of docs/performance.md from the JSON files of the benchmarks.

  python -m benchmarks.tables

Each table is between two marks, such as `<!-- growth -->` and `<!-- /growth -->`, and is replaced if the folder has its
results. The document lists the commands that create them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.plot import Points, figure, save
from benchmarks.workload import RESULTS

FIGURE = "performance-growth.svg"
PANELS = {
    "batch": ("batch", "examples in a batch"),
    "length": ("length", "tokens in an example"),
    "vocab": ("teacher_vocab", "vocabulary size of both models"),
    "teacher_hidden": ("teacher_hidden", "teacher's width"),
}
"""For each varied option: the field of `sizes` with its value, and its label."""
LINES = {
    "published_dskd": ("DSKD as published", "#7a7a7a"),
    "response_dskd": ("DSKD, response tokens", "#3b75af"),
    "dwa_kd": ("DWA-KD", "#c03d3e"),
    "sft_response": ("SFT, response tokens", "#3a923a"),
}


STEPS = {
    "published_dwa_kd": ("DWA-KD as published: logits of all positions, one example at a time", {}),
    "published_dskd": ("DSKD as published: logits of all positions", {}),
    "response_dskd": ("DSKD in plain torch, response tokens only", {"published_dskd": "DSKD as published"}),
    "dwa_kd": (
        "**DWA-KD, with the teacher's forward pass**",
        {
            "published_dskd": "DSKD as published",
            "response_dskd": "DSKD in plain torch",
            "published_dwa_kd": "DWA-KD as published",
        },
    ),
    "dskd": ("DSKD, with the teacher's forward pass", {"response_dskd": "DSKD in plain torch"}),
    "dwa_kd_cached": (
        "DWA-KD, with precomputed teacher hidden states",
        {"published_dskd": "DSKD as published", "sft_response": "SFT in plain torch"},
    ),
    "products": ("matrix products only: the bodies of both models and the eight head products", {}),
    "sft_all_positions": ("SFT in plain torch, logits of all positions", {}),
    "sft_response": ("SFT in plain torch, response tokens only", {}),
    "sft": ("SFT", {"sft_response": "SFT in plain torch"}),
}
"""Label of each contestant, and the contestants that it is compared with."""


def results(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the results of one file, one entry for each size, or an empty list if there is no file."""
    path = folder / f"{name}.json"
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    return found


def rows_of(table: list[list[str]]) -> str:
    """Format a table as Markdown; its first row is the header."""
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]]) + "\n"


def points_of(folder: Path, benchmark: str, measured: str, unit: float = 1.0) -> dict[str, Points]:
    """Return the points by the label of the varied size, without steps that ran out of memory."""
    found = {}
    for varied, (field, title) in PANELS.items():
        points = [
            (result["sizes"][field], {name: taken / unit for name, taken in result[measured].items() if taken})
            for result in results(folder, f"{benchmark}-{varied}")
        ]
        if points:
            found[title] = points
    return found


def steps(folder: Path, document: Path) -> str | None:
    """Format the table of seconds and ratios at the default sizes."""
    for one in results(folder, "step"):
        seconds = one["median_seconds"]
        table = [["step", "seconds", "ratios"]]
        for name, (label, others) in STEPS.items():
            ratios = [f"{seconds[name] / seconds[other]:.2f} x {words}" for other, words in others.items()]
            if name == "products":
                ratios = [f"DWA-KD takes {seconds['dwa_kd'] / seconds[name]:.2f} x as long"]
            table.append([label, f"{seconds[name]:.2f}", ", ".join(ratios)])
        return rows_of(table)
    return None


def sizes(folder: Path, document: Path) -> str | None:
    """Format the table of ratios at other sizes."""
    asked = [("dwa_kd", "products"), ("dwa_kd_loss", "head_products"), ("dwa_kd_cached", "sft_response")]
    labels = ["DWA-KD / products", "DWA-KD's loss / head products", "precomputed teacher / SFT in plain torch"]
    table = [["student: vocabulary x width", "teacher: vocabulary x width", "batch x response tokens", *labels]]
    for one in [one for name in ("short", "small", "wide") for one in results(folder, f"step-{name}")]:
        size = one["sizes"]
        heads = [f"{size[f'{side}_vocab']:,} x {size[f'{side}_hidden']}" for side in ("student", "teacher")]
        ratios = [f"{one['ratios'][f'{name} / {other}']:.2f}" for name, other in asked]
        table.append([*heads, f"{size['batch']} x {size['response']}", *ratios])
    return rows_of(table) if len(table) > 1 else None


def memory(folder: Path, document: Path) -> str | None:
    """Format the table of peak memory for the measured contestants."""
    for one in results(folder, "memory"):
        peaks = one["peak_bytes"]
        table = [[f"step, batch {one['sizes']['batch']}", "GB", "/ DSKD as published"]]
        for name in [name for name in STEPS if peaks.get(name)]:
            ratio = f"{peaks[name] / peaks['published_dskd']:.3f}"
            table.append([STEPS[name][0], f"{peaks[name] / 1e9:.2f}", "" if name == "published_dskd" else ratio])
        return rows_of(table)
    return None


def cache(folder: Path, document: Path) -> str | None:
    """Format the table of steps from a cache, by the teacher's vocabulary."""
    measured = results(folder, "cache-teacher_vocab")
    table = [
        [
            "teacher's vocabulary",
            "SFT, s",
            "cached, s",
            "cached / SFT",
            "cached / SFT with DWA-KD's loss",
            "cached / online",
        ]
    ]
    for one in measured:
        seconds, ratios = one["median_seconds"], one["ratios"]
        shown = [f"{ratios[f'cached / {other}']:.2f}" for other in ("sft", "expected", "online")]
        taken = [f"{seconds[name]:.2f}" for name in ("sft", "cached")]
        table.append([f"{one['sizes']['teacher_vocab']:,}", *taken, *shown])
    return rows_of(table) if measured else None


def growth_table(found: dict[str, Points], unit: str) -> str:
    """Format a table of DWA-KD's measurements, with the other contestants as multiples of them."""
    measured = {name for points in found.values() for _, taken in points for name in taken}
    others = [name for name in LINES if name in measured - {"dwa_kd"}]
    table = [["", f"DWA-KD, {unit}", *(LINES[name][0] for name in others)]]
    for title, points in found.items():
        for value, taken in points:
            ratios = [f"{taken[name] / taken['dwa_kd']:.2f} x" if name in taken else "" for name in others]
            table.append([f"{title}: {value:,}", f"{taken['dwa_kd']:.2f}", *ratios])
    return rows_of(table)


def growth(folder: Path, document: Path) -> str | None:
    """Format the tables of time and memory for each varied size, and draw the figure."""
    seconds = points_of(folder, "step", "median_seconds")
    gigabytes = points_of(folder, "memory", "peak_bytes", 1e9)
    if not seconds:
        return None
    save(figure("Seconds of one training step", seconds, LINES), document.parent / FIGURE)
    picture = f"![Seconds of a step over batch, length, vocabulary and width]({FIGURE})\n"
    parts = [
        growth_table(seconds, "s"),
        picture,
        *([growth_table(gigabytes, "GB above the weights")] if gigabytes else []),
    ]
    return "\n".join(parts)


def trl(folder: Path, document: Path) -> str | None:
    """Format the table of TRL's time and memory divided by dwakd's, for the loss alone and for a whole step."""
    taken = {
        what: one[measured]
        for what, measured in (("step", "median_seconds"), ("memory", "peak_bytes"))
        for one in results(folder, f"{what}-trl")
    }
    if len(taken) < 2:
        return None
    table = [["TRL / dwakd", "loss alone, time", "loss alone, memory", "step, time", "step, memory"]]
    for method in ("uld", "gold"):
        ratios = [
            taken[what][f"trl_{method}{part}"] / taken[what][f"{method}{part}"]
            for part in ("_loss", "")
            for what in ("step", "memory")
        ]
        table.append([f"`{method}`", *(f"{ratio:.1f} x" for ratio in ratios)])
    return rows_of(table)


def methods(folder: Path, document: Path) -> str | None:
    """Format the table of a step of every method, the fastest first."""
    peaks: dict[str, int] = next((one["peak_bytes"] for one in results(folder, "memory-methods")), {})
    for one in results(folder, "step-methods"):
        seconds = one["median_seconds"]
        table = [["method", "seconds", "/ DWA-KD", "/ SFT and teacher", "GB above the weights"]]
        for name in sorted(seconds, key=lambda name: seconds[name]):
            label = "SFT, the teacher's forward pass and a product with its head" if name == "sft_head" else f"`{name}`"
            ratios = [f"{seconds[name] / seconds[other]:.2f}" for other in ("dwa_kd", "sft_head")]
            table.append([label, f"{seconds[name]:.2f}", *ratios, f"{peaks[name] / 1e9:.2f}" if name in peaks else ""])
        return rows_of(table)
    return None


PEERS = {
    "numba_batched": "numba_batched",
    "numba_one_by_one": "numba_one_by_one",
    "pysdtw": "pysdtw",
    "tslearn": "tslearn",
    "ours_plain_torch": "dwakd in plain torch",
    "autograd_loop": "loop with autograd",
}
"""Label of each peer in `benchmarks.soft_dtw`."""


def measured_soft_dtw(folder: Path) -> dict[str, Any]:
    """Return the results of `benchmarks.soft_dtw`, or an empty dict if there is no file."""
    path = folder / "soft_dtw.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def soft_dtw(folder: Path, document: Path) -> str | None:
    """Format the table of milliseconds, with peers as multiples of dwakd's, and the table of the alignment loss."""
    found = measured_soft_dtw(folder)
    if not found:
        return None
    table = [["batch x length", "dwakd, ms", "ns per cell", *PEERS.values()]]
    for case, taken in found["milliseconds"].items():
        own = f"{taken['ours']:.3g}", f"{taken['ours_ns_per_cell']:.1f}"
        ratios = [f"{taken[peer] / taken['ours']:.1f} x" if peer in taken else "" for peer in PEERS]
        table.append([case, *own, *ratios])
    part = found["dtw_part"]
    part_of_step = [
        ["alignment loss of one step", "ms"],
        ["dwakd", f"{part['ours']:.0f}"],
        ["the published structure", f"{part['published_structure']:,.0f}: {part['ratio']:.0f} x"],
    ]
    return f"{rows_of(table)}\n{rows_of(part_of_step)}"


def accuracy(folder: Path, document: Path) -> str | None:
    """Format the table of the largest error of a float32 gradient, by gamma."""
    found = measured_soft_dtw(folder)
    if not found:
        return None
    names = {"ours": "dwakd", **PEERS}
    present = [name for name in names if name in next(iter(found["gradient_error"].values()))]
    rows = [
        [f"{float(gamma):,g}", *(f"{errors[name]:.1e}" for name in present)]
        for gamma, errors in found["gradient_error"].items()
    ]
    return rows_of([["gamma", *(names[name] for name in present)], *rows])


SECTIONS = {
    "steps": steps,
    "sizes": sizes,
    "memory": memory,
    "cache": cache,
    "methods": methods,
    "trl": trl,
    "growth": growth,
    "soft_dtw": soft_dtw,
    "accuracy": accuracy,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    document = RESULTS.parents[1] / "docs" / "performance.md"
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument(
        "--document", type=Path, default=document, help="file to update; the figure is written to its folder"
    )
    options = parser.parse_args()
    written = options.document.read_text(encoding="utf-8")
    for name, section in SECTIONS.items():
        text = section(options.results, options.document)
        if text is None:
            print(f"{name}: no results in {options.results}")
            continue
        print(text)
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if start in written:
            before, rest = written.split(start, 1)
            written = f"{before}{start}\n{text}\n{end}{rest.split(end, 1)[1]}"
    options.document.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
