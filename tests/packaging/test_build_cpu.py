"""The build of `dql.kernels._native` (setup.py), for real: what a missing or failing compiler leaves, and what a good
one makes. A small csrc/ of our own stands in for the real one wherever only the build's behaviour is in question."""

import json
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys

import pytest
from support.build import Project, clean_environment, compiler, load, needs_compiler, symbols

from dql.doctor import extension_rows

X86 = platform.machine().lower() in ("x86_64", "amd64")
VARIANTS = ["avx512bf16", "avx512", "avx2", "generic"] if X86 else ["generic"]
NO_COMPILER = (
    "it was not built: no C++ compiler was found when dql was installed; install one (on Debian or Ubuntu: "
    "apt install g++) and "
)
MODULE = r"""
#include <Python.h>
#include <string>
#include "names.h"
static PyObject* names(PyObject*, PyObject*) {
    std::string all = dql_name_generic();
#if DQL_HAVE_AVX2
    all += std::string(" ") + dql_name_avx2();
#endif
#if DQL_HAVE_AVX512
    all += std::string(" ") + dql_name_avx512();
#endif
#if DQL_HAVE_AVX512BF16
    all += std::string(" ") + dql_name_avx512bf16();
#endif
    return PyUnicode_FromString(all.c_str());
}
static PyMethodDef methods[] = {{"names", names, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods, nullptr, nullptr, nullptr,
                                 nullptr};
PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
"""
HEADER = "".join(f'extern "C" const char* dql_name_{name}();\n' for name in ("avx512bf16", "avx512", "avx2", "generic"))
VARIANT = r"""
#include "names.h"
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define NAME_(x) dql_name_##x
#define NAME(x) NAME_(x)
extern "C" const char* NAME(DQL_VARIANT)() { return TEXT(DQL_VARIANT); }
"""


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> dict[str, str]:
    return clean_environment(tmp_path_factory.mktemp("tools")) | {"DQL_NO_CUDA": "1"}


@pytest.fixture
def project(tmp_path, tools) -> Project:
    project = Project(tmp_path / "project", tools, "_native")
    project.cpu.mkdir(parents=True)
    (project.cpu / "module.cpp").write_text(MODULE)
    (project.cpu / "names.h").write_text(HEADER)
    (project.cpu / "variant.cpp").write_text(VARIANT)
    return project


def names(project: Project) -> str:
    """What the small extension says."""
    return load(project.extension, "_native").names()


def reason(project: Project, *error: ImportError) -> str:
    return project.build_record().reason(*error)


# Where dql is also installed editable, its finder would supply the extension that this install lacks.
DOCTOR_OF_THIS_INSTALL = """
import runpy, sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
sys.argv = ["dql", "doctor", "--json"]
runpy.run_module("dql.cli", run_name="__main__")
"""


# Without a compiler.
@pytest.mark.parametrize("missing", ["PATH", "CXX"])
def test_without_a_compiler_pip_install_succeeds_and_the_doctor_says_why(missing, project, tmp_path):
    (tmp_path / "bin").mkdir()
    told = {"PATH": str(tmp_path / "bin")} if missing == "PATH" else {"CXX": "/nonexistent/g++"}
    target = tmp_path / "target"
    install = ["install", "-q", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(target), "."]
    done = project.call("-m", "pip", *install, **told)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((target / "dql" / "kernels" / "_native_build.json").read_text())
    assert facts["built"] is False
    again = "install dql again with pip install --force-reinstall --no-deps --no-cache-dir"
    if missing == "PATH":
        assert facts["reason"] == NO_COMPILER + again
    else:
        assert facts["reason"] == (
            "it was not built: the C++ compiler /nonexistent/g++ did not run (No such file or directory); "
            f"set CXX to another or unset it and {again}"
        )
    assert not list(target.rglob("*.so"))
    doctor = subprocess.run(
        [sys.executable, "-c", DOCTOR_OF_THIS_INSTALL],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH", "")]))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert doctor.returncode == 0, doctor.stderr
    said = json.loads(doctor.stdout)["extension"]
    assert said["built"] is False
    assert said["reason"] == facts["reason"]
    assert extension_rows(said) == {"extension": facts["reason"]}


def test_the_doctor_tells_which_variant_runs_here():
    facts = {"built": True, "reason": None, "compiler": "g++ 8.5.0", "seconds": 9.5, "outdated": None}
    facts["left_out"] = {"avx512bf16": "g++ 8.5.0 refuses its flags (…)"}
    facts["runs"] = {"avx512": "this CPU has no AVX-512", "avx2": None, "generic": None}
    assert extension_rows(facts) == {
        "extension": "built by g++ 8.5.0 in 9.5 s",
        "variant avx512bf16": "it was not built: g++ 8.5.0 refuses its flags (…)",
        "variant avx512": "this CPU has no AVX-512",
        "variant avx2": "used",
        "variant generic": "available",
    }
    rows = extension_rows(facts | {"outdated": "the sources have changed"})
    assert rows["extension"] == "built by g++ 8.5.0 in 9.5 s, but the sources have changed"


def test_a_checkout_without_a_compiler_is_told_to_install_again_in_place(project, tmp_path):
    facts = project.build(PATH=str(tmp_path))
    assert facts["reason"] == NO_COMPILER + "run pip install -e . again" == reason(project)


def test_without_sources(project):
    shutil.rmtree(project.csrc)
    assert "csrc/" in project.build()["reason"]


# What setup.py is told.
def test_a_required_extension_that_cannot_be_built_fails_the_build(project):
    done = project.call("setup.py", "build_ext", "--inplace", DQL_REQUIRE_NATIVE="1", CXX="/nonexistent")
    assert done.returncode != 0
    assert "it was not built: the C++ compiler /nonexistent did not run" in done.stderr
    assert "Traceback" not in done.stderr
    wheel = ["-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index", "."]
    assert project.call(*wheel, DQL_REQUIRE_NATIVE="1", CXX="/nonexistent").returncode != 0


def test_an_extension_that_is_not_wanted_is_not_built(project):
    facts = project.build(DQL_NO_NATIVE="1")
    assert facts["reason"].startswith(
        "it was not built: DQL_NO_NATIVE was set when dql was installed; unset it and run"
    )
    assert not project.extension.exists()
    both = project.call("setup.py", "build_ext", "--inplace", DQL_NO_NATIVE="1", DQL_REQUIRE_NATIVE="1")
    assert both.returncode != 0
    assert "contradict" in both.stderr


@needs_compiler
def test_zero_means_no(project):
    assert project.build(DQL_NO_NATIVE="0", DQL_REQUIRE_NATIVE="0")["built"] is True


# With a compiler.
@needs_compiler
def test_a_failed_compile_takes_the_old_extension_away_and_quotes_the_error(project):
    facts = project.build(DQL_REQUIRE_NATIVE="1")
    assert facts["built"] is True
    assert facts["reason"] is None
    assert facts["variants"] == VARIANTS
    assert set(names(project).split()) == set(VARIANTS)

    (project.cpu / "module.cpp").write_text(MODULE + "int broken( {\n")
    facts = project.build()
    assert facts["built"] is False
    assert not project.extension.exists()
    assert "failed on csrc/cpu/module.cpp with: csrc/cpu/module.cpp:" in facts["reason"]
    assert facts["reason"].endswith(" and run pip install -e . again")
    assert facts["reason"] == reason(project)
    assert "int broken(" in project.log().read_text()
    assert "\n" not in facts["reason"]
    assert not list(project.folder.glob("build/lib*/**/*.so"))

    (project.cpu / "module.cpp").write_text(MODULE)
    (project.cpu / "variant.cpp").write_text("#error no such thing\n")
    assert re.search(r"failed on csrc/cpu/variant\.cpp \(\w+\) with: .*no such thing", project.build()["reason"])

    (project.cpu / "variant.cpp").write_text(VARIANT)
    assert project.build()["built"] is True
    assert project.extension.exists()
    assert not project.log().exists()


@needs_compiler
def test_a_function_that_nobody_defines_is_found_when_building(project):
    source = MODULE.replace("std::string all =", "extern int nobody(); std::string all = nobody() ? 0 :")
    (project.cpu / "module.cpp").write_text(source)
    facts = project.build()
    assert facts["built"] is False
    assert "cannot load" in facts["reason"]
    assert "nobody" in facts["reason"]


@needs_compiler
@pytest.mark.skipif(not X86, reason="this machine has one variant only")
def test_a_compiler_that_lacks_an_instruction_set_leaves_its_variant_out(project, tmp_path):
    old = tmp_path / "old-g++"
    old.write_text(
        "#!/bin/sh\n"
        'for a; do case "$a" in -mavx512bf16)\n'
        """  echo "g++: error: unrecognized command-line option '-mavx512bf16'"; exit 1;;\n"""
        "esac; done\n"
        f'exec {compiler()} "$@"\n'
    )
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    facts = project.build(CXX=shlex.quote(str(old)))
    assert facts["variants"] == ["avx512", "avx2", "generic"]
    assert "unrecognized command-line option" in facts["left_out"]["avx512bf16"]
    assert names(project) == "generic avx2 avx512"


@needs_compiler
def test_only_what_changed_is_compiled_again(project):
    project.build()
    first = project.objects("cpu")
    assert len(first) == len(VARIANTS) + 1
    project.extension.unlink()
    project.build()
    assert project.objects("cpu") == first
    assert project.extension.exists()

    (project.cpu / "module.cpp").write_text(MODULE + "\n// another line\n")
    project.build()
    second = project.objects("cpu")
    assert {name.rpartition("-")[0] for name in second.keys() - first.keys()} == {"module"}
    assert len(second) == len(first)

    (project.cpu / "names.h").write_text(HEADER + "\n// another line\n")
    project.build()
    assert not project.objects("cpu").keys() & second.keys()
    third = project.objects("cpu")
    project.build(CXXFLAGS="-DANOTHER_FLAG")
    assert not project.objects("cpu").keys() & third.keys()


# The sentences of kernels/build_record.py.
@needs_compiler
def test_the_reasons(project):
    assert "holds no record of a build; run pip install -e . again" in reason(project)
    project.build()
    module = project.build_record()
    assert module.outdated() is None
    said = module.reason(ImportError("libstdc++.so.6: version `GLIBCXX_9' not found\n(required by …)"))
    assert said == (
        "it was built, but Python cannot load it (libstdc++.so.6: version `GLIBCXX_9' not found (required by …)); "
        "run pip install -e . again"
    )
    project.extension.unlink()
    assert "its file _native.abi3.so is no longer in" in module.reason(ImportError("No module named _native"))
    (project.csrc / "tests").mkdir()
    (project.csrc / "tests" / "test_names.cpp").write_text("int main() {}\n")
    assert module.outdated() is None
    (project.cpu / "names.h").write_text(HEADER + "\n// another line\n")
    assert module.outdated() == "the sources in csrc/ have changed since it was built; run pip install -e . again"
    (project.kernels / "_native_build.json").write_text("{")
    assert "holds no record" in module.reason()


# The real sources.
@pytest.fixture(scope="module")
def real(tmp_path_factory, tools) -> Project:
    """The real extension, from the checkout's own objects as far as they are up to date."""
    project = Project(tmp_path_factory.mktemp("real"), tools, "_native").with_real_sources()
    project.build(DQL_REQUIRE_NATIVE="1")
    return project


@needs_compiler
def test_every_variant_is_built(real):
    facts = real.record()
    assert facts["built"] is True
    assert sorted([*facts["variants"], *facts["left_out"]]) == sorted(["avx512bf16", "avx512", "avx2", "generic"])
    assert "generic" in facts["variants"]


@needs_compiler
def test_a_variant_shares_no_function_with_the_others(real):
    """Of a weak function (inline, a template) that several objects define, the linker keeps one for everybody. If that
    is the AVX-512 one, a CPU without AVX-512 stops there. So a variant's own carry its namespace in their names."""
    objects = [path for path in real.folder.glob("build/temp.*/cpu/variant-*.o") if "-generic-" not in path.name]
    assert objects or not X86
    for path in objects:
        variant = path.name.split("-")[1]
        own = f"3dql{len(variant)}{variant}"  # dql::avx512, mangled
        shared = [name for kind, name in symbols(str(path)) if kind in "WVuC" and own not in name]
        assert not shared, f"{path.name} defines what others may too; make it static or of dql::{variant}: {shared}"


@needs_compiler
def test_nothing_but_the_module_is_exported(real):
    assert [name for _, name in symbols("-D", str(real.extension))] == ["PyInit__native"]


@needs_compiler
def test_no_cplusplus_library_is_needed_at_run_time(real):
    static = subprocess.run([*shlex.split(compiler()), "-print-file-name=libstdc++.a"], capture_output=True, text=True)
    if shutil.which("ldd") is None or not os.path.isabs(static.stdout.strip()):
        pytest.skip("this system has no ldd, or no static libstdc++ to link")
    needed = subprocess.run(["ldd", str(real.extension)], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" not in needed
    assert "libpython" not in needed
