"""What both extensions' builds share: the C++ compiler, one object a source, the link.

setup.py loads these files by their paths: they import nothing but the standard library and each other. Objects are
named for all that goes into them, so one that is there is up to date.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_record import Extension, NotBuilt

LINKED = ["-Wl,--gc-sections", "-shared", "-pthread"]


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
        command = flags("CXX")
        if not command:
            path = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
            if path is None:
                raise NotBuilt(
                    "no C++ compiler was found when dql was installed",
                    "install one (on Debian or Ubuntu: apt install g++)",
                )
            command = [path]
        status, output = call([*command, "--version"])
        if status != 0 or not output.strip():
            raise NotBuilt(
                f"the C++ compiler {shlex.join(command)} did not run ({first_error(output)})",
                "set CXX to another or unset it" if "CXX" in os.environ else "mend or reinstall it",
            )
        return cls(command, output.splitlines()[0].strip())


@dataclass
class Job:
    """One source to compile.

    Attributes:
        command: what compiles it, but for -c, source and object.
        version: of the compiler.
        name: as the sentences name it.
        stem: what its object is called, before the digest.
        shows: whether what the compiler says of a source that it compiles, its warnings, is printed.
    """

    source: Path
    command: list[str]
    version: str
    name: str
    stem: str
    shows: bool = True

    def object(self, folder: Path, headers: bytes) -> Path:
        """Where its object belongs."""
        told = f"{self.version}\0{shlex.join(self.command)}\0{self.source}\0".encode()
        digest = hashlib.sha256(told + self.source.read_bytes() + headers).hexdigest()
        return folder / f"{self.stem}-{digest[:16]}.o"


@dataclass
class Workshop:
    """Where and how an extension is compiled.

    Attributes:
        extension: which.
        temp: the folder of its objects, for nothing else.
        workers: compilers at a time.
        force: objects that are there are made anew.
    """

    extension: Extension
    temp: Path
    workers: int
    force: bool = False

    def compile(self, jobs: Sequence[Job], headers: Sequence[Path]) -> list[Path]:
        """One object a job, those in parallel that are not there; what a compiler said lies beside its object as .txt.

        Args:
            headers: what any of the sources may include.

        Raises:
            NotBuilt: a compiler failed.
        """
        self.temp.mkdir(parents=True, exist_ok=True)
        included = b"".join(f"{path}\0".encode() + path.read_bytes() for path in headers)
        made = [job.object(self.temp, included) for job in jobs]
        failed = threading.Event()

        def one(job: Job, target: Path) -> str | None:
            there = target.exists() and target.with_suffix(".txt").exists() and not self.force
            if there or failed.is_set():  # one error is enough to read
                return None
            unfinished = target.with_suffix(f".{os.getpid()}.tmp")  # of no other build in the same folder
            command = [*job.command, "-c", str(job.source), "-o", str(unfinished)]
            status, output = call(command)
            if status != 0:
                failed.set()
                return f"+ {shlex.join(command)}\n{output}"
            if job.shows and output.strip():
                print(output)
            target.with_suffix(".txt").write_text(output)
            unfinished.replace(target)
            return None

        with ThreadPoolExecutor(self.workers) as pool:
            errors = list(pool.map(one, jobs, made))
        for job, output in zip(jobs, errors, strict=True):
            if output is not None:
                raise self.failed(job.version, job.name, output, "\n".join(filter(None, errors)))
        kept = {path.with_suffix(suffix) for path in made for suffix in (".o", ".txt")}
        for path in {*self.temp.glob("*.o"), *self.temp.glob("*.txt")} - kept:
            path.unlink(missing_ok=True)
        return made

    def link(self, compiler: Compiler, objects: Sequence[Path], libraries: Sequence[str], target: Path) -> None:
        """Links with the C++ library inside, so that an older one in the user's environment does not matter.

        Raises:
            NotBuilt: linking failed, or what it made cannot be imported.
        """
        script = self.temp / "exports.map"  # the C++ library's own symbols stay inside too
        script.write_text(f"{{ global: PyInit_{self.extension.name}; local: *; }};\n")
        new = self.temp / f"{os.getpid()}-{target.name}"  # tests of several processes may build at a time
        command = [*compiler.command, *LINKED, f"-Wl,--version-script={script}", *map(str, objects), *libraries]
        command += ["-o", str(new), *flags("CXXFLAGS"), *flags("LDFLAGS")]
        status, output = call([*command, "-static-libstdc++", "-static-libgcc"])
        if status != 0:  # a system without the static libraries
            status, output = call(command)
        if status != 0:
            log = f"+ {shlex.join(command)}\n{output}"
            raise self.failed(compiler.version, f"the link of {self.extension.name}", output, log)
        self._check_import(new, compiler)
        target.parent.mkdir(parents=True, exist_ok=True)
        new.replace(target)

    def _check_import(self, path: Path, compiler: Compiler) -> None:
        """A symbol that nobody defines shows only when the extension is loaded."""
        code = "import importlib.util as u, sys; s = u.spec_from_file_location(sys.argv[2], sys.argv[1]); "
        code += "s.loader.exec_module(u.module_from_spec(s))"
        status, output = call([sys.executable, "-c", code, str(path.resolve()), self.extension.name])
        if status != 0:
            raise self.failed(compiler.version, "the extension, which Python cannot load", output, output)

    def failed(self, version: str, where: str, output: str, log: str) -> NotBuilt:
        """What a compiler's failure is in a sentence."""
        return NotBuilt(
            f"{version} failed on {where} with: {first_error(output)}",
            f"mend that (its whole output is in {self.extension.log} beside {self.extension.record})",
            log,
        )


def python_header() -> list[str]:
    """The option by which a compiler finds Python.h.

    Raises:
        NotBuilt: it is not there.
    """
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").exists():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        raise NotBuilt(
            f"Python's header Python.h is not in {include}",
            f"install it (on Debian or Ubuntu: apt install {package})",
        )
    return [f"-I{include}"]


def flags(name: str) -> list[str]:
    """The words of an environment variable.

    Raises:
        NotBuilt: its quotes do not match.
    """
    try:
        return shlex.split(os.environ.get(name, ""))
    except ValueError as error:
        raise NotBuilt(f"{name}={os.environ[name]!r} cannot be read ({error})", "mend it") from None


def call(command: Sequence[str], seconds: float | None = None) -> tuple[int, str]:
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


def first_error(output: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    pick = next((line for line in lines if re.search(r"\berror\b|undefined reference", line, re.I)), None)
    return (pick or (lines[-1] if lines else "it said nothing"))[:300]


Facts = dict[str, Any]
"""What a build's record says, see `build_record.record`."""
