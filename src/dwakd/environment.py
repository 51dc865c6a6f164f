"""The versions and hardware that a bug report needs: what `dwakd env` prints."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    *("dwakd", "torch", "transformers", "tokenizers", "peft", "accelerate", "datasets"),
    *("huggingface_hub", "safetensors", "numpy", "numba", "triton"),
)


def version_of(package: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def describe_environment() -> str:
    """Describe packages, Python, platform and devices, one Markdown list item per line.

    Versions are read from the packages' metadata. Only torch is imported, to list the GPUs; if that fails, the line
    says why.
    """
    lines = {package: version_of(package) for package in PACKAGES}
    lines |= {"Python": platform.python_version(), **hardware()}
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def hardware() -> dict[str, str]:
    """Return the platform and the names of the processor and the GPUs."""
    return {"platform": platform.platform(), "CPU": _cpu(), "GPU": _gpus()}


def _cpu() -> str:
    """Return the name of the processor, or its architecture if the system does not provide the name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(found), "") or platform.processor() or platform.machine()


def _gpus() -> str:
    try:
        import torch
    except Exception as error:  # many bug reports are about a broken installation
        return f"unknown, because torch could not be imported ({type(error).__name__}: {error})"
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = [f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices]
        return f"{', '.join(names)}; CUDA {torch.version.cuda or torch.version.hip}"
    return "Apple MPS" if torch.backends.mps.is_available() else "none"


def supports_bfloat16(*, use_cpu: bool) -> bool:
    """Return whether models run on a device with bfloat16, which then is the default for teachers and for training."""
    from transformers.utils import is_torch_bf16_gpu_available

    return not use_cpu and bool(is_torch_bf16_gpu_available())


def widest_float(device: Any) -> Any:
    """Return the dtype float64, or float32 on Apple's GPUs, which have no float64."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def global_rank() -> int:
    """Return the rank of this process among all processes of torchrun; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))
