"""The file of a teacher's answers, its manifest, and the shards with which an interrupted run continues.

`answers.jsonl` comes with `answers.json`, its manifest, and `answers.parts/`: what was asked, and all answers in
shards, including those that are left out of the file. Other filters therefore need no new answers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwakd.answers.answers import Answer
from dwakd.cache.fingerprint import file_digest, json_digest
from dwakd.errors import UserError, explained
from dwakd.folders import UNFINISHED, check_output_folder, write_file, write_json

logger = logging.getLogger(__name__)

FORMAT = "dwakd answers 1"
REQUEST = "request.json"
_DIGEST = "sha256"
_UNWRITTEN = "{} cannot be written; finished answers are kept: free some space and start the command again"
_WAIT_SECONDS = 0.2
_LEAST, _MOST, _SHARDS = 16, 256, 16  # prompts in a shard, and shards of a small set, which ranks divide


@dataclass(frozen=True)
class AnswerFile:
    """The files of one generation. `request`: all that the answers depend on, by the name of the option."""

    path: Path
    request: dict[str, Any]
    num_prompts: int
    samples: int

    @property
    def manifest_path(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def parts(self) -> Path:
        """Folder of the shards."""
        return parts_of(self.path)

    def shards(self) -> list[range]:
        """Return the numbers of the prompts of each shard, independently of the number of ranks."""
        size = min(max(self.num_prompts // _SHARDS, _LEAST), _MOST)
        return [range(start, min(start + size, self.num_prompts)) for start in range(0, self.num_prompts, size)]

    def shard_path(self, shard: int) -> Path:
        return self.parts / f"shard-{shard:05}.jsonl"

    def open(self, rank: int, *, write: bool = True) -> None:
        """Check the files that exist and, with `write`, write what is asked for; each rank writes the same bytes.

        Raises:
            UserError: the answers were made with other options, or the file was not written or has been changed; without
                `write` also if answers are missing.
        """
        if write:
            check_output_folder(self.path.parent)
        if self.path.suffix != ".jsonl":
            raise UserError(f"{self.path} must end in .jsonl; choose another with --output (generate.output)")
        if self.manifest_path.exists() and self.manifest().get("format") != FORMAT:
            raise UserError(
                f"{self.manifest_path} is not a file of dwakd generate, which would replace it: choose another --output "
                "(generate.output)"
            )
        asked = read_request(self.path)
        if asked is not None and (difference := _difference(asked, self.request)):
            raise UserError(
                f"the answers in {self.parts} were made with other options: {difference}; undo the change, delete this "
                f"folder and {self.path.name}, or choose another file with --output (generate.output)"
            )
        if (
            rank == 0
            and self.path.exists()
            and (asked is None or file_digest(self.path) != self.manifest().get("sha256"))
        ):
            raise UserError(
                f"{self.path} was not written by dwakd generate, was changed since, or lacks its folder {self.parts.name}: "
                "train on it with data.train, delete it, or choose another file with --output (generate.output)"
            )
        if not write:
            if asked is None or any(self.read_shard(shard) is None for shard in range(len(self.shards()))):
                raise UserError(f"the teacher's answers in {self.parts} are not complete; run dwakd generate")
        elif asked is None:
            with explained(_UNWRITTEN.format(self.parts)):
                write_json(self.parts / REQUEST, {"format": FORMAT, **self.request})

    def manifest(self) -> dict[str, Any]:
        """Return the content of the manifest; empty if there is none."""
        return read_json(self.manifest_path)

    def write_shard(self, shard: int, answers: Sequence[Sequence[Answer]]) -> None:
        """Write the answers to the prompts of a shard."""
        lines = [
            json.dumps({"prompt_number": row, "sample": sample, **answer._asdict()}, ensure_ascii=False)
            for row, samples in zip(self.shards()[shard], answers, strict=True)
            for sample, answer in enumerate(samples)
        ]
        lines.append(json.dumps({_DIGEST: json_digest(lines)}))
        with explained(_UNWRITTEN.format(self.parts)):
            write_file(self.shard_path(shard), "".join(f"{line}\n" for line in lines).encode())

    def read_shard(self, shard: int) -> list[list[Answer]] | None:
        """Return the answers to the prompts of a shard, or None if its file is missing or damaged."""
        path = self.shard_path(shard)
        if not path.is_file():
            return None
        expected = [(row, sample) for row in self.shards()[shard] for sample in range(self.samples)]
        try:
            texts = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
            has_digest = texts[-1].startswith(f'{{"{_DIGEST}"')  # not in shards of version 0.2 and older
            digest = json.loads(texts.pop())[_DIGEST] if has_digest else json_digest(texts)
            lines = [json.loads(line) for line in texts]
            intact = (
                digest == json_digest(texts)
                and [(line.pop("prompt_number"), line.pop("sample")) for line in lines] == expected
            )
            answers = [Answer(**line) for line in lines]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            intact = False
        if not intact:
            logger.warning("%s is damaged, so its prompts are answered again", path)
            return None
        return [answers[start : start + self.samples] for start in range(0, len(answers), self.samples)]

    def read(self) -> list[list[Answer]]:
        """Return all answers. Waits for the shards of other ranks; if a rank fails, torchrun ends the others."""
        answers = []
        for shard in range(len(self.shards())):
            while (found := self.read_shard(shard)) is None:
                time.sleep(_WAIT_SECONDS)
            answers += found
        return answers

    def write(self, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
        """Write the file of the answers and its manifest, unless both are there already."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        manifest = {"format": FORMAT, "sha256": hashlib.sha256(data).hexdigest(), **about, "request": self.request}
        if self.path.exists() and self.manifest() == manifest:
            return
        with explained(_UNWRITTEN.format(self.path)):
            self.path.unlink(missing_ok=True)  # the manifest never describes another file
            write_json(self.manifest_path, manifest)
            write_file(self.path, data)
        for path in self.parts.glob(f".*{UNFINISHED}*"):  # temporary files of killed processes
            path.unlink(missing_ok=True)


def parts_of(path: Path) -> Path:
    """Return the folder of the shards of an answer file."""
    return path.with_suffix(".parts")


def read_request(path: Path) -> dict[str, Any] | None:
    """Return what an answer file was asked for, or None if it does not exist yet."""
    saved = parts_of(path) / REQUEST
    if not saved.is_file():
        return None
    found = read_json(saved)
    if found.pop("format", None) != FORMAT:
        raise UserError(f"{saved} is damaged or of another version of dwakd: delete the folder {saved.parent}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the first option that differs, with its values unless they are digests; empty if there is none."""
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name, "unset"), now.get(name, "unset")
        if old != new:
            digests = all(re.fullmatch("[0-9a-f]{16,}", str(value)) for value in (old, new))
            return f"the content of the {name} differs" if digests else f"{name} is {old} there and {new} here"
    return ""
