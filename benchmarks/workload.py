"""Build the sizes, models and batches of the training-step benchmarks, and the signature of their results."""

import argparse
import dataclasses
import json
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dwakd.batch import PairedBatch, TokenBatch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Sizes:
    """Sizes of a GPT-2-like student, a Llama-like teacher and a batch of random tokens, right-padded to `length`."""

    batch: int = 4
    length: int = 256
    response: int = 100
    student_vocab: int = 50_257
    student_hidden: int = 256
    student_layers: int = 4
    teacher_vocab: int = 151_936
    teacher_hidden: int = 512
    teacher_layers: int = 6
    seed: int = 0


def add_options(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Add an option for each field of `Sizes`, and the options of the run and its output."""
    for field in dataclasses.fields(Sizes):
        default = defaults.get(field.name, field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=default, help="default %(default)s")
    parser.add_argument(
        "--vary",
        nargs="+",
        metavar=("FIELD", "VALUE"),
        help="measure at several values, as in --vary batch 2 4 8; `length` scales the response with it, `vocab` sets "
        "both vocabularies",
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of torch; default %(default)s"
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file; default benchmarks/results/NAME.json, or NAME-FIELD.json with --vary"
    )


def sizes_of(options: argparse.Namespace) -> list[Sizes]:
    """Return the requested sizes: one, or one for each value of `--vary`."""
    sizes = Sizes(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Sizes)})
    if not options.vary:
        return [sizes]
    field, *values = options.vary
    return [_varied(sizes, field.replace("-", "_"), int(value)) for value in values]


def _varied(sizes: Sizes, field: str, value: int) -> Sizes:
    if field == "vocab":
        return dataclasses.replace(sizes, student_vocab=value, teacher_vocab=value)
    if field == "length":
        return dataclasses.replace(sizes, length=value, response=max(sizes.response * value // sizes.length, 1))
    return dataclasses.replace(sizes, **{field: value})


def build_student(sizes: Sizes) -> PreTrainedModel:
    """Build a student with random weights and without dropout."""
    torch.manual_seed(sizes.seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=sizes.student_vocab,
            bos_token_id=None,
            eos_token_id=None,
            n_embd=sizes.student_hidden,
            n_layer=sizes.student_layers,
            n_head=max(sizes.student_hidden // 64, 1),
            n_positions=max(sizes.length, 1024),
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def build_teacher(sizes: Sizes) -> PreTrainedModel:
    """Build a frozen teacher with random weights."""
    torch.manual_seed(sizes.seed + 1)
    teacher = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes.teacher_vocab,
            hidden_size=sizes.teacher_hidden,
            intermediate_size=sizes.teacher_hidden * 8 // 3,
            num_hidden_layers=sizes.teacher_layers,
            num_attention_heads=max(sizes.teacher_hidden // 64, 1),
            max_position_embeddings=max(sizes.length, 1024),
            tie_word_embeddings=False,
        )
    )
    return teacher.eval().requires_grad_(False)


def build_batch(sizes: Sizes) -> PairedBatch:
    """Build a batch as the collator does, with responses of `response` tokens plus or minus 20 percent."""
    generator = torch.Generator().manual_seed(sizes.seed)
    batch: dict[str, Tensor] = {}
    for side, vocab in (("student", sizes.student_vocab), ("teacher", sizes.teacher_vocab)):
        spread = sizes.response // 5
        responses = sizes.response + torch.randint(-spread, spread + 1, (sizes.batch,), generator=generator)
        responses = responses.clamp(1, sizes.length)
        place = torch.arange(sizes.length)
        prompt = sizes.length - sizes.response - spread
        start = torch.full((sizes.batch, 1), max(prompt, 0))
        end = (start + responses[:, None]).clamp(max=sizes.length)
        tokens = torch.randint(0, vocab, (sizes.batch, sizes.length + 1), generator=generator)
        batch |= {
            f"{side}_input_ids": tokens[:, :-1],
            f"{side}_target_ids": tokens[:, 1:],
            f"{side}_attention_mask": (place < end).long(),
            f"{side}_response_mask": (place >= start) & (place < end),
        }
    batch |= _byte_ends(batch, generator)
    own, theirs = (batch[f"{side}_response_mask"].sum(1).tolist() for side in ("student", "teacher"))
    aligned = [place if place < theirs[n] else -1 for n in range(sizes.batch) for place in range(own[n])]
    student, teacher = (_tokens(batch, side) for side in ("student", "teacher"))
    teacher = dataclasses.replace(teacher, aligned_rows=torch.tensor(aligned))
    return PairedBatch(student, (teacher,), tuple(range(sizes.batch)))


def _tokens(batch: dict[str, Tensor], side: str) -> TokenBatch:
    num_tokens, num_rows = (batch[f"{side}_{name}_mask"].sum(1).tolist() for name in ("attention", "response"))
    tensors: dict[str, Any] = {
        name.removeprefix(f"{side}_"): value for name, value in batch.items() if name.startswith(side)
    }
    return TokenBatch(**tensors, num_tokens=tuple(num_tokens), num_rows=tuple(num_rows))


def _byte_ends(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Build byte offsets of tokens of 4 bytes on average; 90 % of them agree on both sides, as with real tokenizers."""
    masks = {side: batch[f"{side}_response_mask"] for side in ("student", "teacher")}
    ends = {side: torch.zeros(mask.shape, dtype=torch.long) for side, mask in masks.items()}
    for example in range(len(masks["student"])):
        counts = {side: int(mask[example].sum()) for side, mask in masks.items()}
        total = 4 * max(counts.values())
        cuts = torch.randperm(total - 1, generator=generator) + 1
        shared = min(counts.values()) * 9 // 10
        own = {"student": cuts[shared:], "teacher": cuts[shared:].flip(0)}
        for side, count in counts.items():
            inner = torch.cat([cuts[:shared], own[side]])[: count - 1]
            ends[side][example, masks[side][example]] = torch.cat([inner, torch.tensor([total])]).sort().values
    return {f"{side}_byte_ends": value for side, value in ends.items()}


def build_tokens(sizes: Sizes) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """Build the tokens of both vocabularies; 84 % of the smaller are in both, as with GPT-2 and Qwen."""
    shared = min(sizes.student_vocab, sizes.teacher_vocab) * 84 // 100
    student, teacher = (
        tuple(f"{'' if token < shared else side}{token}".encode() for token in range(vocab))
        for side, vocab in (("s", sizes.student_vocab), ("t", sizes.teacher_vocab))
    )
    return student, teacher


def signature(options: argparse.Namespace) -> dict[str, Any]:
    """Return everything that is needed to reproduce a result: options, versions, CPU and commit."""
    cpu = next((line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")), "unknown")
    return {
        "options": {
            name: value if isinstance(value, int | float | list | tuple | None) else str(value)
            for name, value in vars(options).items()
        },
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent, check=False
        ).stdout.strip(),
    }


def write(name: str, results: list[dict[str, Any]], options: argparse.Namespace) -> Path:
    """Write the results and their signature as JSON and return the path."""
    if options.vary:
        name = f"{name}-{options.vary[0].replace('-', '_')}"
    path: Path = options.output or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    signed = {"signature": signature(options), "results": results}
    path.write_text(json.dumps(signed, indent=1) + "\n", encoding="utf-8")
    return path


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
