"""Who may import whom: kernels/ and csrc/ stand alone, and `import dql` is light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

HEAVY = ["triton", "minari", "gymnasium", "h5py", "matplotlib", "mujoco", "rich", "tyro", "PIL"]


def imported_modules(path: Path) -> set[str]:
    """Every module that the file imports, at any depth of its code; `from . import x` as `.x`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module} if node.module else {module + alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def test_the_walk_finds_imports(tmp_path):
    source = """
import dql.noise as n, os
def f():
    from dql import policy
    from .layout import x
    from .. import agent
    importlib.import_module("dql.data")
"""
    (tmp_path / "x.py").write_text(source)
    assert imported_modules(tmp_path / "x.py") == {"dql.noise", "os", "dql", ".layout", "..agent", "dql.data"}


@pytest.mark.parametrize("folder", ["kernels", "csrc"])
def test_kernels_import_nothing_of_the_rest(folder):
    """Tensors in, tensors out."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files or folder == "csrc"
    for path in files:
        depth = len(path.relative_to(ROOT / folder).parts)
        for module in imported_modules(path):
            level = len(module) - len(module.lstrip("."))
            inside = module.startswith("dql.kernels.") or 0 < level <= depth
            assert inside or module.split(".")[0] not in ("dql", ""), f"{path.relative_to(ROOT)} imports {module}"


# What a policy offers as methods of its own and others do: `policy(states)`, `policy.export_onnx`.
UPWARDS = {("dql.policy", "dql.sampler"), ("dql.policy", "dql.export")}


def test_no_module_imports_one_that_imports_it():
    """Directly or through others, at any depth of its code, but for what types alone need."""
    graph = import_graph()
    assert {(module, other) for module, others in graph.items() for other in others} >= UPWARDS
    remaining = {module: {o for o in others if (module, o) not in UPWARDS} for module, others in graph.items()}
    while leaves := [module for module, others in remaining.items() if not others]:
        for module in leaves:
            del remaining[module]
        remaining = {module: others - {*leaves} for module, others in remaining.items()}
    assert not remaining, f"circles among {sorted(remaining)}"  # or modules that import them


def import_graph() -> dict[str, set[str]]:
    """Of each module of dql, those that it imports."""
    files = {}
    for path in (*sorted((ROOT / "dql").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[:2] != ("dql", "kernels"):
            parts = ("dql", *parts) if parts[0] == "kernels" else parts
            files[".".join(parts).removesuffix(".__init__")] = path
    graph = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found = set()
        for node in ast.walk(without_types(ast.parse(path.read_text()))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
                base = ".".join([*above, *filter(None, [node.module])])
                found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in files else base for a in node.names}
        graph[module] = {name for name in found if name in files} - {module}
    return graph


def without_types(tree: ast.Module) -> ast.Module:
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    return tree


def test_native_code_includes_no_torch():
    suffixes = {".h", ".hpp", ".cuh", ".c", ".cc", ".cpp", ".cu"}
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in suffixes:
            headers = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.M)
            wrong = [h for h in headers if h.split("/")[0].lower() in ("torch", "aten", "c10", "pybind11")]
            assert not wrong, f"{path.relative_to(ROOT)} includes {wrong}"


def run(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False)


def test_importing_dql_imports_nothing_heavy(tmp_path):
    """torch itself may bring what it likes (triton, where it is installed): only what comes on top counts."""
    code = f"""
import sys, torch
before = set(sys.modules)
import dql
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(new & set({HEAVY})))
"""
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_public_names():
    result = run("import dql; print([n for n in dql.__all__ if not hasattr(dql, n)], len(set(dql.__all__)))")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("[]")


def test_kernels_is_no_top_level_module():
    """From the repository root `import kernels` would find the folder, and another package has that name."""
    result = run("import kernels")
    assert result.returncode != 0
    assert "ImportError: this folder is the package dql.kernels" in result.stderr
    assert "pip install -e ." in result.stderr
    assert "import dql.kernels" in result.stderr
    assert run("import dql.kernels.reference, dql.kernels.layout").returncode == 0
