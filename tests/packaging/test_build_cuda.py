"""The build of `dql.kernels._cuda` (csrc/build_cuda.py): what a missing or failing nvcc leaves, what it is told, what a
good one makes; and the sentences for a GPU that cannot be used. A small csrc/cuda of our own stands in for the real
one, and a script for nvcc, wherever only the build's behaviour is in question."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import TESTS
from support.build import ROOT, Project, clean_environment, compiler, load, needs_compiler, symbols

from dql.backend.registry import registry
from dql.doctor import cuda_extension_rows
from dql.kernels import build_record
from dql.kernels.cuda import binding

NVCC = next(filter(None, (shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin"))), None)
needs_nvcc = pytest.mark.skipif(
    NVCC is None or compiler() is None, reason="no nvcc was found; install the CUDA toolkit"
)
MODULE = r"""
#include "../arguments.h"
#include "answer.h"
#if defined(DQL_EMULATED)
#define DQL_INIT PyInit__cuda_emulated
#else
#define DQL_INIT PyInit__cuda
#endif
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(dql_answer()); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr,
                                 nullptr};
PyMODINIT_FUNC DQL_INIT() { return PyModule_Create(&definition); }
"""
NATIVE_MODULE = r"""
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                                 nullptr};
PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
"""
KERNEL = r"""
#include "answer.h"
#if defined(__CUDACC__)
namespace dql { namespace device {
__global__ void twice_kernel(int* at) {
    __shared__ int all[32];
    all[threadIdx.x] = at[threadIdx.x];
    __syncthreads();
    at[threadIdx.x] = 2 * all[31 - threadIdx.x];
}
} }
#endif
int dql_answer() { return ANSWER; }
"""
HEADER = "#pragma once\n#define ANSWER 42\nint dql_answer();\n"
# What ptxas says of two kernels, the second with a spill, as nvcc 13.0 prints it.
PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3dql6device12twice_kernelEPi' for 'sm_80'
ptxas info    : Function properties for _ZN3dql6device12twice_kernelEPi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 1 barriers, 128 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 2.105 ms
ptxas info    : Compiling entry function '_ZN3dql6device12chain_kernelILNS_9PrecisionE2ELi4ELb1ELb0EEEvi' for 'sm_90'
ptxas info    : Function properties for _ZN3dql6device12chain_kernelILNS_9PrecisionE2ELi4ELb1ELb0EEEvi
    40 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""
ROWS = [
    {"kernel": "twice", "arch": "80", "stack": 0, "spill_stores": 0, "spill_loads": 0, "registers": 8, "shared": 128},
    {"kernel": "chain bf16 m4 resident forward", "arch": "90", "stack": 40, "spill_stores": 12, "spill_loads": 16}
    | {"registers": 255, "shared": 0},
]
AGAIN = "run pip install -e . again"


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> dict[str, str]:
    return clean_environment(tmp_path_factory.mktemp("tools")) | {"DQL_NO_NATIVE": "1"}


@pytest.fixture
def project(tmp_path, tools) -> Project:
    project = Project(tmp_path / "project", tools, "_cuda")
    cuda = project.csrc / "cuda"
    cuda.mkdir(parents=True)
    for name in ("arguments.h", "philox.h"):
        shutil.copy(ROOT / "csrc" / name, project.csrc / name)
    (cuda / "emulator").mkdir()
    files = (("module.cpp", MODULE), ("kernel.cu", KERNEL), ("answer.h", HEADER), ("emulator/emulator.cpp", ""))
    for name, text in files:
        (cuda / name).write_text(text)
    return project


class Toolkit:
    """A CUDA toolkit in a folder, whose nvcc is a script: the host's compiler, which drops what that does not know."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.nvcc, self.calls = folder, folder / "bin" / "nvcc", folder / "calls"
        (folder / "bin").mkdir(parents=True)
        (folder / "lib64").mkdir()
        (folder / "lib64" / "libcudart_static.a").write_text("!<arch>\n")
        (folder / "ptxas").write_text(PTXAS)
        self.compiles(f"cat {folder / 'ptxas'}")

    def compiles(self, last: str) -> None:
        """Compiles, and then does `last`."""
        self.does(f"""
case "$*" in
    --version) echo "Cuda compilation tools, release 12.9, V12.9.41"; exit;;
    *--dryrun*) echo '#$ TOP={self.folder}'; exit;;
esac
echo "$*" >> {self.calls}
for word; do
    shift
    case "$word" in
        -Xptxas|-v|-Xcompiler|-fPIC,*|--threads|1|-gencode=*|-ccbin) ;;
        {compiler()}) ;;
        *.cu) set -- "$@" -fPIC -x c++ "$word";;
        *) set -- "$@" "$word";;
    esac
done
{compiler()} "$@" && {last}
""")

    def does(self, script: str) -> None:
        self.nvcc.write_text(f"#!/bin/sh\n{script}\n")
        self.nvcc.chmod(0o755)

    def compiled(self) -> list[str]:
        """The commands that compiled something since the last question."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return lines


@pytest.fixture
def toolkit(tmp_path) -> Toolkit:
    return Toolkit(tmp_path / "toolkit")


def build(project: Project, toolkit: Toolkit, **environment: str) -> dict:
    return project.build(**({"CUDA_HOME": str(toolkit.folder)} | environment))


# Without nvcc, or with one that does not work.
@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
@needs_compiler
def test_without_nvcc_the_build_succeeds_and_says_why(variable, project, tmp_path):
    facts = project.build(**{variable: str(tmp_path)})
    assert {**facts, "seconds": 0, "sources": ""} == {
        "built": False,
        "reason": f"it was not built: nvcc was not found in {tmp_path}/bin, which {variable} names, when dql was "
        f"installed; install the CUDA toolkit, or set {variable} to where it is, and {AGAIN}",
        "compiler": None,
        "architectures": [],
        "because": None,
        "resources": [],
        "seconds": 0,
        "sources": "",
    }
    assert not project.extension.exists()
    module = project.build_record()
    assert module.reason(of=module.CUDA) == facts["reason"]


@needs_compiler
def test_nvcc_on_the_path_needs_no_cuda_home(project, toolkit):
    path = f"{toolkit.nvcc.parent}:{project.tools['PATH']}"
    assert project.build(PATH=path)["compiler"] == "nvcc 12.9.41"


def test_without_a_host_compiler(project, toolkit):
    reason = build(project, toolkit, CXX="/nonexistent/g++")["reason"]
    assert reason.startswith("it was not built: the C++ compiler /nonexistent/g++ did not run")
    assert reason.endswith(AGAIN)


@needs_compiler
def test_an_nvcc_that_does_not_run(project, toolkit):
    toolkit.does("echo 'nvcc: error while loading shared libraries: libnvvm.so'; exit 127")
    assert build(project, toolkit)["reason"] == (
        f"it was not built: {toolkit.nvcc} did not run (nvcc: error while loading shared libraries: libnvvm.so); "
        f"mend the CUDA toolkit and {AGAIN}"
    )


@needs_compiler
def test_a_toolkit_without_the_static_runtime(project, toolkit):
    (toolkit.folder / "lib64" / "libcudart_static.a").unlink()
    assert build(project, toolkit)["reason"] == (
        f"it was not built: the CUDA toolkit of {toolkit.nvcc} has no libcudart_static.a; "
        f"install the toolkit's development files and {AGAIN}"
    )


@needs_compiler
def test_a_failed_compile_takes_the_old_extension_away_and_quotes_the_error(project, toolkit):
    assert build(project, toolkit)["built"] is True
    (project.csrc / "cuda" / "kernel.cu").write_text(KERNEL + "int broken( {\n")
    facts = build(project, toolkit)
    assert facts["built"] is False
    assert not project.extension.exists()
    assert not list(project.folder.glob("build/lib*/**/*.so"))
    assert facts["compiler"] == "nvcc 12.9.41"
    assert facts["reason"].startswith(
        "it was not built: nvcc 12.9.41 failed on csrc/cuda/kernel.cu with: csrc/cuda/kern"
    )
    assert facts["reason"].endswith(
        f"mend that (its whole output is in _cuda_build.log beside _cuda_build.json) and {AGAIN}"
    )
    assert f"+ {toolkit.nvcc} " in project.log().read_text()
    assert "int broken(" in project.log().read_text()

    (project.csrc / "cuda" / "kernel.cu").write_text(KERNEL)
    assert build(project, toolkit)["built"] is True
    assert not project.log().exists()


@needs_compiler
def test_a_function_that_nobody_defines_is_found_when_building(project, toolkit):
    (project.csrc / "cuda" / "kernel.cu").write_text(KERNEL.replace("dql_answer", "dql_other"))
    facts = build(project, toolkit)
    assert facts["built"] is False
    assert "cannot load" in facts["reason"]
    assert "dql_answer" in facts["reason"]


@pytest.mark.parametrize("missing", ["cuda", "build_cuda.py", "cuda/kernel.cu"])
@needs_compiler
def test_without_sources(missing, project, toolkit):
    path = project.csrc / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    reason = build(project, toolkit)["reason"]
    folder = "csrc/" if missing == "build_cuda.py" else "csrc/cuda"
    assert (
        reason == f"it was not built: the folder {folder} with its sources is missing; get the whole of dql and {AGAIN}"
    )


# What it is told.
@pytest.mark.parametrize(
    ("told", "named"), [("70;80", "'70'"), ("sm_80", "'sm_80'"), ("9.0", "'9.0'"), (";", "nothing")]
)
@needs_compiler
def test_architectures_that_there_are_not(told, named, project, toolkit):
    reason = build(project, toolkit, DQL_CUDA_ARCHS=told)["reason"]
    assert re.fullmatch(
        rf"it was not built: DQL_CUDA_ARCHS='{told}' names {named}; known are 80, [\d, ]+; "
        rf"set it to some of these, such as '80;90', and {AGAIN}",
        reason,
    )
    assert toolkit.compiled() == []


SMI = {
    # what nvidia-smi does: (architectures, why)
    "echo 9.0": (["90"], "for the GPU here"),
    "echo 9.0; echo 8.6; echo 9.0": (["86", "90"], "for the GPU here"),
    "echo 13.5": (["121"], "for the GPU here"),  # newer than all that are known: its PTX
    "echo 8.5": (["80"], "for the GPU here"),
    "echo 7.5": (["80", "90"], "no GPU was found"),  # none that the kernels run on
    "echo 7.5; echo 12.0": (["120"], "for the GPU here"),
    "echo '[N/A]'": (["80", "90"], "no GPU was found"),
    "echo 9.0; exit 9": (["80", "90"], "no GPU was found"),
    "echo 'NVIDIA-SMI has failed'; exit 6": (["80", "90"], "no GPU was found"),
    "sleep 60": (["80", "90"], "no GPU was found"),
    "head -c 300 /dev/urandom": (["80", "90"], "no GPU was found"),
}


@needs_compiler
@pytest.mark.parametrize("does", SMI)
def test_it_is_built_for_the_gpu_that_is_there(does, project, toolkit, tmp_path):
    folder = tmp_path / "smi"
    folder.mkdir()
    smi = folder / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{does}\n")
    smi.chmod(0o755)
    builder = project.csrc / "build_cuda.py"
    builder.write_text(builder.read_text().replace("SMI_SECONDS = 15.0", "SMI_SECONDS = 0.5"))
    path = f"{folder}:{project.tools['PATH']}"
    facts = build(project, toolkit, PATH=path)
    assert (facts["built"], facts["architectures"], facts["because"]) == (True, *SMI[does])
    if does == "echo 9.0":
        told = build(project, toolkit, PATH=path, DQL_CUDA_ARCHS="80")
        assert (told["architectures"], told["because"]) == (["80"], "DQL_CUDA_ARCHS")


@needs_compiler
def test_architectures_are_compiled_for_and_the_highest_leaves_its_ptx(project, toolkit):
    for told, names, codes in (
        ({}, ["80", "90"], ["sm_80", "sm_90", "compute_90"]),
        ({"DQL_CUDA_ARCHS": "120;80, 90 80"}, ["80", "90", "120"], ["sm_80", "sm_90", "sm_120", "compute_120"]),
    ):
        assert build(project, toolkit, **told)["architectures"] == names
        (command,) = toolkit.compiled()
        assert re.findall(r"-gencode=arch=compute_\d+,code=(\w+)", command) == codes
        assert "fast_math" not in command  # approximations are chosen where they are harmless
        assert "-ccbin" not in command


@pytest.mark.parametrize("told", ["{}", "env {}", "{} -pipe"])
@needs_compiler
def test_the_host_compiler_is_the_one_that_cxx_names(told, project, toolkit):
    build(project, toolkit, CXX=told.format(compiler()), DQL_REQUIRE_CUDA="1")
    assert f"-ccbin {compiler()} " in toolkit.compiled()[0]


@needs_compiler
def test_required_and_not_wanted(project, toolkit, tmp_path):
    def attempt(**environment: str) -> subprocess.CompletedProcess:
        return project.call("setup.py", "build_ext", "--inplace", **environment)

    done = attempt(DQL_REQUIRE_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert "the extension dql.kernels._cuda: it was not built: nvcc was not found" in done.stderr
    assert "Traceback" not in done.stderr

    facts = build(project, toolkit, DQL_NO_CUDA="1")
    assert facts["reason"] == f"it was not built: DQL_NO_CUDA was set when dql was installed; unset it and {AGAIN}"
    both = attempt(DQL_NO_CUDA="1", DQL_REQUIRE_CUDA="1")
    assert both.returncode != 0
    assert "DQL_REQUIRE_CUDA and DQL_NO_CUDA contradict each other; unset one" in both.stderr
    assert build(project, toolkit, DQL_NO_CUDA="0", DQL_REQUIRE_CUDA="0")["built"] is True


@needs_compiler
def test_the_extension_for_the_cpu_is_built_without_it(project, tmp_path):
    project.cpu.mkdir()
    (project.cpu / "module.cpp").write_text(NATIVE_MODULE)
    (project.cpu / "variant.cpp").write_text("")
    assert project.build(DQL_NO_NATIVE="0", CUDA_HOME=str(tmp_path))["built"] is False
    native = project.build_record()
    assert native.record(native.NATIVE)["built"] is True
    assert (project.kernels / native.NATIVE.file).exists()


# What it makes.
@needs_compiler
def test_the_record(project, toolkit):
    facts = build(project, toolkit)
    assert facts["built"] is True
    assert facts["reason"] is None
    assert facts["compiler"] == "nvcc 12.9.41"
    assert facts["seconds"] > 0
    assert facts["resources"] == ROWS
    assert load(project.extension, "_cuda").answer() == 42
    module = project.build_record()
    assert module.record(module.CUDA) == facts
    assert module.outdated(module.CUDA) is None
    (project.csrc / "cuda" / "tests").mkdir()
    assert module.outdated(module.CUDA) is None
    for path in (project.csrc / "arguments.h", project.csrc / "cuda" / "kernel.cu"):
        before = path.read_text()
        path.write_text(before + "\n// another line\n")
        assert module.outdated(module.CUDA) == f"the sources in csrc/ have changed since it was built; {AGAIN}"
        path.write_text(before)
    project.extension.unlink()
    said = module.reason(ImportError("No module named _cuda"), module.CUDA)
    assert "its file _cuda.abi3.so is no longer in" in said


@needs_compiler
def test_only_what_changed_is_compiled_again_and_its_resources_are_kept(project, toolkit):
    build(project, toolkit)
    assert len(toolkit.compiled()) == 1
    first = project.objects("cuda")
    facts = build(project, toolkit)
    assert toolkit.compiled() == []
    assert project.objects("cuda") == first
    assert facts["resources"] == ROWS

    (project.csrc / "cuda" / "module.cpp").write_text(MODULE + "\n// another line\n")
    build(project, toolkit)
    assert toolkit.compiled() == []
    second = project.objects("cuda")
    assert {name.rpartition("-")[0] for name in second.keys() - first.keys()} == {"module"}

    (project.csrc / "cuda" / "answer.h").write_text(HEADER.replace("42", "43"))
    build(project, toolkit)
    assert len(toolkit.compiled()) == 1
    assert not project.objects("cuda").keys() & second.keys()
    assert len(project.objects("cuda")) == len(second)
    assert load(project.extension, "_cuda").answer() == 43

    build(project, toolkit, DQL_CUDA_ARCHS="90")
    assert len(toolkit.compiled()) == 1
    assert project.call("setup.py", "build_ext", "--inplace", "--force", CUDA_HOME=str(toolkit.folder)).returncode == 0
    assert len(toolkit.compiled()) == 1


@needs_compiler
def test_the_emulated_twin(project):
    done = project.call("setup.py", "build_cuda_emulator", CUDA_HOME="/nonexistent")
    assert done.returncode == 0, done.stdout + done.stderr
    assert load(project.kernels / "_cuda_emulated.abi3.so", "_cuda_emulated").answer() == 42
    (project.csrc / "cuda" / "kernel.cu").write_text(KERNEL + "int broken( {\n")
    done = project.call("setup.py", "build_cuda_emulator")
    assert done.returncode != 0
    assert "int broken(" in done.stdout
    said = done.stderr.strip().splitlines()[-1]
    assert "the emulated CUDA kernels were not built: " in said
    assert "failed on csrc/cuda/kernel.cu with: csrc/cuda/kernel.cu:" in said
    assert said.endswith("; its whole output is above")


@needs_nvcc
def test_nvcc_itself(project):
    """The toolkit that is here: its version, libraries, and what its ptxas says are read as they are."""
    told = {"CUDA_HOME": str(Path(NVCC).parents[1])}
    facts = project.build(DQL_REQUIRE_CUDA="1", DQL_CUDA_ARCHS="90", **told)
    assert re.fullmatch(r"nvcc [\d.]+", facts["compiler"])
    (row,) = facts["resources"]
    assert row.keys() == ROWS[0].keys()
    assert (row["kernel"], row["arch"], row["spill_stores"], row["shared"]) == ("twice", "90", 0, 128)
    assert 0 < row["registers"] <= 255
    assert load(project.extension, "_cuda").answer() == 42

    (project.csrc / "cuda" / "kernel.cu").write_text(KERNEL.replace("all[31 -", "nothing[31 -"))
    facts = project.build(DQL_CUDA_ARCHS="90", **told)
    assert re.search(r'failed on csrc/cuda/kernel.cu with: .*error: identifier "nothing" is undefined', facts["reason"])


# The real sources.
@pytest.fixture(scope="module")
def real(tmp_path_factory, tools) -> Project:
    """The real extension, from the checkout's own objects as far as they are up to date."""
    project = Project(tmp_path_factory.mktemp("real"), tools, "_cuda").with_real_sources()
    project.build(DQL_REQUIRE_CUDA="1")
    return project


@needs_nvcc
def test_it_is_loaded_where_there_is_no_driver(real):
    """The runtime is inside and finds the driver by itself: a machine that only stores or trains on CPUs can import."""
    code = "import sys; from support.build import load; m = load(__import__('pathlib').Path(sys.argv[1]), '_cuda'); "
    code += "print(m.emulated(), *m.versions())\n"
    code += "try:\n    print(m.device(0))\nexcept RuntimeError as error:\n    print(error)"
    environment = real.tools | {"PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(real.extension)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    versions, device = done.stdout.splitlines()
    emulated, driver, runtime = versions.split()
    assert emulated == "False"
    release = real.record()["compiler"].removeprefix("nvcc ").split(".")
    assert int(runtime) == 1000 * int(release[0]) + 10 * int(release[1])
    if int(driver) == 0:
        assert device.startswith("cudaDeviceGetAttribute: ")
    if shutil.which("ldd"):
        needed = subprocess.run(["ldd", str(real.extension)], capture_output=True, text=True, check=True).stdout
        assert not re.search(r"libcuda|libcudart|libstdc\+\+|libpython|not found", needed), needed


@needs_nvcc
def test_nothing_but_the_module_is_exported(real):
    assert [name for _, name in symbols("-D", str(real.extension))] == ["PyInit__cuda"]


# The sentences for a GPU that cannot be used.
@pytest.fixture
def gpu(monkeypatch):
    """Sets what the extension says of driver and GPU; there may be neither here."""

    def says(driver=13000, runtime=13000, capability=90, cannot_run=None, devices=1):
        module = SimpleNamespace(
            versions=lambda: (driver, runtime),
            device=lambda ordinal: (capability, 132, 232448),
            cannot_run=lambda ordinal: cannot_run,
        )
        monkeypatch.setattr(binding, "load", lambda emulated: module)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        forget()
        return binding.unavailable()

    def forget():
        for kept in (binding.versions, binding.cannot_run, binding._not_loaded):
            kept.cache_clear()

    monkeypatch.delenv("DQL_CUDA_EMULATE", raising=False)
    forget()
    yield says
    forget()


def test_a_gpu_that_can_be_used(gpu):
    assert gpu() is None
    assert gpu(driver=12020, runtime=12090) is None  # of one major version


def test_a_driver_that_is_missing_or_too_old(gpu):
    assert gpu(driver=0).startswith("there is no NVIDIA driver here; ")
    assert gpu(driver=12080) == (
        "the driver is for CUDA 12.8 and the extension was built with 13.0; install a newer driver"
    )
    assert gpu(devices=0).startswith("no CUDA device: torch.cuda.is_available() is False; ")


def test_a_gpu_that_it_was_not_built_for(gpu, monkeypatch):
    monkeypatch.setattr(build_record, "record", lambda of: {"architectures": ["80", "90"]})
    told = "no kernel image is available for execution on the device"
    assert gpu(capability=120, cannot_run=told) == (
        f"the extension was built for sm_80, sm_90 and this GPU is sm_120 ({told}); "
        f"set DQL_CUDA_ARCHS='80;90;120' and {build_record.again()}"
    )
    assert gpu(capability=75) == ("it needs compute capability 8.0 or more, and this GPU has 7.5; use backend='eager'")


def test_the_gpu_of_the_policy_is_judged(gpu, monkeypatch):
    """Not the current one, which is whatever the caller left it to be."""
    assert gpu() is None
    binding.cannot_run.cache_clear()
    capabilities = {0: 90, 1: 75}
    monkeypatch.setattr(binding.load(False), "device", lambda ordinal: (capabilities[ordinal], 132, 232448))
    sentence = "it needs compute capability 8.0 or more, and this GPU has 7.5; use backend='eager'"
    policies = [SimpleNamespace(flat=SimpleNamespace(is_cuda=True, device=torch.device("cuda", i))) for i in (0, 1)]
    checked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: checked.append(device) or (7, 0))
    backend = registry()["cuda"]
    for current in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)  # noqa: B023
        assert backend.check() == (None, sentence)[current]
        assert backend.check(policies[1]) == sentence
        backend.check(policies[0])
        assert checked.pop() == torch.device("cuda", 0) and not checked, "so far all was well with it"


def test_a_failure_that_may_pass_is_not_kept(gpu, monkeypatch):
    """As of memory, or an earlier kernel's fault; that there is no code for the GPU is kept."""
    assert gpu() is None
    binding.cannot_run.cache_clear()
    answers = ["cudaFuncGetAttributes: out of memory (cudaErrorMemoryAllocation)", "no kernel image", None]
    asked = iter(answers)

    def cannot_run(ordinal):
        if (told := next(asked)) is answers[0]:
            raise RuntimeError(told)
        return told

    monkeypatch.setattr(binding.load(False), "cannot_run", cannot_run)
    assert binding.unavailable() == (
        f"the GPU did not answer ({answers[0]}); free its memory, or start this process anew"
    )
    for _ in range(2):
        assert "(no kernel image)" in binding.unavailable()
    assert next(asked) is None, "asked once"


def test_an_extension_that_is_not_there(gpu, monkeypatch):
    def no_such(emulated):
        raise ImportError("No module named 'dql.kernels._cuda'")

    monkeypatch.setattr(binding, "load", no_such)
    monkeypatch.setattr(build_record, "record", lambda of: {"built": False, "reason": "it was not built: no nvcc; do"})
    assert binding.unavailable() == "the CUDA extension cannot be used: it was not built: no nvcc; do"


def test_an_emulated_twin_that_is_not_there(gpu, monkeypatch):
    def no_such(emulated):
        raise ImportError("No module named 'dql.kernels._cuda_emulated'")

    monkeypatch.setenv("DQL_CUDA_EMULATE", "1")
    monkeypatch.setattr(binding, "load", no_such)
    assert binding.unavailable() == (
        "DQL_CUDA_EMULATE=1 needs the emulated kernels; run python setup.py build_cuda_emulator, or unset it"
    )


def test_the_doctor(dql_here):
    facts = json.loads(dql_here("doctor", "--json").out)["cuda_extension"]
    assert facts["built"] == (facts["reason"] is None)
    assert "cuda extension" in dql_here("doctor").out
    facts = {"built": False, "reason": "it was not built: no nvcc", "compiler": None, "seconds": 0.1}
    assert cuda_extension_rows(facts) == {"cuda extension": "it was not built: no nvcc"}
    facts = {"built": True, "reason": None, "compiler": "nvcc 13.0.88", "seconds": 9.5, "outdated": None}
    facts["architectures"] = ["80", "90"]
    assert cuda_extension_rows(facts) == {"cuda extension": "built by nvcc 13.0.88 in 9.5 s for sm_80, sm_90"}
    text = cuda_extension_rows(facts | {"because": "for the GPU here"})["cuda extension"]
    assert text.endswith("for sm_80, sm_90 (for the GPU here)")
    text = cuda_extension_rows(facts | {"outdated": "the sources have changed"})["cuda extension"]
    assert text == "built by nvcc 13.0.88 in 9.5 s for sm_80, sm_90, but the sources have changed"
