"""One more call for a later time: the samples stay, and PARTIAL steps read the context between two FULL calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from pipelines import ROWS
from test_optimal import calibration_of
from test_predict import GRID, Drifting, N, error

import hetcache_compile as hetcache
from hetcache_compile import LookAhead, PlanError
from hetcache_compile.bench.methods import parse_method, parse_methods
from hetcache_compile.bench.quality import Settings, bench_quality, frames_file, load_frames
from hetcache_compile.edit.editing import load_pipeline
from hetcache_compile.edit.media import Clip
from hetcache_compile.plan.schedule import make_schedule
from hetcache_compile.reference.demo import save_random_checkpoint

VACE = next(row for row in ROWS if row.name == "WanVACEPipeline")
STEPS = 5


def euler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def unipc() -> Any:
    return VACE.build().scheduler


def sample(scheduler: Any, velocity: Callable[[torch.Tensor, Any], torch.Tensor], **returned: Any) -> torch.Tensor:
    """What a pipeline does with a scheduler."""
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    for time in scheduler.timesteps:
        output = scheduler.step(velocity(latents, time), time, latents, **returned)
        latents = output[0] if returned else output.prev_sample
    return latents


@pytest.mark.parametrize("make", [euler, unipc])
def test_the_samples_are_those_of_the_scheduler(make: Callable[[], Any]) -> None:
    def velocity(latents: torch.Tensor, time: Any) -> torch.Tensor:
        return torch.tanh(latents * 2 + time / 500)

    expected = sample(make(), velocity)
    assert torch.equal(sample(LookAhead(make()), velocity), expected)
    assert torch.equal(sample(LookAhead(make(), at=0.7), velocity, return_dict=False), expected)


@pytest.mark.parametrize("make", [euler, unipc])
def test_the_second_call_is_where_a_straight_path_leads(make: Callable[[], Any]) -> None:
    noise, clean = torch.randn(2, 1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    calls: list[tuple[float, torch.Tensor]] = []

    def velocity(latents: torch.Tensor, time: Any) -> torch.Tensor:
        calls.append((float(time), latents))
        return noise - clean

    scheduler = LookAhead(make(), at=0.4)
    sample(scheduler, velocity)
    (first, start), (ahead, seen), *later = calls
    assert len(later) == STEPS - 1
    assert later[0][0] < first
    assert ahead == pytest.approx(0.4 * first, abs=1)
    assert ahead not in [time for time, _ in later]
    sigma = ahead / first * float(scheduler.sigmas[0])
    expected = start + (sigma - float(scheduler.sigmas[0])) * (noise - clean)
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 1000])
def test_a_later_time_that_another_step_has(count: int) -> None:
    """It moves by little, whatever the unit of time."""
    scheduler = LookAhead(FlowMatchEulerDiscreteScheduler(num_train_timesteps=count), at=0.5)
    scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    times = [float(time) / count for time in scheduler.timesteps]
    assert times == pytest.approx([1, 0.499, 0.75, 0.5, 0.25])


def test_copies_have_times_of_their_own() -> None:
    scheduler = LookAhead(euler())
    scheduler.set_timesteps(STEPS)
    for other in (copy.copy(scheduler), copy.deepcopy(scheduler)):
        other.set_timesteps(3)
        assert len(other.timesteps) == 4
        assert len(scheduler.timesteps) == STEPS + 1
        assert len(scheduler.scheduler.timesteps) == STEPS


@pytest.mark.parametrize("compiled", [False, True])
def test_keys_and_values_are_read_between_two_times(compiled: bool) -> None:
    """In a session, whose clock has to take a later time that comes first."""
    times = [900, 400, 850, 650]
    if not compiled:
        assert error(Drifting(1), 1, times, "FFPP") < 1e-5
        return
    model, latents = Drifting(1), torch.randn(1, 3, *GRID, generator=torch.Generator().manual_seed(0))
    active = np.random.default_rng(0).permutation(N) < 6
    plan = hetcache.Plan.from_token_mask(
        active, GRID, num_inference_steps=4, schedule="FFP*", extrapolation=1, context_extrapolation=1
    )
    run = torch.compile(model, backend="hetcache", options={"inner": "eager"})
    with torch.no_grad(), hetcache.session(replace(plan, timesteps=np.array(times, float)), strict=True) as session:
        for time in times:
            actual, expected = run(latents, torch.tensor([time])), model(latents, torch.tensor([time]))
            difference = (actual - expected).flatten(2)[:, :, torch.from_numpy(active)].abs().max()
            assert difference < 1e-5 * expected.abs().max()
    assert session.stats.steps == {"FULL": 2, "PARTIAL": 2, "REUSE": 0}


def test_both_ends_are_exact() -> None:
    """A PARTIAL step on the inputs of either FULL call gives what that gave, whatever the curve between them."""
    for time in (900, 400):
        assert error(Drifting(2), 1, [900, 400, time], "FFP") < 1e-5
    assert error(Drifting(2), 1, [900, 400, 650], "FFP") > 1e-3


def test_a_pipeline_looks_ahead() -> None:
    """An unmodified pipeline: its plan has the step, its session finds it, and without caching nothing changes."""

    def edit(pipe: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(**{**VACE.call(), **VACE.guided}, output_type="latent", generator=generator).frames

    pipe = VACE.build()
    expected = edit(pipe)
    pipe.scheduler = LookAhead(pipe.scheduler)
    arguments = {**VACE.call(), **VACE.guided, "generator": torch.Generator().manual_seed(0)}
    mask = arguments.pop("mask")
    pipe.transformer = torch.compile(pipe.transformer, backend="hetcache", options={"inner": "eager"})
    for schedule, steps in (("F*", "FFFF"), ("FFP*R", "FFPR")):
        plan = hetcache.plan_for(
            pipe, mask=mask, schedule=schedule, context_extrapolation=1, margin=0, multiple=1, **arguments
        )
        assert "".join(kind.letter for kind in plan.steps) == steps
        assert plan.timesteps[1] == pytest.approx(0.45 * plan.timesteps[0], abs=1)
        with hetcache.session(plan, strict=True) as session:
            latents = edit(pipe)
        assert session.stats.steps == {kind.name: 2 * plan.steps.count(kind) for kind in hetcache.StepKind}
        error = float((latents - expected).abs().max() / expected.abs().max())
        assert error < 1e-5 if schedule == "F*" else 1e-5 < error < 0.5


def test_what_cannot_look_ahead() -> None:
    for at in (0.0, 1.0):
        with pytest.raises(PlanError, match="between 0 and 1"):
            LookAhead(euler(), at=at)
    with pytest.raises(PlanError, match="more than once a step"):
        LookAhead(FlowMatchHeunDiscreteScheduler())
    with pytest.raises(PlanError, match="flow matching"):
        LookAhead(DDIMScheduler()).set_timesteps(STEPS)
    with pytest.raises(PlanError, match="two steps"):
        LookAhead(euler()).set_timesteps(1)
    with pytest.raises(PlanError, match="strength"):
        LookAhead(euler()).set_begin_index(1)
    state = torch.get_rng_state()
    for noisy in (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), FlowMatchLCMScheduler()):
        with pytest.raises(PlanError, match="add noise"):
            LookAhead(noisy).set_timesteps(STEPS)
    with pytest.raises(PlanError, match="next time"):
        LookAhead(FlowMapEulerDiscreteScheduler())
    assert torch.equal(torch.get_rng_state(), state), "nobody's random numbers are used up"
    scheduler = LookAhead(euler())
    scheduler.set_timesteps(STEPS)
    scheduler.step(torch.ones(1, 4, 2, 3, 3), scheduler.timesteps[0], torch.ones(1, 4, 2, 3, 3))
    with pytest.raises(PlanError, match="another shape"):
        scheduler.step(torch.ones(1, 4, 1, 3, 3), scheduler.timesteps[1], torch.ones(1, 4, 1, 3, 3))


def test_two_experts_cannot_look_ahead() -> None:
    pipe = VACE.build()
    pipe.transformer_2 = pipe.transformer
    pipe.scheduler = LookAhead(pipe.scheduler)
    with pytest.raises(PlanError, match="two models"):
        hetcache.plan_for(pipe, mask=np.ones((1, 32, 32), bool), height=32, width=32, num_frames=1)


def test_it_passes_for_the_scheduler() -> None:
    """Pipelines ask for its class, and set what they want on it."""
    inner = euler()
    scheduler = LookAhead(inner)
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    assert isinstance(scheduler, LookAhead)
    scheduler.set_shift(5.0)
    scheduler.custom = 7
    assert (inner.shift, inner.custom) == (5.0, 7)
    scheduler.set_timesteps(STEPS)
    scheduler.sigmas[-1] = 0.01  # as Cosmos does
    latents = torch.ones(1, 4, 2, 3, 3)
    for time in scheduler.timesteps:
        latents = scheduler.step(torch.ones_like(latents), time, latents).prev_sample
    torch.testing.assert_close(latents, torch.full_like(latents, 1 - (1 - 0.01)))


def test_what_is_known_is_put_back_at_the_later_time() -> None:
    """As pipelines for inpainting do after each step, with the time of the next one."""
    scheduler, plain = LookAhead(euler(), at=0.4), euler()
    plain.set_timesteps(STEPS)
    scheduler.set_timesteps(STEPS)
    known, noise = torch.randn(2, 1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    levels = []
    for step, time in enumerate(scheduler.timesteps[:-1]):
        scheduler.step(noise, time, noise)
        after = scheduler.timesteps[step + 1 : step + 2]
        latents = scheduler.scale_noise(known, after, noise)
        levels.append(float((latents - known).flatten()[0] / (noise - known).flatten()[0]))
    expected = [float(scheduler.sigmas[1]), *plain.sigmas[1:STEPS].tolist()]
    assert levels == pytest.approx(expected, rel=1e-4)


def test_a_calibration_knows_nothing_of_it() -> None:
    known, _ = calibration_of(np.linspace(1000, 30, 8))
    plan = hetcache.Plan.from_token_mask(np.arange(N) < 6, GRID, num_inference_steps=4, schedule="F*")
    with pytest.raises(PlanError, match="look ahead"):
        known.scheduled(plan, "FFP*", timesteps=np.array([1000.0, 450.0, 800.0, 500.0]))


def test_a_star_fills_a_schedule() -> None:
    def letters(schedule: str, steps: int) -> str:
        return "".join(kind.letter for kind in make_schedule(schedule, steps))

    assert letters("FFP*R", 8) == "FFPPPPPR"
    assert letters("F*", 3) == "FFF"
    assert letters("FR*PRF", 6) == "FRRPRF"
    assert parse_method("FFP*R+margin=1").schedule == "FFP*R"
    with pytest.raises(PlanError, match="has 3 steps at least, the sampler 2"):
        make_schedule("FP*R", 2)
    for wrong in ("P*", "*", "F*F*", "FX*"):
        with pytest.raises(PlanError, match="unknown schedule"):
            make_schedule(wrong, 4)


@pytest.mark.parametrize("text", ["ahead:", "ahead:soon+F*", "ahead:0.4", "ahead:0.4+full", "ahead:0.4+optimal:2x"])
def test_a_method_that_looks_ahead_without_a_time_or_a_schedule_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="as in ahead:"):
        parse_method(text)


def test_a_method_may_look_ahead(tmp_path: Path) -> None:
    """It has one step more; one whose steps are all FULL has the uncached result. The pipeline keeps its scheduler."""
    save_random_checkpoint(tmp_path / "model", width=64, layers=1)
    pipe = load_pipeline(tmp_path / "model", torch.float32, "cpu")
    scheduler, video = pipe.scheduler, np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    mask = np.zeros(video.shape[:3], dtype=bool)
    mask[:, 16:40, 16:40] = True
    clip = Clip("clip", video, mask, "a cat")
    settings = Settings("tiny", num_inference_steps=3, max_sequence_length=16, inner="eager", timed=False)
    methods = parse_methods("ahead:0.45+F*,ahead:0.45+FFP*+margin=0")
    cells = bench_quality(pipe, [clip], methods, settings, tmp_path / "out", lambda *_: None)["cells"]["clip"]
    frames = {name: load_frames(frames_file(tmp_path / "out", "clip", name)) for name in cells}
    full, looks, partial = cells
    assert cells[full]["calls"] == {"FULL": 6}
    assert cells[looks]["calls"] == {"FULL": 8, "PARTIAL": 0, "REUSE": 0}
    assert cells[partial]["calls"] == {"FULL": 4, "PARTIAL": 4, "REUSE": 0}
    assert np.abs(frames[looks].astype(int) - frames[full]).max() <= 1
    assert np.abs(frames[partial].astype(int) - frames[full]).max() > 1
    assert pipe.scheduler is scheduler
