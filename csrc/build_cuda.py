"""How the CUDA kernels of csrc/cuda/ are compiled: by nvcc into `dql.kernels._cuda`; for tests by a C++ compiler, with
the emulator, into `dql.kernels._cuda_emulated`.

    CUDA_HOME           where nvcc is, if not on the PATH or in /usr/local/cuda
    DQL_CUDA_ARCHS      compute capabilities; by default that of the GPU here, "80;90" where there is none. PTX of the
                        highest is added for newer GPUs
    DQL_REQUIRE_CUDA=1  the build fails if they cannot be built
    DQL_NO_CUDA=1       they are not built
"""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import build_record
from build_record import NotBuilt
from build_tools import Compiler, Facts, Job, Workshop, call, first_error, flags, python_header

ARCHITECTURES = ("80", "86", "87", "88", "89", "90", "100", "103", "110", "120", "121")
DEFAULT = "80;90"
HERE = Path("csrc/cuda")  # relative, so that objects do not depend on where the checkout stands
HOPPER_ONLY = ("chain_wide",)  # sources whose instructions compute capability 9.0 has alone: compiled as 90a
SMI_SECONDS = 15.0  # after which nvidia-smi hangs, as it does on a broken driver
LONGEST = ("chain_tf32", "chain_bf16", "chain_fp32", "gradients")  # first, so that all cores are busy to the end
_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Icsrc", "-Icsrc/cuda"]
_HOST = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-missing-field-initializers"]
_NVCC = ["-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "1"]


@dataclass
class Nvcc:
    """The CUDA compiler: its path, its version and the folder of its static runtime."""

    path: str
    version: str
    libraries: Path

    @classmethod
    def find(cls) -> "Nvcc":
        """Of CUDA_HOME or CUDA_PATH, else of the PATH, else of /usr/local/cuda.

        Raises:
            NotBuilt: there is none, or it does not run, or it has no static runtime.
        """
        told = next((name for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)), None)
        home = os.environ[told] if told else None
        places = (
            [Path(home, "bin", "nvcc")]
            if home
            else [Path(shutil.which("nvcc") or ""), Path("/usr/local/cuda/bin/nvcc")]
        )
        path = next((str(place) for place in places if place.is_file()), None)
        if path is None:
            where = f"in {home}/bin, which {told} names," if home else ""
            raise NotBuilt(
                " ".join(f"nvcc was not found {where} when dql was installed".split()),
                f"install the CUDA toolkit, or set {told or 'CUDA_HOME'} to where it is,",
            )
        status, output = call([path, "--version"])
        release = re.search(r"release ([\d.]+), V([\d.]+)", output)
        if status != 0 or release is None:
            raise NotBuilt(f"{path} did not run ({first_error(output)})", "mend the CUDA toolkit")
        _, told = call([path, "--dryrun", "-x", "cu", "/dev/null", "-o", "/dev/null"])
        top = next((line.partition("=")[2].strip() for line in told.splitlines() if " TOP=" in line), "")
        roots = [Path(top or Path(path).parent.parent), Path(path).resolve().parent.parent]
        folders = [
            root / part
            for root in roots
            for part in ("targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib64", "lib")
        ]
        libraries = next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)
        if libraries is None:
            raise NotBuilt(
                f"the CUDA toolkit of {path} has no libcudart_static.a", "install the toolkit's development files"
            )
        return cls(path, f"nvcc {release[2]}", libraries)


def architectures() -> tuple[list[str], str]:
    """(the compute capabilities to compile for, the lowest first; why these).

    Raises:
        NotBuilt: DQL_CUDA_ARCHS names one that there is not.
    """
    told = os.environ.get("DQL_CUDA_ARCHS")
    if not told:
        found = of_gpus()
        return (found, "for the GPU here") if found else (DEFAULT.split(";"), "no GPU was found")
    names = [name for name in re.split(r"[;,\s]+", told.strip()) if name]
    unknown = next((name for name in names if name not in ARCHITECTURES), None)
    if unknown is not None or not names:
        named = "nothing" if unknown is None else repr(unknown)
        raise NotBuilt(
            f"DQL_CUDA_ARCHS={told!r} names {named}; known are {', '.join(ARCHITECTURES)}",
            f"set it to some of these, such as {DEFAULT!r},",
        )
    return sorted(set(names), key=int), "DQL_CUDA_ARCHS"


def of_gpus() -> list[str]:
    """What to compile for the GPUs of this machine, as the driver's nvidia-smi tells them; nothing where it tells none.

    A GPU that is newer than all that we know gets the highest that we know, whose PTX it compiles itself.
    """
    status, output = call(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], SMI_SECONDS)
    told = re.findall(r"^\s*(\d+)\.(\d)\s*$", output, re.MULTILINE) if status == 0 else []
    capabilities = {10 * int(major) + int(minor) for major, minor in told}
    names = {max((n for n in ARCHITECTURES if int(n) <= c), key=int, default="") for c in capabilities if c >= 80}
    return sorted(filter(None, names), key=int)


def generate_code(source: Path, names: Sequence[str]) -> list[str]:
    """nvcc's options for the machine code and PTX that a source is compiled to."""
    if source.stem in HOPPER_ONLY:  # whatever the names: the host's part of it is called in any case
        return ["-gencode=arch=compute_90a,code=sm_90a"]
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*codes, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


def sources(emulated: bool) -> list[Path]:
    """What is compiled: kernels, module and, in place of a GPU, the emulator."""
    emulator = [HERE / "emulator" / "emulator.cpp"] if emulated else []
    return [*sorted(HERE.glob("*.cu")), HERE / "module.cpp", *emulator]


def build(shop: Workshop, target: Path, facts: Facts) -> None:
    """Compiles and links `target` with nvcc; fills in compiler, architectures and resources.

    Raises:
        NotBuilt: with what was missing or failed.
    """
    if not sources(False)[:-1]:
        raise NotBuilt("the folder csrc/cuda with its sources is missing", "get the whole of dql")
    compiler, nvcc = Compiler.find(), Nvcc.find()
    facts["compiler"] = nvcc.version
    names, facts["because"] = architectures()
    facts["architectures"] = names
    host = ["-ccbin", _program(compiler.command)] if "CXX" in os.environ else []
    jobs = []
    for source in sources(False):
        if source.suffix == ".cu":
            command, version = [nvcc.path, *_FLAGS, *_NVCC, *host, *generate_code(source, names)], nvcc.version
        else:
            command, version = _module_command(compiler), compiler.version
        jobs.append(Job(source, command, version, str(source), source.stem, shows=False))
    jobs.sort(key=lambda job: LONGEST.index(job.stem) if job.stem in LONGEST else len(LONGEST))
    objects = shop.compile(jobs, _headers())
    facts["resources"] = [row for made in objects for row in resources(made.with_suffix(".txt").read_text())]
    shop.link(compiler, objects, [f"-L{nvcc.libraries}", "-lcudart_static", "-lrt", "-ldl"], target)


def build_emulated(shop: Workshop, target: Path) -> None:
    """Compiles and links the same kernels with the C++ compiler, on the emulator.

    Raises:
        NotBuilt: with what was missing or failed.
    """
    compiler = Compiler.find()
    command = [*_module_command(compiler), "-DDQL_EMULATED", "-O2", "-x", "c++"]
    jobs = [Job(source, command, compiler.version, str(source), source.stem, shows=False) for source in sources(True)]
    shop.link(compiler, shop.compile(jobs, _headers()), [], target)


def _headers() -> list[Path]:
    return [path for path in build_record.compiled_files(Path("csrc"), build_record.CUDA) if path.suffix == ".h"]


def _program(command: Sequence[str]) -> str:
    """Of CXX, "ccache g++ -m64" say, what nvcc calls: the compiler without a launcher or flags."""
    return [word for word in command if not word.startswith("-")][-1]


def _module_command(compiler: Compiler) -> list[str]:
    own = [*_FLAGS, *_HOST, "-DPy_LIMITED_API=0x030B0000", *python_header()]
    return [*compiler.command, *own, *flags("CXXFLAGS")]


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def resources(output: str) -> list[dict[str, Any]]:
    """What ptxas said of each kernel and arch: registers, stack, spill_stores, spill_loads, shared (bytes).

    Shared memory that is asked for at launch is not in it.
    """
    rows: list[dict[str, Any]] = []
    for line in output.splitlines():
        if entry := _ENTRY.search(line):
            rows.append({"kernel": entry[1], "arch": entry[2]})
        elif rows and (spills := _SPILLS.search(line)) and "stack" not in rows[-1]:
            rows[-1] |= {"stack": int(spills[1]), "spill_stores": int(spills[2]), "spill_loads": int(spills[3])}
        elif rows and (used := _USED.search(line)) and "registers" not in rows[-1]:
            rows[-1] |= {"registers": int(used[1]), "shared": int(used[2] or 0)}
    plain = readable([row["kernel"] for row in rows])
    return [row | {"kernel": plain[row["kernel"]]} for row in rows]


_PRECISIONS = ("fp32", "tf32", "bf16")  # of shapes.h
_FIRST_LAYERS = ("", " with the states' part", " with the states' part, floats from L2")  # of block_memory.h


def readable(mangled: Sequence[str]) -> dict[str, str]:
    """Kernels' names as one reads them: "chain bf16 m2 resident backward", "wide_chain 256", "solo_chain 256
    of 8 rows saving", "prologue"."""
    names = {}
    for name in mangled:
        base = re.search(r"device(\d+)(\w+)", name)
        short = base[2][: int(base[1])].removesuffix("_kernel") if base else name
        if chain := re.search(r"9PrecisionE(\d)ELi(\d)ELb(\d)ELb(\d)", name):
            parts = [short, _PRECISIONS[int(chain[1])], f"m{chain[2]}", "resident" if chain[3] == "1" else "streamed"]
            short = " ".join([*parts, "backward" if chain[4] == "1" else "forward"])
        elif solo := re.search(r"ILi(\d+)ELi(\d+)ELNS\w*4SoloE(\d)E", name):
            short = f"{short} {solo[1]} of {solo[2]} rows {('forward', 'saving', 'backward')[int(solo[3])]}"
        elif wide := re.search(r"ILi(\d+)ELNS\w*10FirstLayerE(\d)", name):
            short = f"{short} {wide[1]}{_FIRST_LAYERS[int(wide[2])]}"
        names[name] = short
    return names
