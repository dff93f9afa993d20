"""The package's layout, and the build of its C++ extension `dql.kernels._native`.

The folder kernels/ is installed as dql.kernels, never as a top-level module. In a checkout dql/kernels is a link to it,
so that an editable installation needs no more than the checkout on Python's path, which type checkers and editors see,
too. The extension is optional: without a compiler the installation succeeds, and a record beside the extension says in
one sentence what was missing.

    DQL_REQUIRE_NATIVE=1    the build fails if the extension cannot be built
    DQL_NO_NATIVE=1         it is not built
    CXX, CXXFLAGS, LDFLAGS  another compiler, further flags

The CUDA kernels are a second extension, `dql.kernels._cuda`, as optional, built where there is nvcc. csrc/cuda/build.py
does it, and tells of DQL_CUDA_ARCHS, DQL_REQUIRE_CUDA and DQL_NO_CUDA.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def _loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


build_record = _loaded("build_record", ROOT / "kernels" / "build_record.py")
NATIVE, CUDA = build_record.NATIVE, build_record.CUDA

# fmt: off
COMMON = [
    "-std=c++17", "-O3", "-DNDEBUG", "-DPy_LIMITED_API=0x030B0000", "-fPIC", "-pthread", "-Wall", "-Wextra",
    "-fvisibility=hidden", "-ffunction-sections", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # gcc 12 warns of its own AVX-512 headers
]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"]
# fmt: on
VARIANTS: dict[str, list[str]] = {  # the flags of each variant, chosen among at run time
    "avx512bf16": [*_AVX512, "-mavx512bf16"],
    "avx512": _AVX512,
    "avx2": ["-mavx2", "-mfma"],
    "generic": [],
}
assert tuple(VARIANTS) == build_record.VARIANTS
# one instruction of each: an old assembler may lack what the compiler knows
_PROBES = {
    "avx512bf16": "__m512 f(__m512 a, __m512bh b) { return _mm512_dpbf16_ps(a, b, b); }",
    "avx512": "__m512 f(__m512 a) { return _mm512_fmadd_ps(a, a, a); }",
    "avx2": "__m256 f(__m256 a) { return _mm256_fmadd_ps(a, a, a); }",
}


class NotBuilt(Exception):
    """Why there is no extension: the cause, what mends it, and the compiler's output if there is any."""

    def __init__(self, cause: str, remedy: str, log: str = "") -> None:
        super().__init__(cause)
        self.cause, self.remedy, self.log = cause, remedy, log


@dataclass
class Compiler:
    """The C++ compiler: its command and the first line of its --version."""

    command: list[str]
    version: str

    @classmethod
    def find(cls) -> "Compiler":
        """CXX, or the first of g++, clang++ and c++.

        Raises:
            NotBuilt: there is none, or it does not run.
        """
        command = _flags("CXX")
        if not command:
            path = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
            if path is None:
                raise NotBuilt(
                    "no C++ compiler was found when dql was installed",
                    "install one (on Debian or Ubuntu: apt install g++)",
                )
            command = [path]
        status, output = _call([*command, "--version"])
        if status != 0 or not output.strip():
            raise NotBuilt(
                f"the C++ compiler {shlex.join(command)} did not run ({_first_error(output)})",
                "set CXX to another or unset it" if "CXX" in os.environ else "mend or reinstall it",
            )
        return cls(command, output.splitlines()[0].strip())

    def refuses(self, variant: str) -> str | None:
        """None, or why this variant cannot be compiled here."""
        if variant not in _PROBES:
            return None
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return f"this is not an x86-64 machine but {platform.machine()}"
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(f"#include <immintrin.h>\n{_PROBES[variant]}\n")
            status, output = _call(
                [*self.command, *VARIANTS[variant], "-c", str(source), "-o", str(source.with_suffix(".o"))]
            )
        return None if status == 0 else f"{self.version} refuses its flags ({_first_error(output)})"


@dataclass
class Job:
    """One source to compile, for a variant or for all."""

    source: Path
    variant: str | None
    flags: list[str]

    @property
    def name(self) -> str:
        """As the sentences name it."""
        return f"{self.source} ({self.variant})" if self.variant else str(self.source)

    def command(self, compiler: Compiler) -> list[str]:
        """What compiles it, but for the object."""
        return [*compiler.command, *self.flags, *_flags("CXXFLAGS"), "-c", str(self.source)]

    def object(self, compiler: Compiler, folder: Path) -> Path:
        """Where its object belongs, named for all that goes into it: an object that is there is up to date."""
        digest = hashlib.sha256(f"{compiler.version}\0{shlex.join(self.command(compiler))}".encode())
        headers = [path for path in build_record.compiled_files(Path("csrc")) if path.suffix != ".cpp"]
        for path in [self.source, *headers]:
            digest.update(f"{path}\0".encode() + path.read_bytes())
        stem = f"{self.source.stem}-{self.variant}" if self.variant else self.source.stem
        return folder / f"{stem}-{digest.hexdigest()[:16]}.o"


def _flags(name: str) -> list[str]:
    try:
        return shlex.split(os.environ.get(name, ""))
    except ValueError as error:
        raise NotBuilt(f"{name}={os.environ[name]!r} cannot be read ({error})", "mend it") from None


def _call(command: Sequence[str], seconds: float | None = None) -> tuple[int, str]:
    """(exit status, output and errors together); a command that cannot start has status 127, one that hangs 124."""
    try:
        result = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            env=os.environ | {"LC_ALL": "C"},  # the error that we quote is in English, as our sentence is
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return 124, f"it did not end within {seconds:g} s"
    except OSError as error:
        return 127, error.strerror or str(error)
    return result.returncode, result.stdout


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    pick = next((line for line in lines if re.search(r"\berror\b|undefined reference", line, re.I)), None)
    return (pick or (lines[-1] if lines else "it said nothing"))[:300]


class BuildNative(build_ext):
    """Compiles csrc/ with the compiler at hand, one object per source and variant, in parallel."""

    def run(self) -> None:
        """Builds the extensions into build_lib, and into kernels/ for an editable installation; leaves their records.

        Raises:
            CompileError: one could not be built, and DQL_REQUIRE_NATIVE or DQL_REQUIRE_CUDA asks for it.
        """
        native: dict[str, Any] = {"variants": [], "left_out": {}}
        cuda: dict[str, Any] = {"architectures": [], "because": None, "resources": []}
        with ThreadPoolExecutor(2) as pool:  # side by side: each has times when one core alone is busy
            done = [
                pool.submit(self._one, NATIVE, native, "NATIVE", self._build),
                pool.submit(self._one, CUDA, cuda, "CUDA", self._build_cuda),
            ]
        for extension in done:
            extension.result()

    def _one(self, extension: Any, more: dict[str, Any], variable: str, build: Callable[..., None]) -> None:
        started = time.perf_counter()
        facts: dict[str, Any] = {"built": False, "reason": None, "compiler": None} | more
        # before: an edit during the build makes it outdated
        facts["sources"] = build_record.fingerprint(ROOT / "csrc", extension)
        in_place, log, name = bool(self.inplace), "", f"the extension dql.kernels.{extension.name}"
        required, refused = _is_set(f"DQL_REQUIRE_{variable}"), _is_set(f"DQL_NO_{variable}")
        if required and refused:
            raise CompileError(f"DQL_REQUIRE_{variable} and DQL_NO_{variable} contradict each other; unset one")
        target = Path(self.build_lib, "dql", "kernels", extension.file)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if refused:
                raise NotBuilt(f"DQL_NO_{variable} was set when dql was installed", "unset it")
            build(target, facts)
            facts["built"] = True
        except NotBuilt as error:
            facts["reason"] = f"it was not built: {error.cause}; {error.remedy} and {build_record.remedy(in_place)}"
            log = error.log
        except OSError as error:
            facts["reason"] = f"it was not built: {error}; mend that and {build_record.remedy(in_place)}"
        facts["seconds"] = round(time.perf_counter() - started, 1)
        for folder in [target.parent] + ([ROOT / "kernels"] if in_place else []):
            self._leave(extension, target, folder, facts, log)
        if facts["built"]:
            made = ", ".join(facts.get("variants") or [f"sm_{arch}" for arch in facts["architectures"]])
            print(f"dql.kernels.{extension.name}: {made} by {facts['compiler']} in {facts['seconds']} s")
        elif required:
            raise CompileError(f"{name}: {facts['reason']}\n{log}")
        else:
            self.warn(f"{name}: {facts['reason']}\n{log}")

    def _leave(self, extension: Any, built: Path, folder: Path, facts: dict[str, Any], log: str) -> None:
        """Puts the extension and its record into a folder, and takes away what an earlier build left there."""
        file = folder / extension.file
        if not facts["built"]:
            file.unlink(missing_ok=True)  # or it would be imported silently in place of the one that failed
        elif file != built:
            new = file.with_suffix(".new")
            shutil.copy2(built, new)
            new.replace(file)  # a process that runs the old one keeps it
        (folder / extension.record).write_text(json.dumps(facts, indent=2) + "\n")
        if log:
            (folder / extension.log).write_text(log)
        else:
            (folder / extension.log).unlink(missing_ok=True)

    def _objects(self) -> Path:
        # an editable installation gets a temporary build_temp; its objects must outlive it
        kept = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"
        return Path(kept if self.editable_mode else self.build_temp)

    def _workers(self) -> int:
        return self.parallel if isinstance(self.parallel, int) else _cores()

    def _build_cuda(self, target: Path, facts: dict[str, Any]) -> None:
        builder = _cuda_builder()
        include = sysconfig.get_paths()["include"]
        tools = _tools(CUDA, self._workers(), bool(self.force))
        builder.build(tools, include, self._objects() / "cuda", target, facts)

    def _build(self, target: Path, facts: dict[str, Any]) -> None:
        """Compiles and links `target`; fills in compiler, variants and left_out on the way.

        Raises:
            NotBuilt: with what was missing or failed.
        """
        csrc = Path("csrc")  # relative, so that objects do not depend on where the checkout stands
        sources = sorted(path for path in csrc.glob("*.cpp") if path.name != "variant.cpp")
        if not sources:
            raise NotBuilt("the folder csrc/ with its sources is missing", "get the whole of dql")
        compiler = Compiler.find()
        facts["compiler"] = compiler.version
        include = sysconfig.get_paths()["include"]
        if not Path(include, "Python.h").exists():
            package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
            raise NotBuilt(
                f"Python's header Python.h is not in {include}",
                f"install it (on Debian or Ubuntu: apt install {package})",
            )
        temp = self._objects()
        temp.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self._workers()) as pool:
            refusals = dict(zip(VARIANTS, pool.map(compiler.refuses, VARIANTS), strict=True))
            variants = [name for name, refusal in refusals.items() if refusal is None]
            facts["left_out"] = {name: refusal for name, refusal in refusals.items() if refusal is not None}
            have = [f"-DDQL_HAVE_{name.upper()}={int(name in variants)}" for name in VARIANTS if name != "generic"]
            flags = [*COMMON, f"-I{include}", f"-I{csrc}", *have]
            jobs = [  # the variants first: they take the longest
                Job(csrc / "variant.cpp", name, [*flags, "-fno-exceptions", f"-DDQL_VARIANT={name}", *VARIANTS[name]])
                for name in variants
            ]
            jobs += [Job(source, None, flags) for source in sources]
            objects = [job.object(compiler, temp) for job in jobs]
            failed = threading.Event()
            errors = list(pool.map(lambda job, made: self._compile(compiler, job, made, failed), jobs, objects))
        for job, output in zip(jobs, errors, strict=True):
            if output is not None:
                raise _failed(compiler.version, job.name, output, "\n".join(filter(None, errors)))
        for path in {*temp.glob("*.o")} - {*objects}:
            path.unlink(missing_ok=True)
        self._link(compiler, objects, target, temp)
        facts["variants"] = variants

    def _compile(self, compiler: Compiler, job: Job, made: Path, failed: threading.Event) -> str | None:
        """Makes the job's object; None, or the compiler's output if that failed."""
        if (made.exists() and not self.force) or failed.is_set():  # one error is enough to read
            return None
        unfinished = made.with_suffix(f".{os.getpid()}.tmp")  # of no other build in the same folder
        command = [*job.command(compiler), "-o", str(unfinished)]
        status, output = _call(command)
        if status != 0:
            failed.set()
            return f"+ {shlex.join(command)}\n{output}"
        if output.strip():
            print(output)  # warnings
        unfinished.replace(made)
        return None

    def _link(self, compiler: Compiler, objects: list[Path], target: Path, temp: Path) -> None:
        """Links with the C++ library inside, so that an older one in the user's environment does not matter.

        Raises:
            NotBuilt: linking failed, or what it made cannot be imported.
        """
        script = temp / "exports.map"
        script.write_text("{ global: PyInit__native; local: *; };\n")  # the C++ library's own symbols stay inside too
        new = temp / target.name
        command = [*compiler.command, "-shared", "-pthread", *map(str, objects), "-o", str(new)]
        command += [f"-Wl,--version-script={script}", "-Wl,--gc-sections"]
        command += [*_flags("CXXFLAGS"), *_flags("LDFLAGS")]
        status, output = _call([*command, "-static-libstdc++", "-static-libgcc"])
        if status != 0:  # a system without the static libraries
            status, output = _call(command)
        if status != 0:
            raise _failed(compiler.version, "the extension's link", output, f"+ {shlex.join(command)}\n{output}")
        _check_import(new, NATIVE.name, compiler.version, NATIVE)
        new.replace(target)

    def get_outputs(self) -> list[str]:
        """The files in build_lib, those that are there."""
        folder = Path(self.build_lib, "dql", "kernels")
        names = [name for one in (NATIVE, CUDA) for name in (one.file, one.record, one.log)]
        return [str(folder / name) for name in names if (folder / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Where each file in build_lib comes from in the checkout, for an editable installation."""
        if not self.inplace:
            return {}
        return {path: str(Path("kernels", Path(path).name)) for path in self.get_outputs()}


def _failed(version: str, where: str, output: str, log: str, extension: Any = NATIVE) -> NotBuilt:
    return NotBuilt(
        f"{version} failed on {where} with: {_first_error(output)}",
        f"mend that (its whole output is in {extension.log} beside {extension.record})",
        log,
    )


def _check_import(path: Path, name: str, version: str, extension: Any) -> None:
    """A symbol that nobody defines shows only when the extension is loaded.

    Raises:
        NotBuilt: Python cannot load it.
    """
    code = "import importlib.util as u, sys; s = u.spec_from_file_location(sys.argv[2], sys.argv[1]); "
    code += "s.loader.exec_module(u.module_from_spec(s))"
    status, output = _call([sys.executable, "-c", code, str(path.resolve()), name])
    if status != 0:
        raise _failed(version, "the extension, which Python cannot load", output, output, extension)


def _cuda_builder() -> ModuleType:
    path = ROOT / "csrc" / "cuda" / "build.py"
    if not path.exists():
        raise NotBuilt("the folder csrc/cuda with its sources is missing", "get the whole of dql")
    return _loaded("dql_cuda_build", path)


def _tools(extension: Any, workers: int, force: bool = False) -> SimpleNamespace:
    """What csrc/cuda/build.py needs of this file."""
    return SimpleNamespace(
        NotBuilt=NotBuilt,
        Compiler=Compiler,
        call=_call,
        first_error=_first_error,
        flags=_flags,
        workers=workers,
        force=force,
        failed=lambda version, where, output, log: _failed(version, where, output, log, extension),
        check_import=lambda path, name, compiler: _check_import(path, name, compiler.version, extension),
    )


class EditableWheel(editable_wheel):
    """An editable installation as a path entry where the link dql/kernels is there; setuptools' own way is an import
    hook, which type checkers do not see and which a folder called dql in the working folder hides."""

    def finalize_options(self) -> None:
        """Lays the packages out as the checkout has them."""
        if (ROOT / "dql" / "kernels" / "__init__.py").is_file():
            self.distribution.package_dir = {"": "."}
        super().finalize_options()


class BuildCudaEmulator(Command):
    """For tests: the CUDA kernels for this machine's CPU, `dql.kernels._cuda_emulated`, into kernels/."""

    description = "compile the CUDA kernels with the C++ compiler, on the emulator, for tests"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        """There are none."""

    def finalize_options(self) -> None:
        """There are none."""

    def run(self) -> None:
        """Builds it in place.

        Raises:
            CompileError: it could not be built.
        """
        extension = build_record.Extension("_cuda_emulated")
        temp = Path(f"build/emulator.{sys.implementation.cache_tag}")
        try:
            builder = _cuda_builder()
            builder.build_emulated(
                _tools(extension, _cores()), sysconfig.get_paths()["include"], temp, Path("kernels", extension.file)
            )
        except NotBuilt as error:
            print(error.log)
            remedy = "its whole output is above" if error.log else error.remedy
            raise CompileError(f"the emulated CUDA kernels were not built: {error.cause}; {remedy}") from None


def _is_set(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


version = re.search(r'^__version__ = "(.+)"$', (ROOT / "dql" / "__init__.py").read_text(), re.M)
assert version is not None, "dql/__init__.py states no __version__"

# one wheel for CPython 3.11 and later; free-threaded ones have no limited API
limited = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp311"}}

# those of the folder kernels/ are dql.kernels
PACKAGES = ["dql", *(f"dql.{name}" for name in ("backend", "behaviours", "collect", "datasets", "kernels"))]
PACKAGES += [f"dql.kernels.{name}" for name in ("cpp", "cuda", "triton")]

setup(
    version=version[1],
    packages=PACKAGES,
    package_dir={"dql": "dql", "dql.kernels": "kernels"},
    package_data={"dql": ["py.typed"], "dql.behaviours": ["*.npz", "*.md"]},
    ext_modules=[
        Extension(
            "dql.kernels._native",
            sources=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("*.cpp"))],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "editable_wheel": EditableWheel, "build_cuda_emulator": BuildCudaEmulator},
    options=limited,
)
