"""The machine that a report was made on: hardware, versions, and the sources it was made of."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
SOURCES = ("dql", "kernels", "csrc", "bench", "tests", "setup.py", "pyproject.toml")
SUFFIXES = (".py", ".sh", ".toml", ".h", ".cpp", ".cu", ".npz")


def machine(device: torch.device, timer: object) -> dict[str, Any]:
    """Date, commit, hardware and versions."""
    extensions = _extensions()
    commit = _output("git", "rev-parse", "HEAD")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "sources_sha256": sources_sha256(),
        "uncommitted_changes": None if commit is None else bool(_output("git", "status", "--porcelain")),
        "device": device.type,
        "device_name": device_name(device),
        "gpu": _gpu(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.type == "cuda"
        else None,
        "cpu": _cpu_name(),
        "cpu_family_model_stepping": _cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native_variant": extensions.get("native_variant"),
        "timer": str(timer),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cuda_extension": extensions.get("cuda_extension"),
        "numpy": np.__version__,
        "onnxruntime": _version("onnxruntime"),
        "openvino": _version("openvino"),
    }


def sources_sha256() -> str:
    """Of names and contents of the sources: it tells what ran where there is no git, or with changes not committed.

    `python bench/machine.py` prints it for a checkout.
    """
    digest = hashlib.sha256()
    for top in SOURCES:
        path = ROOT / top
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in SUFFIXES and file.is_file():
                digest.update(f"{file.relative_to(ROOT).as_posix()}\0{file.stat().st_size}\0".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _extensions() -> dict[str, Any]:
    """The CPU kernels' variant, what compiled the CUDA kernels and for which GPUs; nothing where dql is not there."""
    try:
        from dql.kernels import native, native_build
    except ImportError:
        return {}
    facts = native_build.record(native_build.CUDA)
    return {
        "native_variant": None if native.unavailable() else native.in_use(),
        "cuda_extension": {key: facts[key] for key in ("compiler", "architectures")}
        if facts and facts["built"]
        else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_model() -> list[str] | None:
    """The three numbers, which a virtual machine tells where it hides the name."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()]
    except OSError:
        return None
    told = {key.strip(): value.strip() for key, _, value in lines}
    numbers = [told.get(key) for key in ("cpu family", "model", "stepping")]
    return None if None in numbers else [str(number) for number in numbers]


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    print(sources_sha256())
