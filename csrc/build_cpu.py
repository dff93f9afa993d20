"""How `dql.kernels._native` is compiled of csrc/cpu/: its kernels once for each instruction set, one of which is chosen
at run time.

    CXX, CXXFLAGS, LDFLAGS  another compiler, further flags
"""

import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build_record
from build_record import NotBuilt
from build_tools import Compiler, Facts, Job, Workshop, call, first_error, flags, python_header

HERE = Path("csrc/cpu")  # relative, so that objects do not depend on where the checkout stands
# fmt: off
COMMON = [
    "-std=c++17", "-O3", "-DNDEBUG", "-DPy_LIMITED_API=0x030B0000", "-fPIC", "-pthread", "-Wall", "-Wextra",
    "-fvisibility=hidden", "-ffunction-sections", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # gcc 12 warns of its own AVX-512 headers
]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"]
# fmt: on
VARIANTS: dict[str, list[str]] = {  # the flags of each variant
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


def build(shop: Workshop, target: Path, facts: Facts) -> None:
    """Compiles and links `target`; fills in compiler, variants and left_out on the way.

    Raises:
        NotBuilt: with what was missing or failed.
    """
    sources = sorted(path for path in HERE.glob("*.cpp") if path.name != "variant.cpp")
    if not sources:
        raise NotBuilt("the folder csrc/ with its sources is missing", "get the whole of dql")
    compiler = Compiler.find()
    facts["compiler"] = compiler.version
    include = python_header()
    with ThreadPoolExecutor(shop.workers) as pool:
        refusals = dict(zip(VARIANTS, pool.map(lambda name: refuses(compiler, name), VARIANTS), strict=True))
    variants = [name for name, refusal in refusals.items() if refusal is None]
    facts["left_out"] = {name: refusal for name, refusal in refusals.items() if refusal is not None}
    have = [f"-DDQL_HAVE_{name.upper()}={int(name in variants)}" for name in VARIANTS if name != "generic"]
    command = [*compiler.command, *COMMON, *include, "-Icsrc", f"-I{HERE}", *have]

    def job(source: Path, *more: str, variant: str = "") -> Job:
        stem, name = (f"{source.stem}-{variant}", f"{source} ({variant})") if variant else (source.stem, str(source))
        return Job(source, [*command, *more, *flags("CXXFLAGS")], compiler.version, name, stem)

    jobs = [  # the variants first: they take the longest
        job(HERE / "variant.cpp", "-fno-exceptions", f"-DDQL_VARIANT={name}", *VARIANTS[name], variant=name)
        for name in variants
    ]
    jobs += [job(source) for source in sources]
    headers = [path for path in build_record.compiled_files(Path("csrc")) if path.suffix != ".cpp"]
    shop.link(compiler, shop.compile(jobs, headers), [], target)
    facts["variants"] = variants


def refuses(compiler: Compiler, variant: str) -> str | None:
    """None, or why this variant cannot be compiled here."""
    if variant not in _PROBES:
        return None
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"this is not an x86-64 machine but {platform.machine()}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(f"#include <immintrin.h>\n{_PROBES[variant]}\n")
        status, output = call([*compiler.command, *VARIANTS[variant], "-c", str(source), "-o", f"{folder}/probe.o"])
    return None if status == 0 else f"{compiler.version} refuses its flags ({first_error(output)})"
