"""Beta schedules and step tables against the transcription and by hand."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import transcription
from support.cases import TOLERANCES, assert_close

from dql import DiffusionPolicy, NoiseSchedule, StepTable, cli, sample
from dql.schedule import BETA_SCHEDULES, SAMPLERS

LENGTHS = [1, 2, 5, 15, 50, 1000]
STEPS = [(T, K) for T in LENGTHS for K in (1, 2, 5, 15, 50, 1000) if K <= T]
KEEP_THE_MEAN = {"ddpm", "ddim", "dpm-solver++"}  # exactly, whatever the size of a step; Euler's method does not
DERIVED = [
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "posterior_variance",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
]


def columns(table: StepTable) -> dict[str, torch.Tensor]:
    rows = torch.tensor(table.rows, dtype=torch.float64)  # [K, 6]
    return dict(zip(("a", "b", "c0", "cx", "cp", "s"), rows.unbind(1), strict=True))


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_schedule_equals_the_transcription(name, T):
    schedule, want = NoiseSchedule(name, T), transcription.make_schedule(name, T)
    for quantity in DERIVED:
        got = getattr(schedule, quantity)
        assert got.dtype == np.float64
        tensor = torch.from_numpy(got)
        assert_close(tensor, getattr(want, quantity), TOLERANCES["schedule"], what=quantity, case=f"{name} T={T}")


def test_vp_by_hand():
    # -0.1/5 - 0.5 * 9.9 * (2t - 1)/25
    want = [1 - math.exp(-0.02 - 0.198 * odd) for odd in (1, 3, 5, 7, 9)]
    assert NoiseSchedule("vp", 5).betas.tolist() == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_ddpm_table_is_the_published_posterior(name, T):
    """With all steps the rows are the published buffers, in descending t."""
    table = columns(StepTable.ddpm(NoiseSchedule(name, T)))
    want = transcription.make_schedule(name, T)
    expected = {
        "a": want.sqrt_recip_alphas_cumprod,
        "b": want.sqrt_recipm1_alphas_cumprod,
        "c0": want.posterior_mean_coef1,
        "cx": want.posterior_mean_coef2,
        "cp": torch.zeros(T, dtype=torch.float64),
        "s": (0.5 * want.posterior_log_variance_clipped).exp(),
    }
    expected["s"][0] = 0.0  # no noise at t = 0
    for column, values in expected.items():
        # 1 - alpha_t loses what its size, 1e-4, lacks to 1
        tolerance = dataclasses.replace(TOLERANCES["schedule"], rel=3e-12)
        assert_close(table[column], values.flip(0), tolerance, what=column, case=f"{name} T={T}")


def small_denoiser() -> dict[str, torch.Tensor]:
    """Parameters under which the transcription's denoiser is eps(x) = 0.3 + 0.8 mish(x); A = S = 1.

    A constant eps would not do: its x0 is the same in every step, and a multistep rule has nothing to extrapolate.
    """
    shapes = {"time_mlp.1": (32, 16), "time_mlp.3": (16, 32), "mid_layer.0": (1, 18), "final_layer": (1, 1)}
    params = {}
    for name, shape in shapes.items():
        params[f"{name}.weight"] = torch.zeros(shape, dtype=torch.float64)
        params[f"{name}.bias"] = torch.zeros(shape[0], dtype=torch.float64)
    params["mid_layer.0.weight"][0, 0] = 1.0
    params["final_layer.weight"] += 0.8
    params["final_layer.bias"] += 0.3
    return params


def run_table(table: StepTable, noise: torch.Tensor, max_action: float) -> torch.Tensor:
    x, x0_previous = noise[0], torch.zeros_like(noise[0])
    for k, (a, b, c0, cx, cp, s) in enumerate(table.rows):
        eps = 0.3 + 0.8 * transcription.mish(x)
        x0 = (a * x - b * eps).clamp(-max_action, max_action)
        x = c0 * x0 + cx * x + cp * x0_previous + (s * noise[k + 1] if s else 0.0)
        x0_previous = x0
    return x.clamp(-max_action, max_action)


@pytest.mark.parametrize(("T", "K"), STEPS)
@pytest.mark.parametrize("sampler", [*SAMPLERS, "ddim 0.5"])
def test_tables_do_what_the_papers_say(sampler, T, K):
    """The table run on a small denoiser equals the transcription's own form of the sampler, clamped or not."""
    generator = torch.Generator().manual_seed(T * 1001 + K)
    noise = torch.randn(K, 3, 1, generator=generator, dtype=torch.float64)
    states = torch.zeros(3, 1, dtype=torch.float64)
    for name in BETA_SCHEDULES if K < 1000 else ("vp",):
        schedule, reference = NoiseSchedule(name, T), transcription.make_schedule(name, T)
        timesteps = transcription.spaced_timesteps(T, K)
        stochasticity = 0.5 if sampler == "ddim 0.5" else 0.0
        table = (
            StepTable.ddim(schedule, K, stochasticity=stochasticity)
            if sampler.startswith("ddim")
            else StepTable.make(sampler, schedule, K)
        )
        assert list(table.timesteps) == timesteps
        assert table.num_steps == K
        for max_action in (1.0, 1e6):  # 1e6: never clamped
            extra = (stochasticity,) if stochasticity else ()
            chain = transcription.CHAINS[sampler.partition(" ")[0]]
            want = chain(small_denoiser(), reference, states, noise, max_action, timesteps, *extra)
            got = run_table(table, noise, max_action)
            # x_T / sqrt(abar_T) and its like cancel down to the action: 1e-16 of the largest a
            scale = max(row[0] for row in table.rows)
            tolerance = dataclasses.replace(TOLERANCES["schedule"], abs=1e-12 * scale)
            case = f"{name} T={T} K={K} max_action={max_action:g}"
            assert_close(got, want, tolerance, what="action", case=case, backend=sampler)


@pytest.mark.parametrize(("T", "K"), STEPS)
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_ddim_of_full_stochasticity_is_ddpm(name, T, K):
    schedule = NoiseSchedule(name, T)
    ddim, ddpm = columns(StepTable.ddim(schedule, K, stochasticity=1.0)), columns(StepTable.ddpm(schedule, K))
    for column in ddpm:
        # 1 - abar_next - s^2 cancels where the variance is nearly all of it
        tolerance = dataclasses.replace(TOLERANCES["schedule"], rel=1e-11, abs=1e-11)
        assert_close(ddim[column], ddpm[column], tolerance, what=column, case=f"{name} T={T} K={K}")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_predicting_x0_only_exchanges_a_and_b(sampler):
    schedule = NoiseSchedule("vp", 5)
    eps, x0 = (columns(StepTable.make(sampler, schedule, predict_epsilon=p)) for p in (True, False))
    assert x0["a"].tolist() == [0.0] * 5
    assert x0["b"].tolist() == [-1.0] * 5
    for column in ("c0", "cx", "cp", "s"):
        assert torch.equal(eps[column], x0[column])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SAMPLERS), st.sampled_from(BETA_SCHEDULES), st.integers(1, 1000), st.data())
def test_any_table_is_sound(sampler, name, T, data):
    K = data.draw(st.integers(1, T), label="K")
    table = StepTable.make(sampler, NoiseSchedule(name, T), K)
    assert len(table.rows) == len(table.timesteps) == K
    assert table.timesteps[0] == T - 1
    assert K == 1 or table.timesteps[-1] == 0
    assert all(t > u for t, u in zip(table.timesteps, table.timesteps[1:], strict=False))  # none twice
    rows = np.array(table.rows)
    assert np.isfinite(rows).all()
    assert rows[-1, 5] == 0
    if sampler not in KEEP_THE_MEAN:
        return
    # without a clamp x' keeps the marginal's mean: x = sqrt(abar) x0 goes to sqrt(abar_next) x0
    bar = NoiseSchedule(name, T).alphas_cumprod[list(table.timesteps)]
    after = np.append(bar[1:], 1.0)
    _, _, c0, cx, cp, _ = rows.T
    np.testing.assert_allclose(c0 + cp + cx * np.sqrt(bar), np.sqrt(after), rtol=1e-9)


def test_make_gives_the_named_table():
    schedule = NoiseSchedule("vp", 5)
    assert StepTable.make("ddpm", schedule) == StepTable.ddpm(schedule)
    assert StepTable.make("ddim", schedule, 2) == StepTable.ddim(schedule, 2)
    assert StepTable.make("dpm-solver++", schedule, 5) == StepTable.dpm_solver_pp_2m(schedule)
    assert StepTable.ddpm(schedule).sampler == "ddpm"


@pytest.mark.parametrize("T", [0, -1, 1001, 2.5, "5", None, True])
def test_bad_T(T):
    with pytest.raises(ValueError, match=r"T must be an integer from 1 to 1000, got "):
        NoiseSchedule("vp", T)


def test_unknown_schedule():
    with pytest.raises(ValueError, match=r"unknown beta schedule 'cubic'; known: vp, linear, cosine"):
        NoiseSchedule("cubic", 5)


@pytest.mark.parametrize("num_steps", [0, 6, -1, 2.0, True, "3"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bad_num_steps(sampler, num_steps):
    for good in (1, 2, 3):  # their tables are kept: True == 1 and 2.0 == 2 must not find them
        StepTable.make(sampler, NoiseSchedule("vp", 5), good)
    with pytest.raises(ValueError, match=r"num_steps must be an integer from 1 to the 5 steps .* got "):
        StepTable.make(sampler, NoiseSchedule("vp", 5), num_steps)


def test_unknown_sampler():
    known = re.escape(", ".join(SAMPLERS))
    with pytest.raises(ValueError, match=f"unknown sampler 'none such'; known: {known}, or a StepTable"):
        StepTable.make("none such", NoiseSchedule())


def test_who_takes_a_samplers_name_says_which_there_are():
    for takes in (sample, DiffusionPolicy.export_onnx, cli.export):
        for name in SAMPLERS:
            assert name in (takes.__doc__ or ""), (takes, name)


@pytest.mark.parametrize("stochasticity", [-0.1, 1.1, float("nan")])
def test_bad_stochasticity(stochasticity):
    with pytest.raises(ValueError, match="stochasticity must be from 0 to 1, got "):
        StepTable.ddim(NoiseSchedule(), stochasticity=stochasticity)


@pytest.mark.parametrize(
    ("rows", "timesteps", "sentence"),
    [
        (((1, 1, 1, 0, 0, 0),), (4, 0), "one timestep per row, got 1 rows, 2 timesteps"),
        ((), (), "one timestep per row, got 0 rows, 0 timesteps"),
        (((1, 1, 1, 0, 0, 0),), (5,), r"timesteps \(5,\) do not fit a policy trained with T = 5"),
        (((1, 1, 1, 0, 0, 0),), (-1,), "do not fit a policy trained with T = 5"),
        (((1, 1, 1, 0, 0, 0.1),), (0,), "the last row of a step table adds noise: its s must be 0"),
        (((1, 1, 1, 0, 0.5, 0),), (0,), "cp"),  # there is no x0 before the first step
        (((1, 1, 1, 0, 0),), (0,), "six|6"),
        (((1, 1, float("nan"), 0, 0, 0),), (0,), "NaN|finite"),
    ],
)
def test_hand_made_tables_that_no_policy_can_run(rows, timesteps, sentence):
    policy = DiffusionPolicy(3, 2, hidden_dim=16)
    with pytest.raises(ValueError, match=sentence):
        sample(torch.zeros(1, 3), policy, sampler=StepTable("mine", rows, timesteps), seed=0)
