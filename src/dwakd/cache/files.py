"""Safetensors files that appear whole or not at all and carry the checksum of their content.

The bytes of a file follow from its tensors and metadata alone (the safetensors library orders metadata at random), so
that a header can be compared with the one that should be there.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64, "U8": torch.uint8}
_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_BLOCK = 1 << 22
MISSING = "is missing"
UNFINISHED = ".tmp-"

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with the SHA-256 of its data in the metadata.

    Raises:
        OSError: of the disk; nothing is left behind then.
    """
    data = [tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data for tensor in tensors.values()]
    digest = hashlib.sha256()
    for part in data:
        digest.update(part)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_whole(path, [_header(layout, metadata, digest.hexdigest()), *data])


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file under another name, have it on the disk, then give it its name."""
    unfinished = path.with_name(f".{path.name}{UNFINISHED}{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        try:
            unfinished.replace(path)
        except FileNotFoundError:  # tidied away by another build, which has finished the same file
            if not path.is_file():
                raise
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name has to reach the disk, too
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def fault(path: Path, layout: Layout, metadata: Mapping[str, str]) -> str | None:
    """What is wrong with a file, in words that follow its name; None if every byte is as it was written."""
    if not path.is_file():
        return MISSING
    header = _header(layout, metadata, "0" * 64)
    size, expected = path.stat().st_size, len(header) + sum(map(_num_bytes, layout.values()))
    with path.open("rb") as file:
        start = file.read(len(header))
        if _owner(start) not in (None, metadata["cache"]):
            return "belongs to another cache"
        if size != expected:
            return f"has {size:,} bytes instead of {expected:,}" + (" (cut short)" if size < expected else "")
        digest = hashlib.sha256()
        while block := file.read(_BLOCK):
            digest.update(block)
    if start != _header(layout, metadata, digest.hexdigest()):
        return "is damaged (its content does not match its checksum)"
    return None


def file_digest(path: Path) -> str:
    """SHA-256 of a whole file, header included."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Copies of all the tensors of a file that was found to be whole."""
    content = np.fromfile(path, dtype=np.uint8)
    start, header = _parse(content[: 1 << 20].tobytes())
    del header["__metadata__"]
    tensors = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        tensors[name] = torch.from_numpy(content[begin:end].copy()).view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


class MappedRows:
    """The one matrix of a file, mapped into memory; rows come as bytes."""

    def __init__(self, path: Path, row_bytes: int) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._start = 8 + int.from_bytes(self._map[:8], "little")
        self._row_bytes = row_bytes
        self._bytes: NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)

    def rows(self, first: int, count: int) -> NDArray[np.uint8]:
        """The bytes of some rows, not copied."""
        begin = self._start + first * self._row_bytes
        return self._bytes[begin : begin + count * self._row_bytes]

    def prefetch(self, first: int, count: int) -> None:
        """Have the kernel read some rows ahead, in the background, where it can be told to."""
        if hasattr(mmap, "MADV_WILLNEED"):
            begin = self._start + first * self._row_bytes
            aligned = begin - begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, aligned, begin + count * self._row_bytes - aligned)


def _num_bytes(entry: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = entry
    return dtype.itemsize * math.prod(shape)


def _header(layout: Layout, metadata: Mapping[str, str], checksum: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {**metadata, "sha256": checksum}}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + _num_bytes((dtype, shape))
        header[name] = {"dtype": _WORDS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse(start: bytes) -> tuple[int, dict[str, Any]]:
    end = 8 + int.from_bytes(start[:8], "little")
    return end, json.loads(start[8:end])


def _owner(start: bytes) -> str | None:
    """The cache that a file says it belongs to; None if that cannot be read."""
    try:
        return str(_parse(start)[1]["__metadata__"]["cache"])
    except (ValueError, KeyError, TypeError):
        return None
