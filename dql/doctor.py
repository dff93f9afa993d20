"""`dql doctor`: what this installation is made of and what each backend says."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from dql import __version__
from dql.backend.registry import backends
from dql.kernels import build_record

_PACKAGES = ("torch", "numpy", "gymnasium", "minari", "h5py", "safetensors", "mujoco", "gymnasium-robotics", "triton")
_CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")


def examine() -> dict[str, Any]:
    """Versions, hardware, compilers, extension, folders, each backend with None or its reason; plain JSON values."""
    return {
        "dql": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        # torch itself tells its build (+cpu, +cu130), its metadata may not
        "packages": {name: _version(name) for name in _PACKAGES} | {"torch": torch.__version__},
        "cpu": _cpu(),
        "gpu": _gpu(),
        "compilers": {name: _compiler(name) for name in ("g++", "nvcc")},
        "extension": _extension(),
        "cuda_extension": _cuda_extension(),
        "folders": _folders(),
        "backends": backends(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    name, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            if key.strip() == "flags":
                flags = set(value.split())
                break
    return {
        "name": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "features": [flag for flag in _CPU_FLAGS if flag in flags],
    }


def _gpu() -> dict[str, Any]:
    if torch.version.cuda is None:
        return {
            "devices": [],
            "reason": f"torch {torch.__version__} is a build without CUDA; install one with it",
        }
    if not torch.cuda.is_available():
        return {"devices": [], "reason": "torch sees no CUDA device; check the driver with nvidia-smi"}
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    devices = [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)}
        for p in properties
    ]
    return {"devices": devices, "cuda": torch.version.cuda}


def _compiler(name: str) -> str | None:
    path = shutil.which(name)
    if path is None:
        return None
    try:
        lines = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return path
    return next((line for line in reversed(lines) if "release" in line), lines[0] if lines else path)


def _extension() -> dict[str, Any]:
    """How `dql.kernels._native` was built, why it cannot be used (or None), and which of its variants this CPU runs."""
    record = build_record.record() or {}
    keys = ("compiler", "seconds", "variants", "left_out")
    facts = {key: record.get(key) for key in keys} | {"built": False, "reason": None, "outdated": None, "runs": {}}
    try:
        importlib.import_module("dql.kernels._native")
        native = importlib.import_module("dql.kernels.cpp.binding")
    except ImportError as error:
        return facts | {"reason": build_record.reason(error)}
    return facts | {"built": True, "outdated": build_record.outdated(), "runs": dict(native.variants())}


def extension_rows(facts: dict[str, Any]) -> dict[str, str]:
    """`examine()["extension"]` as lines of a table: title -> text."""
    if not facts["built"]:
        return {"extension": facts["reason"]}
    rows = {"extension": _built_by(facts) + _but(facts)}
    used = next((name for name in build_record.VARIANTS if facts["runs"].get(name, "absent") is None), None)
    for name in build_record.VARIANTS:
        left_out = (facts["left_out"] or {}).get(name)
        reason = f"it was not built: {left_out}" if left_out else facts["runs"].get(name, "it was not built")
        rows[f"variant {name}"] = "used" if name == used else "available" if reason is None else reason
    return rows


def _cuda_extension() -> dict[str, Any]:
    """How `dql.kernels._cuda` was built, and why it cannot be loaded (or None); the backend tells of GPUs."""
    record = build_record.record(build_record.CUDA) or {}
    keys = ("compiler", "seconds", "architectures", "because")
    facts = {key: record.get(key) for key in keys} | {"built": False, "reason": None, "outdated": None}
    try:
        importlib.import_module("dql.kernels._cuda")
    except ImportError as error:
        return facts | {"reason": build_record.reason(error, build_record.CUDA)}
    return facts | {"built": True, "outdated": build_record.outdated(build_record.CUDA)}


def cuda_extension_rows(facts: dict[str, Any]) -> dict[str, str]:
    """`examine()["cuda_extension"]` as a line of a table: title -> text."""
    if not facts["built"]:
        return {"cuda extension": facts["reason"]}
    names = ", ".join(f"sm_{name}" for name in facts["architectures"] or [])
    why = f" ({facts['because']})" if facts.get("because") else ""
    return {"cuda extension": _built_by(facts) + (f" for {names}{why}" if names else "") + _but(facts)}


def _built_by(facts: dict[str, Any]) -> str:
    seconds = f" in {facts['seconds']} s" if facts["seconds"] is not None else ""
    return f"built by {facts['compiler'] or 'an unknown compiler'}{seconds}"


def _but(facts: dict[str, Any]) -> str:
    return f", but {facts['outdated']}" if facts["outdated"] else ""


def _folders() -> dict[str, str]:
    from dql.datasets.cache import cache_dir
    from dql.datasets.sources import datasets_root

    found = {}
    for name, folder in {"datasets": datasets_root, "cache": cache_dir}.items():
        try:
            found[name] = str(folder())
        except ValueError as error:  # no home folder
            found[name] = str(error)
    return found
