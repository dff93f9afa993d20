"""What nvcc made of the CUDA kernels, without a GPU: registers and spills as ptxas told them when the extension was
built, instructions as the disassembler shows them, and that the tilings that are chosen fit."""

import importlib.util
import json
import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from support.emulator import HEIGHTS

from dql.kernel_table import cuda_kernels
from dql.kernels import build_record
from dql.kernels.cuda import binding
from dql.kernels.cuda import plan as cuda_plan
from dql.kernels.cuda.plan import SOLO_ROWS, WIDE, Problem, Tiling
from dql.kernels.layout import CriticSpec, DenoiserSpec
from dql.kernels.triton import aot

RECORD = build_record.record(build_record.CUDA) or {}
built = pytest.mark.skipif(
    not RECORD.get("built"), reason=f"the CUDA extension {RECORD.get('reason') or 'was never built'}"
)
CHAINS = {
    f"chain {precision} m{m} {weights} {direction}"
    for precision, heights in HEIGHTS.items()
    for m in heights
    for weights in ("resident", "streamed")
    for direction in ("forward", "backward")
}
FIRST_LAYERS = ("", " with the states' part", " with the states' part, floats from L2")
WIDES = {f"wide_chain {width}{first}" for width in (128, 256) for first in FIRST_LAYERS}
SOLOS = {
    f"solo_chain {width} of {rows} rows {what}"
    for width in (128, 256)
    for rows in SOLO_ROWS
    for what in ("forward", "saving", "backward")
    if rows > 4 or what == "forward"
}
OTHERS = {"prologue", "products", "finish", "choose", "noise", "begin", "critic_loss", "q_loss", "squares", "adam"}


@built
def test_every_kernel_is_built_for_every_architecture():
    found = Counter((row["kernel"], row["arch"]) for row in RECORD["resources"])
    assert set(found.values()) == {1}
    for arch in RECORD["architectures"]:
        assert {name for name, of in found if of == arch} == CHAINS | SOLOS | OTHERS
    assert {name for name, of in found if of == "90a"} == WIDES


@built
def test_no_kernel_spills_or_has_a_stack():
    for row in RECORD["resources"]:
        assert (row["spill_stores"], row["spill_loads"], row["stack"]) == (0, 0, 0), row
        assert row["registers"] <= 255, row


@built
def test_resident_weights_are_for_architectures_with_clusters():
    """Elsewhere the kernel is empty: nothing chooses it, and nothing of it can run."""
    for row in RECORD["resources"]:
        if "resident" in row["kernel"]:
            assert (row["registers"] < 16) == (int(row["arch"]) < 90), row


@cache
def sass() -> str:
    """The machine code of all kernels."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the disassembler comes with Triton, which is not installed: pip install triton (Linux only)")
    import triton

    extension = Path(build_record.__file__).parent / build_record.CUDA.file
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", str(extension)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def disassembly() -> dict[str, dict[str, Counter]]:
    """architecture -> kernel -> instructions."""
    rows: dict[str, dict[str, Counter]] = {}
    arch = ""
    for part in re.split(r"(?=arch = sm_|Function : )", sass()):
        if head := re.match(r"arch = sm_(\w+)", part):
            arch = head[1]
        elif head := re.match(r"Function : (\w+)", part):
            rows.setdefault(arch, {})[head[1]] = aot.instructions(part)
    return rows


def mangled(name: str) -> re.Pattern:
    """Of "chain bf16 m1 resident forward"."""
    _, precision, m, weights, direction = name.split()
    number = binding.PRECISIONS.index(precision)
    flags = f"ELb{int(weights == 'resident')}ELb{int(direction == 'backward')}E"
    return re.compile(rf"12chain_kernel.*PrecisionE{number}ELi{m[1:]}{flags}")


def counted(arch: str, name: str) -> Counter:
    (found,) = (count for label, count in disassembly()[arch].items() if mangled(name).search(label))
    return found


@built
@pytest.mark.parametrize("name", sorted(CHAINS))
def test_instructions(name):
    """Tensor cores in tf32 and bf16, none in fp32; no address whose kind of memory is unknown; copies as planned."""
    for arch in RECORD["architectures"]:
        if "resident" in name and int(arch) < 90:
            continue
        count = counted(arch, name)
        assert (count["HMMA"] > 0) == ("fp32" not in name)
        assert count["LD"] == count["ST"] == count["LDL"] == count["STL"] == 0
        assert (count["LDGSTS"] > 0) == ("streamed" in name), "cp.async"
        if "resident" in name:
            assert count["UBLKCP"] > 0, "bulk copies of the weights"
            assert count["STAS"] > 0, "stores to other blocks that carry their notice"
            assert count["UCGABAR_ARV"] + count["CGABAR"] <= 4, "barriers of the cluster: at the start and at the end"


@built
def test_solo_blocks_keep_their_weights_in_registers():
    """Each product once, at most one of them with its weights from shared memory; nothing of another block's."""
    for arch in RECORD["architectures"]:
        found = 0
        for label, count in disassembly()[arch].items():
            name = re.search(r"solo_chain_kernelILi(\d+)ELi(\d+)E", label)
            if name is None:
                continue
            found += 1
            m_tiles, n_tiles, groups = int(name[1]) // 128, max(8, int(name[2])) // 8, int(name[1]) // 32
            assert count["HMMA"] == 2 * (2 * m_tiles * n_tiles * groups), "one product from each place, unrolled"
            assert count["LD"] == count["ST"] == count["LDL"] == count["STL"] == 0
            assert count["STAS"] == count["UBLKCP"] == count["LDGSTS"] == count["CCTL"] == 0
            assert count["CALL"] == 0 or int(arch) < 90, "before Hopper shuffles may be calls"
        assert found == len(SOLOS)


@built
def test_the_prologue_divides_32_bits():
    """A division of 64 is a call, where everything else is inlined (before Hopper shuffles may be calls too)."""
    for arch in (arch for arch in RECORD["architectures"] if int(arch) >= 90):
        (count,) = (count for name, count in disassembly()[arch].items() if "prologue" in name)
        assert count["CALL"] == 0


@built
def test_no_bound_swallows_nan():
    """Clamps and activations keep it: the actions of states that are not finite are NaN."""
    kinds = Counter(re.findall(r"FMNMX[.\w]*", sass()))
    assert set(kinds) == {"FMNMX.NAN"}


@built
def test_float32_products_load_little_for_their_multiply_adds():
    """In the loop over k-groups, that of streamed weights: 12 loads of 16 bytes for 128, 16 for 256. With the 18 and 34
    of all rows by two columns, shared memory bounded them."""
    seen = Counter()
    for part in sass().split("Function : ")[1:]:
        name = part.split(maxsplit=1)[0]
        if (chain := re.search(r"12chain_kernel\w*PrecisionE0ELi(\d)ELb0E", name)) is None:
            continue
        code = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;/]*);", part)]
        ends = ((at, re.search(r"BRA (0x[0-9a-f]+)", line)) for at, line in code)
        bodies = [[line for at, line in code if int(to[1], 16) <= at <= end] for end, to in ends if to]
        rows = int(chain[1])
        expected = {1: (128, 12), 2: (256, 16)}[rows]
        counts = {tuple(sum(what in line for line in body) for what in ("FFMA", "LDS.128")) for body in bodies}
        assert expected in counts, (name, counts)
        seen[rows] += 1
    assert seen[1] == seen[2] >= 2


@built
def test_a_wait_within_a_block_leaves_its_l1_cache():
    """An acquire of the cluster's scope empties it: twice in a kernel, where the cluster meets, never in a loop. One
    of the GPU's does, where the tiles of a cloned batch are counted."""
    for arch, kernels in disassembly().items():
        for name, count in kernels.items():
            meets = 2 if "chain_kernel" in name and arch != "80" and "wide" not in name else 0
            assert count["CCTL"] <= meets + counts_tiles(name), (arch, name)


def counts_tiles(name: str) -> bool:
    return re.search(r"12chain_kernelI\w*ELb0EEE", name) is not None  # forward


@built
def test_a_cluster_leaves_without_waiting_for_its_writes():
    """A release of the GPU's scope is where the cluster meets first, and where the tiles of a cloned batch are counted;
    at the end nothing is to be seen any more."""
    for part in sass().split("Function : ")[1:]:
        name = part.split(maxsplit=1)[0]
        if "chain_kernel" in name:
            assert part.count("MEMBAR.ALL.GPU") <= 1 + counts_tiles(name)


@built
def test_many_rows_have_hoppers_tensor_cores():
    kernels = {name: count for name, count in disassembly()["90a"].items() if "wide_chain" in name}
    assert len(kernels) == len(WIDES)
    for count in kernels.values():
        assert count["HGMMA"] > 0 and count["HMMA"] > 0
        assert count["LDL"] == count["STL"] == 0
        assert count["STSM"] > 0, "matrices of results to shared memory"
        assert count["UBLKCP"] > 0
        assert count["USETMAXREG"] == 2


@built
def test_products_of_128_rows_see_what_was_stored_before():
    """The fence between stores and the tensor cores' reads, which the emulator does without."""
    for part in sass().split("Function : ")[1:]:
        if "wide_chain" in part.split(maxsplit=1)[0]:
            product = part.index("HGMMA")
            start = part.rindex("USETMAXREG", 0, product)  # of the consumers; barriers have fences of their own before
            assert "FENCE.VIEW.ASYNC" in part[start:product]


# Shared memory of what is chosen, for GPUs that are not here

needs_sizes = pytest.mark.usefixtures("emulated")
GPUS = {  # compute capability, multiprocessors, shared memory of a block, tiles of 128 rows
    "A100": (80, 108, aot.ARCHITECTURES[80].shared_per_block, False),
    "RTX 4090": (89, 128, aot.ARCHITECTURES[89].shared_per_block, False),
    "H200": (90, 132, aot.ARCHITECTURES[90].shared_per_block, True),
    "B200": (100, 148, aot.ARCHITECTURES[100].shared_per_block, False),
    "RTX 5090": (120, 170, aot.ARCHITECTURES[120].shared_per_block, False),
}
SPECS = [
    DenoiserSpec(17, 6),
    DenoiserSpec(11, 3, 128),
    DenoiserSpec(45, 24),
    DenoiserSpec(60, 9, 512, 4),
    CriticSpec(17, 6),
]


@pytest.fixture(params=GPUS)
def gpu(request, monkeypatch) -> str:
    monkeypatch.setattr(binding, "facts", lambda ordinal, emulated: GPUS[request.param])
    cuda_plan._chosen.cache_clear()
    yield request.param
    cuda_plan._chosen.cache_clear()


@needs_sizes
@pytest.mark.parametrize("precision", binding.PRECISIONS)
@pytest.mark.parametrize(
    "spec", SPECS, ids=lambda s: f"{type(s).__name__} H{s.hidden_dim}x{s.num_hidden} A{s.action_dim}"
)
def test_what_is_chosen_fits(gpu, spec, precision):
    capability, _, shared, _ = GPUS[gpu]
    for rows in (1, 50, 256, 2500, 65536):
        for saving in (False, True):
            problem = Problem(spec, precision, rows, 5, 1, saving)
            if cuda_plan.misfit(problem, 0) is not None:
                assert (spec.hidden_dim, shared) == (512, 99 * 1024), "only the largest networks do not fit small GPUs"
                continue
            tiling = cuda_plan.choose(problem, 0)
            assert cuda_plan.shared_bytes(problem, tiling) <= shared
            assert tiling.resident is False or capability >= 90 or tiling.solo
            assert tiling.m_tiles != WIDE or (precision == "bf16" and not saving)


@needs_sizes
def test_on_an_h200_few_rows_are_spread_and_many_are_not(monkeypatch):
    """What the model says of the published sizes in bf16."""
    monkeypatch.setattr(cuda_plan, "_at_once", lambda problem, tiling, ordinal, emulated: 132 // tiling.cluster)
    monkeypatch.setattr(binding, "facts", lambda ordinal, emulated: GPUS["H200"])
    cuda_plan._chosen.cache_clear()
    chosen = {rows: cuda_plan.choose(Problem(SPECS[0], "bf16", rows, 5, 1, False), 0) for rows in (1, 256, 65536)}
    cuda_plan._chosen.cache_clear()
    assert chosen[1] == chosen[256] == Tiling.alone(4)
    assert chosen[65536] == Tiling(1, WIDE, False)


@needs_sizes
@pytest.mark.parametrize(("action_dim", "remedy"), [(9, "precision='bf16' or "), (64, "")])
def test_a_network_that_does_not_fit_says_so(gpu, action_dim, remedy):
    """bf16 is offered only where it would fit."""
    problem = Problem(DenoiserSpec(60, action_dim, 512, 4), "fp32", 1, 5, 1, False)
    said = cuda_plan.misfit(problem, 0)
    if GPUS[gpu][2] < 160 * 1024:
        expected = (
            r"a network of these sizes needs \d+ KB of shared memory in fp32, and a block of this GPU has 99 KB; "
            rf"use {remedy}backend='triton'"
        )
        assert re.fullmatch(expected, said)
        with pytest.raises(ValueError, match="shared memory in fp32"):
            cuda_plan.choose(problem, 0)
    else:
        assert said is None


# `dql kernels --backend cuda`


@built
def test_the_table_and_what_it_refuses(capsys):
    assert cuda_kernels(only="chain bf16 m1*,choose", as_json=True) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["kernel"].split()[0] for row in rows} == {"chain", "choose"}
    assert all(row in RECORD["resources"] for row in rows)
    assert cuda_kernels(only="wide_chain 256") == 0
    assert "90a" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no kernel's name matches 'nonsense'; there are \d+, such as \["):
        cuda_kernels(only="nonsense")


def test_the_table_without_the_extension(monkeypatch):
    sentence = "it was not built: nvcc was not found when dql was installed; install the CUDA toolkit"
    monkeypatch.setattr(build_record, "record", lambda of: {"built": False, "reason": sentence})
    with pytest.raises(ImportError, match=sentence):
        cuda_kernels()


@needs_sizes
def test_code_that_stands_in_for_a_newer_gpus_has_no_clusters(monkeypatch):
    """DQL_CUDA_ARCHS=80 on an H200: the driver compiles the PTX of 80, in which the resident kernels are empty."""

    class Stand:
        device = staticmethod(lambda ordinal: (90, 132, 227 * 1024))
        compiled_for = staticmethod(lambda ordinal: 80)
        can_run_wide = staticmethod(lambda ordinal: False)

    with monkeypatch.context() as patch:
        patch.setattr(binding, "load", lambda emulated: Stand)
        binding.facts.cache_clear()
        found = binding.facts(0, True)
    binding.facts.cache_clear()
    assert found == (80, 132, 227 * 1024, False)
    monkeypatch.setattr(binding, "facts", lambda ordinal, emulated: found)
    cuda_plan._chosen.cache_clear()
    chosen = cuda_plan.choose(Problem(SPECS[0], "bf16", 256, 5, 1, False), 0)
    cuda_plan._chosen.cache_clear()
    assert chosen.cluster == 1 and chosen.m_tiles != WIDE


@needs_sizes
def test_a_device_that_places_no_cluster_gets_none(monkeypatch):
    """As a share of a GPU may (MIG, MPS)."""
    monkeypatch.setattr(binding, "facts", lambda ordinal, emulated: GPUS["H200"])
    monkeypatch.setattr(cuda_plan, "_at_once", lambda problem, tiling, *device: 132 if tiling.cluster == 1 else 0)
    cuda_plan._chosen.cache_clear()
    chosen = cuda_plan.choose(Problem(SPECS[0], "bf16", 256, 5, 1, False), 0)
    cuda_plan._chosen.cache_clear()
    assert chosen.cluster == 1
