"""Every kernel that the heuristic of `tiles` can pick for the sizes that people use, to be compiled ahead of time."""

from collections.abc import Iterator

from ..layout import CriticSpec, DenoiserSpec
from . import actor, begin, chain_gradients, critic_gradients, prologue, update
from . import chain as reverse_diffusion
from . import critic as twin_critic
from . import noise as triton_noise
from .launch import Kernel
from .packing import rounded
from .tiles import Shape, Tile, heuristic

PROCESSORS = 128  # of the GPU that the numbers of rows below are for
ROWS = (1, 32 * PROCESSORS, 1024 * PROCESSORS)  # one tile; more than 16 rows a multiprocessor; very many
SPECS = {
    "H64": DenoiserSpec(17, 6, 64),
    "H128": DenoiserSpec(17, 6, 128),
    "H256": DenoiserSpec(17, 6, 256),
    "H512": DenoiserSpec(17, 6, 512),
    "H256 A24": DenoiserSpec(45, 24, 256),
    "H256 wide": DenoiserSpec(512, 64, 256, 4),
}


def every_kernel(arch: int) -> Iterator[tuple[str, Kernel]]:
    """(label, kernel), for compute capability `arch`; labels name kernel, precision, sizes and tile."""
    for title, spec in SPECS.items():
        for precision in ("fp32", "tf32", "bf16"):
            yield f"prologue {precision} {title}", prologue.prologue_kernel(spec, precision)
            yield f"prologue {precision} {title} counting", prologue.prologue_kernel(spec, precision, True)
            for rows in ROWS:
                yield from _chain(arch, spec, precision, rows, title)
            yield f"chain_products {precision} {title}", chain_gradients.products_kernel(spec, precision, True)
            yield f"chain_products {precision} {title} states", chain_gradients.products_kernel(spec, precision, False)
            yield (
                f"chain_products {precision} {title} loss",
                chain_gradients.products_kernel(spec, precision, True, True),
            )
            yield f"chain_finish {precision} {title}", chain_gradients.finish_kernel(spec, precision)
            yield from _critic(arch, critic_spec(spec), precision, title)
    yield "noise A6", triton_noise.noise_kernel(6)
    yield "critic_finish", critic_gradients.critic_finish_kernel()
    for candidates in (50, 1024):
        block = twin_critic.choose_block(candidates)
        yield f"choose N{candidates}", twin_critic.choose_kernel(6, block)
    yield "begin S17 A6", begin.begin_kernel(17, 6)
    yield "critic_loss", update.critic_loss_kernel()
    yield "q_loss", update.q_loss_kernel()
    yield "squares", update.squares_kernel()
    yield "adam", update.adam_kernel(False)
    yield "adam average", update.adam_kernel(True)


def critic_spec(spec: DenoiserSpec) -> CriticSpec:
    """Critics of a denoiser's sizes."""
    return CriticSpec(spec.state_dim, spec.action_dim, spec.hidden_dim, spec.num_hidden)


def _critic(arch: int, spec: CriticSpec, precision: str, title: str) -> Iterator[tuple[str, Kernel]]:
    yield f"prologue critic {precision} {title}", prologue.prologue_kernel(spec, precision)
    seen = set()
    for rows in ROWS:
        for kind in ("forward", "saving", "backward"):
            tile = _tile(arch, spec, precision, rows, kind)
            if (kind, tile) in seen:
                continue
            seen.add((kind, tile))
            label = f"{precision} {title} R{tile.rows}"
            if kind == "backward":
                yield f"critic_bwd {label}", twin_critic.critic_bwd_kernel(spec, precision, tile, True, True)
                yield (
                    f"critic_bwd {label} only",
                    twin_critic.critic_bwd_kernel(spec, precision, tile, True, False, True),
                )
            else:
                saving = kind == "saving"
                yield (
                    f"critic_fwd {label}{' saving' * saving}",
                    twin_critic.critic_fwd_kernel(spec, precision, tile, saving),
                )
    yield f"critic_products {precision} {title}", critic_gradients.critic_products_kernel(spec, precision, True)


def _chain(arch: int, spec: DenoiserSpec, precision: str, rows: int, title: str) -> Iterator[tuple[str, Kernel]]:
    for kind in ("forward", "saving", "backward"):
        tile = _tile(arch, spec, precision, rows, kind)
        if rows != ROWS[0] and tile in [_tile(arch, spec, precision, r, kind) for r in ROWS if r < rows]:
            continue
        label = f"{precision} {title} R{tile.rows}"
        if kind == "backward":
            yield f"chain_bwd {label}", reverse_diffusion.chain_bwd_kernel(spec, precision, tile)
            yield f"actor_bwd {label}", actor.actor_bwd_kernel(spec, precision, tile)
        else:
            if kind == "saving":
                yield f"actor_fwd {label}", actor.actor_fwd_kernel(spec, precision, tile, True)
            kernel = reverse_diffusion.chain_fwd_kernel(spec, precision, tile, False, kind == "saving")
            yield f"chain_fwd {label}{' saving' if kind == 'saving' else ''}", kernel


def _tile(arch: int, spec: DenoiserSpec | CriticSpec, precision: str, rows: int, kind: str) -> Tile:
    HP, AP = rounded(spec.hidden_dim), rounded(spec.action_dim)
    return heuristic(arch, PROCESSORS, Shape(kind, HP, precision == "bf16", rows, AP))
