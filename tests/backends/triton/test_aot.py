"""Kernels compiled for real architectures without a GPU: what `aot` reads, and what our kernels must be.

Nothing is compiled under TRITON_INTERPRET=1, which the other tests may set here: this happens in other processes.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dql import kernel_table
from dql.kernels.triton import aot

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton (Linux only)", allow_module_level=True)

# Compiled in every run: the widths of the published policies, for each architecture that `dql kernels` has by default
# and one with 99 KB. DQL_KERNELS='*' compiles every kernel of the list for each, which takes minutes.
# There is much of it, so each takes one precision, and sm_90 the fastest and the slowest; float32 takes the most shared
# memory, which sm_120 lacks.
_PRECISIONS = {80: "tf32", 90: "[fb][pf][31][26]", 100: "bf16", 120: "fp32"}
ON_TENSOR_CORES = re.compile("chain|actor|critic_fwd|critic_bwd|product|prologue")

FITTING = aot.Report(
    kernel="k",
    arch=90,
    registers=128,
    stack=0,
    spill_stores=0,
    spill_loads=0,
    shared=100 * 1024,
    tensor_memory=0,
    warps=8,
    blocks_per_sm=2,
    instructions=dict.fromkeys((*aot.COUNTED, "total"), 0),
    tf32_products=0,
    tf32_roundings=0,
    cvt_tf32=0,
    warnings=(),
    seconds=1.0,
)


# ------------------------------------------------------------------------------------------------ our kernels


def compiled(arch: int) -> dict[str, dict]:
    """`dql kernels --json` for one architecture: label -> row."""
    published = f"* {_PRECISIONS[arch]} H256"
    of_update = f"{published} counting,{published} loss,begin*,critic_loss,q_loss,squares,adam*"
    only = os.environ.get("DQL_KERNELS", f"{published},{published} R*,{of_update},choose*,critic_finish")
    done = command("--arch", f"sm_{arch}", "--only", only, "--json", timeout=1200)
    assert done.stdout, done.stderr
    rows = {row["label"]: row for row in json.loads(done.stdout)}
    assert done.returncode == any(row["error"] or row["limit"] for row in rows.values()), done.stderr
    assert rows
    return rows


def command(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """`dql kernels ARGUMENTS` in a process of its own, told to interpret: it must compile all the same."""
    return subprocess.run(
        [sys.executable, "-m", "dql.cli", "kernels", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )


def spill_limit() -> int:
    """Bytes a thread may spill. The tiles' rules were found with Triton 3.7: none there. Another release's compiler
    lays the same kernels out a little differently: with 3.9 up to two of 56 an architecture spill 4 to 44."""
    return 0 if importlib.metadata.version("triton").startswith("3.7.") else 64


@pytest.mark.parametrize("arch", _PRECISIONS)
def test_every_kernel_of_the_published_sizes(arch):
    """It launches, keeps to registers, has its products on tensor cores and rounds what they take of tf32."""
    rows, limits = compiled(arch), aot.ARCHITECTURES[arch]
    for label, row in rows.items():
        assert row["error"] is None, (label, row["error"])
        assert row["limit"] is None, (label, row["limit"])
        assert row["shared"] <= limits.shared_per_block, label
        assert row["blocks_per_sm"] >= 1, label
        local = {key: row[key] for key in ("spill_stores", "spill_loads", "stack")}
        local |= {name: row["instructions"][name] for name in ("LDL", "STL")}
        assert max(local.values()) <= spill_limit(), (label, local)
    products = {label: row for label, row in rows.items() if ON_TENSOR_CORES.search(label)}
    without = [label for label, row in products.items() if row["tensor_cores"] is None]
    assert products and not without, without
    assert_tf32_is_rounded(products)


def assert_tf32_is_rounded(products: dict[str, dict]) -> None:
    """By cvt.rna.tf32: left alone, tensor cores cut them off. bf16 has tf32 products at its edges. float32 has three
    for each of its own, whose operands were taken apart without it. `test_operands` tells which are rounded."""
    for precision in ("tf32", "bf16"):
        own = {label: row for label, row in products.items() if f" {precision} " in label}
        of_tf32 = {label: row for label, row in own.items() if row["tf32_products"]}
        assert {row["kernel"] for row in of_tf32.values()} == {row["kernel"] for row in own.values()}
        without = [label for label, row in of_tf32.items() if not (row["tf32_roundings"] and row["cvt_tf32"])]
        assert not without, without
    for label, row in products.items():
        if " fp32 " in label:
            assert row["tf32_products"] and row["tf32_products"] % 3 == 0, label
            assert not row["tf32_roundings"] and not row["cvt_tf32"], label


# ------------------------------------------------------------------------------------- what a kernel is seen to be

ODD_KERNELS = """
import triton
import triton.language as tl
from dql.kernels.triton.launch import Kernel

@triton.jit
def _product(a: "*op", b: "*op", out: "*fp32", BF16: tl.constexpr, R: tl.constexpr, H: tl.constexpr, HOW: tl.constexpr):
    r, h = tl.arange(0, R), tl.arange(0, H)
    x = tl.load(a + r[:, None] * H + h[None, :])
    for k in range(4):
        w = tl.load(b + k * H * H + h[:, None] * H + h[None, :])
        z = tl.dot(x, w, input_precision=HOW)
        x = tl.exp(z).to(x.dtype)
    tl.store(out + r[:, None] * H + h[None, :], x)

@triton.jit
def _angle(x: "*fp32", BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.sin(tl.load(x + i)))

@triton.jit
def _broken(x: "*fp32", BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), undefined_name)

def of(R, H, how, bf16):
    return Kernel.of(_product, num_warps=4, num_stages=2, BF16=bf16, R=R, H=H, HOW=how)

def every_kernel(arch):
    yield "small bf16", of(16, 64, "ieee", True)
    yield "small tf32", of(16, 64, "tf32", False)
    yield "small ieee", of(16, 64, "ieee", False)
    yield "tall bf16", of(64, 64, "ieee", True)
    yield "angle", Kernel.of(_angle, num_warps=4, BLOCK=128)
    if arch == 120:
        yield "huge bf16", of(128, 256, "ieee", True)
        yield "broken", Kernel.of(_broken, num_warps=4, BLOCK=128)
"""
Found = dict[tuple[str, int], aot.Examined]


@pytest.fixture(scope="module")
def examine_odd(tmp_path_factory):
    """Examines kernels made to be odd; TRITON_INTERPRET=1 here is no obstacle."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "odd_kernels.py").write_text(ODD_KERNELS)

    def run(*architectures: int, **options: object) -> Found:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(folder))
            patch.setenv("TRITON_INTERPRET", "1")
            found = aot.examine_all(architectures, listing="odd_kernels", **options)
        return {(e.label, e.arch): e for e in found}

    return run


@pytest.fixture(scope="module")
def odd(examine_odd) -> Found:
    """Every odd kernel, for every architecture."""
    told = []
    found = examine_odd(80, 90, 100, 120, jobs=2, progress=lambda *said: told.append(said))
    assert told == [(i, 22, label) for i, (label, _) in enumerate(found)]
    assert [e.label for e in found.values() if e.error] == ["broken"]
    assert all((e.report.arch, e.report.warps) == (e.arch, 4) for e in found.values() if e.report)
    return found


def of_label(found: Found, start: str) -> dict[tuple[str, int], aot.Report]:
    return {key: e.report for key, e in found.items() if key[0].startswith(start)}


def test_small_kernels_are_seen_as_they_are(odd):
    found = of_label(odd, "small")
    assert len(found) == 12
    for (label, arch), report in found.items():
        assert (report.kernel, report.limits) == ("product", aot.ARCHITECTURES[arch])
        assert (report.stack, report.spill_stores, report.spill_loads) == (0, 0, 0)
        assert aot.fits(report) is None
        count = report.instructions
        assert (count["LDL"], count["STL"]) == (0, 0)
        assert count["MUFU"] > 0 and count["BAR"] > 0
        assert count["total"] > sum(count[name] for name in aot.COUNTED)
        assert report.tensor_cores == (None if label == "small ieee" else "HMMA"), (label, arch)
        assert (report.tf32_products, report.tf32_roundings) == (int(label == "small tf32"), 0)
        # the product of 16 x 64 x 64 by 128 threads, FFMA2 doing two; on tensor cores exp alone multiplies
        multiplied = count["FFMA"] + 2 * count["FFMA2"]
        assert (multiplied >= 16 * 64 * 64 // 128) == (label == "small ieee"), (label, arch)
        assert 16 < report.registers < 255
        # weights go through shared memory: 64 x 64 of 2 or 4 bytes, the driver's own KB aside
        weight = 64 * 64 * (2 if label == "small bf16" else 4)
        assert weight <= report.shared <= 4 * weight and report.shared % 16 == 0
        assert report.blocks_per_sm >= 1 and report.warps_per_sm == 4 * report.blocks_per_sm
        assert report.seconds > 0.01


def test_wgmma_and_tcgen05_are_told_from_hmma(odd):
    kinds = {arch: report.tensor_cores for (_, arch), report in of_label(odd, "tall").items()}
    assert kinds == {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


def test_too_much_is_seen(odd):
    """The obvious kernel, a whole wide layer as one product: what the tests of ours must not let through."""
    report = odd["huge bf16", 120].report
    assert report.shared > 99 * 1024 and report.blocks_per_sm == 0
    assert (
        aot.fits(report) == f"it asks for {report.shared:,} bytes of shared memory; a block of sm_120 has {99 * 1024:,}"
    )
    assert report.spill_stores > 0 and report.spill_loads > 0 and report.stack > 0
    assert report.instructions["LDL"] > 0 and report.instructions["STL"] > 0


def test_local_memory_that_is_no_spill_is_seen(odd):
    for (_, arch), report in of_label(odd, "angle").items():
        assert (report.spill_stores, report.spill_loads) == (0, 0)
        local = (report.stack > 0, report.instructions["LDL"] > 0, report.instructions["STL"] > 0)
        assert all(local) or (not any(local) and spill_limit()), arch  # newer compilers do without
        assert (report.shared, report.tensor_cores) == (0, None)


def test_a_kernel_that_does_not_compile_hides_no_other(odd, monkeypatch, capsys):
    broken = odd["broken", 120]
    assert broken.report is None
    assert "undefined_name" in broken.error
    assert kernel_table.as_dict(broken) == {"label": "broken", "arch": 120, "error": broken.error}
    monkeypatch.setattr(kernel_table, "examine_all", lambda *_: [odd["angle", 120], broken])
    assert kernel_table.kernels("sm_120") == 1
    said = capsys.readouterr().out
    assert re.search(r"^broken: it does not compile: .*undefined_name", said, re.MULTILINE)
    assert re.search(r"│ angle +│", said) and re.search(r"│ broken +│", said)


def test_only_some_labels(examine_odd):
    assert list(examine_odd(90, 80, only="a*", jobs=1)) == [("angle", 90), ("angle", 80)]
    with pytest.raises(
        ValueError, match=r"no kernel's label matches 'x\*'; there are 5, such as \['angle', 'small bf16'"
    ):
        examine_odd(90, only="x*", jobs=1)
    with pytest.raises(ValueError, match="jobs must be at least 1, not 0"):
        examine_odd(90, jobs=0)


# -------------------------------------------------------------------------------------------------------- parts


def test_architectures():
    assert [aot.architecture(name) for name in ("sm_90", "sm_90a", "90", 90, " sm_120 ")] == [90, 90, 90, 90, 120]
    for name in ("sm_75", "sm90", "hopper", "", "9.0"):
        with pytest.raises(
            ValueError, match=re.escape(f"unknown architecture {name!r}; dql knows the limits of sm_80")
        ):
            aot.architecture(name)


def test_an_unknown_architecture_is_one_sentence(dql_here):
    for names in ("sm_75", "sm_90,sm_75"):
        line = dql_here("kernels", "--arch", names).refused()
        assert line == (
            "error: unknown architecture 'sm_75'; dql knows the limits of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"
        )


def test_without_triton_is_one_sentence(dql_here, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    dql_here("kernels").refused("the kernels are compiled by Triton, which is not installed here", "pip install triton")


def test_the_module_imports_no_triton():
    code = "import sys, dql.kernels.triton.aot, dql.kernel_table; print('triton' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


def test_broken_limits_are_named():
    assert aot.fits(FITTING) is None
    for change, part in (
        ({"shared": 227 * 1024 + 16}, "232,464 bytes of shared memory; a block of sm_90 has 232,448"),
        ({"warps": 64}, "64 warps; a block of sm_90 has at most 32"),
        ({"tensor_memory": 32}, "32 columns of tensor memory; sm_90 has 0"),
        ({"registers": 255, "warps": 16, "blocks_per_sm": 0}, "130,560 registers a block"),
    ):
        assert part in aot.fits(replace(FITTING, **change))
    assert aot.fits(replace(FITTING, shared=227 * 1024)) is None


def test_instructions_are_read():
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                  /* 0x00000a0000017a02 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R5], [R2.64] ;
        /*0020*/              @UP1 UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
        /*0030*/         @P3  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
.L_x_FFMA:
        /*10040*/                  FFMA.FTZ R1, R2, R3, R4 ;
        /*10050*/                  LDL.LU.64 R2, [R1] ;
        /*10060*/                  LDSM.16.M88.4 R4, [R8] ;
        /*10070*/                  NOP;
    """
    seen = {name: n for name, n in aot.count_instructions(sass).items() if n}
    assert seen == {"LDGSTS": 1, "UTCHMMA": 1, "HGMMA": 1, "FFMA": 1, "LDL": 1, "total": 7}
    assert set(aot.count_instructions("")) == {*aot.COUNTED, "total"}


def test_a_log_is_read():
    log = """ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Function properties for k
    320 bytes stack frame, 316 bytes spill stores, 300 bytes spill loads
ptxas-blackwell info    : Function properties for part_of_k
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
"""
    assert aot.parse_log(log) == (
        320,
        308,
        ("(C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized",),
    )
    with pytest.raises(RuntimeError, match="ptxas tells nothing of spills"):
        aot.parse_log("")


CALCULATOR = r"""
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
    int arch, optin, shared, warps, registers, used, block, asked;
    while (std::scanf("%d %d %d %d %d", &arch, &optin, &shared, &warps, &registers) == 5
           && std::scanf("%d %d %d", &used, &block, &asked) == 3) {
        cudaOccDeviceProp p;
        p.computeMajor = arch / 10, p.computeMinor = arch % 10;
        p.maxThreadsPerBlock = 1024, p.maxThreadsPerMultiprocessor = warps * 32, p.warpSize = 32, p.numSms = 1;
        p.regsPerBlock = p.regsPerMultiprocessor = registers;
        p.sharedMemPerBlock = 48 * 1024, p.sharedMemPerBlockOptin = optin;
        p.sharedMemPerMultiprocessor = shared, p.reservedSharedMemPerBlock = 1024;
        cudaOccFuncAttributes f;
        f.maxThreadsPerBlock = 1024, f.numRegs = used, f.numBlockBarriers = 1;
        f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, f.maxDynamicSharedSizeBytes = optin;
        cudaOccDeviceState s;
        cudaOccResult r;
        int error = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &f, &s, block * 32, asked);
        std::printf("%d\n", error ? -error : r.activeBlocksPerMultiprocessor);
    }
}
"""


def test_occupancy_is_nvidias(tmp_path):
    """Against NVIDIA's own calculator, a C header that Triton's wheel carries."""
    triton = Path(importlib.util.find_spec("triton").origin).parent
    include, compiler = triton / "backends/nvidia/include", shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not (include / "cuda_occupancy.h").exists():
        pytest.skip("needs a C++ compiler and Triton's cuda_occupancy.h")
    (tmp_path / "calculator.cpp").write_text(CALCULATOR)
    program = tmp_path / "calculator"
    subprocess.run([compiler, f"-I{include}", "-w", tmp_path / "calculator.cpp", "-o", program], check=True)
    cases = list(
        itertools.product(
            aot.ARCHITECTURES,
            (16, 32, 33, 40, 64, 80, 96, 128, 168, 200, 255),
            (1, 2, 4, 5, 8, 16, 32),
            (0, 1, 1024, 8_200, 33_000, 49_152, 70_000, 99 * 1024, 110_000, 163 * 1024, 227 * 1024, 230 * 1024),
        )
    )
    lines = []
    for arch, registers, warps, shared in cases:
        limits = aot.ARCHITECTURES[arch]
        sizes = (limits.shared_per_block, limits.shared, limits.warps, limits.registers)
        lines.append(" ".join(map(str, (arch, *sizes, registers, warps, shared))))
    said = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    want = [int(line) for line in said.stdout.split()]
    assert len(want) == len(cases) and min(want) == 0 and max(want) == 32
    got = [aot.occupancy(*case) for case in cases]
    wrong = [(case, g, w) for case, g, w in zip(cases, got, want, strict=True) if g != w]
    assert not wrong, (len(wrong), wrong[:5])


def test_tensor_memory_limits_blocks():
    for columns, blocks in ((0, 16), (16, 16), (32, 16), (96, 4), (128, 4), (256, 2), (512, 1)):
        assert aot.occupancy(100, 32, 4, 0, columns) == blocks
