"""The machine that a report was made on: hardware, versions, and the sources it was made of."""

import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
SOURCES = ("dql", "kernels", "csrc", "bench", "tests", "setup.py", "pyproject.toml")
# Variables that change times.
ENVIRONMENT = ("DQL_", "OMP_", "MKL_", "KMP_", "GOMP_", "TORCH", "CUDA_", "TRITON_", "XLA_", "JAX_")
SUFFIXES = (".py", ".sh", ".toml", ".h", ".cpp", ".cu", ".npz")


def machine(device: torch.device, timer: object) -> dict[str, Any]:
    """Date, command, commit, hardware and versions."""
    extensions = _extensions()
    commit = _output("git", "rev-parse", "HEAD")
    changed = changed_sources()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "commit": commit,
        "sources_sha256": sources_sha256(),
        "uncommitted_changes": None if changed is None else bool(changed),
        "changed_sources": changed,
        "device": device.type,
        "device_name": device_name(device),
        "gpu": _gpu(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.type == "cuda"
        else None,
        "cpu": _cpu_name(),
        "cpu_features": _cpu_features(),
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
        "jax": _version("jax"),
    }


def command() -> str:
    """This process's command line, to be pasted into a shell, after the variables that change what it measures."""
    values = [f"{name}={shlex.quote(os.environ[name])}" for name in sorted(os.environ) if name.startswith(ENVIRONMENT)]
    return " ".join([*values, shlex.join(["python", *sys.orig_argv[1:]])])


def changed_sources() -> list[str] | None:
    """Sources that are not as the commit has them; None where there is no git. Reports are none: one may follow one."""
    said = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", *SOURCES, ":(exclude)bench/results")
    return None if said is None else [line[2:].strip() for line in said.splitlines()]


def provenance(report: dict[str, Any]) -> str:
    """Where a report's numbers come from, in a sentence or two; what is wrong with that in capitals."""
    commit = report.get("commit")
    parts = [
        f"{report.get('device_name') or report.get('cpu')}, {report.get('threads')} thread(s), "
        f"torch {report.get('torch')}, {str(report.get('date'))[:10]}, "
        + (f"commit {commit[:10]}" if commit else f"no commit, sources {str(report.get('sources_sha256'))[:10]}")
    ]
    if report.get("uncommitted_changes"):
        files = report.get("changed_sources")
        what = (
            f"{len(files)} changed file(s): {', '.join(files[:3])}{' ...' if len(files) > 3 else ''}" if files else "?"
        )
        parts.append(f"NOT OF THAT COMMIT: measured with uncommitted changes ({what})")
    command = report.get("command")
    parts.append(f"`{command}`" if command else "ITS COMMAND WAS NOT RECORDED")
    return ". ".join(parts)


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
        from dql.kernels import build_record
        from dql.kernels.cpp import binding
    except ImportError:
        return {}
    facts = build_record.record(build_record.CUDA)
    return {
        "native_variant": None if binding.unavailable() else binding.in_use(),
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


def _cpu_features() -> list[str]:
    """Of the vector units, which a virtual machine's model name may say nothing of."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return [name for name in ("fma", "avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    print(sources_sha256())
