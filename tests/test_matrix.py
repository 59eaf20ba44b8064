"""Two edits in one session, sampled with diffusers' schedulers in every style of guidance: each call has its own cache.

`test_edits` asks what each call gives; here latents go through the scheduler's `step`, the two edits differ, and the
kinds of every branch must be those that the plan has at its times.

Three things are checked in each cell. Where every step is FULL a whole edit is the uncached one, bit for bit. With a
model that ignores time, on latents of which it sees nothing change, every output is the plain one under any schedule,
but for a cache of another branch or edit. The kinds of a branch are FULL at its first call, then the plan's.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from backend_checks import TOLERANCE, compiled, crossed, ignoring_time, max_error, plan_of
from models import call, wan
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile import Plan, StepKind

STEPS = 6
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    "unipc, repeated times": lambda: diffusers.UniPCMultistepScheduler(**{**FLOW, "flow_shift": 500.0}),
    "dpm++ multistep": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW),
    "dpm++ singlestep": lambda: diffusers.DPMSolverSinglestepScheduler(**FLOW, lower_order_final=True),
    "flow heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "heun": diffusers.HeunDiscreteScheduler,
    "lcm": diffusers.LCMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "cogvideox ddim": diffusers.CogVideoXDDIMScheduler,
    "cogvideox dpm": diffusers.CogVideoXDPMScheduler,
}
SCHEDULES = ("FRPRF", "FPRRP")
"""What steps do, again and again."""


@dataclass(frozen=True)
class Branch:
    """A call at one time: whose text it has, its name, if any, or both texts in one batch."""

    number: int
    name: str | None = None
    batched: bool = False


FIRST, SECOND, THIRD = (Branch(number) for number in range(3))
COND, UNCOND = Branch(0, "cond"), Branch(1, "uncond")
STYLES: dict[str, tuple[list[Branch], list[Branch]]] = {
    "named": ([COND, UNCOND],) * 2,
    "unnamed": ([FIRST, SECOND],) * 2,
    "batched": ([Branch(0, batched=True)],) * 2,
    "none": ([FIRST],) * 2,
    "the second goes midway": ([FIRST, SECOND], [FIRST]),
    "the first goes midway": ([SECOND, FIRST], [FIRST]),
    "named, one goes midway": ([UNCOND, COND], [COND]),
    "three": ([FIRST, SECOND, THIRD],) * 2,
}
"""The calls at each time in the first half of an edit, and in the second."""
CROSS = crossed(SCHEDULERS, STYLES)


@dataclass(frozen=True)
class Made:
    """A model, and the same compiled."""

    model: nn.Module
    fast: Any


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture(scope="module")
def timely() -> Made:
    torch._dynamo.reset()
    model = wan(num_layers=1)
    return Made(model, compiled(model))


@pytest.fixture(scope="module")
def frozen() -> Made:
    """It ignores time, and the last channel of its latents."""
    model = ignoring_time(wan(num_layers=1))
    with torch.no_grad():
        model.patch_embedding.weight[:, -1].zero_()
    return Made(model, compiled(model))


def latents_of(seed: int) -> torch.Tensor:
    return torch.randn(1, 5, 3, 10, 14, generator=torch.Generator().manual_seed(seed))


def text_of(seed: int) -> torch.Tensor:
    return torch.randn(1, 11, 13, generator=torch.Generator().manual_seed(1000 + seed))


def test_the_inputs_are_those_of_the_model(timely: Made) -> None:
    kwargs = call(timely.model)
    assert kwargs["hidden_states"].shape == latents_of(0).shape
    assert kwargs["encoder_hidden_states"].shape == text_of(0).shape


@dataclass
class Edit:
    """A hand-written sampling loop.

    Args:
        make: a scheduler.
        style: of guidance.
        strength: share of the steps that are taken.
        seed: of the latents.
        prompt: which texts it has.
    """

    make: Callable[[], Any]
    style: str
    strength: float
    seed: int
    prompt: int

    def run(self, model: Any, moves: bool = True) -> list[tuple[int, int, torch.Tensor]]:
        """The step, branch and output of each call.

        Args:
            model: compiled.
            moves: whether latents follow the outputs. Otherwise their last channel alone changes.
        """
        scheduler = scheduled(self.make)
        times, generator = scheduler.timesteps, torch.Generator().manual_seed(self.seed)
        # Pipelines leave out pairs of second-order solvers.
        start = (STEPS - round(self.strength * STEPS)) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        latents, old, found = latents_of(self.seed), None, []
        for step in range(start, len(times)):
            outputs = []
            for branch in STYLES[self.style][step >= (start + len(times)) // 2]:
                with named(model, branch.name):
                    outputs.append(model(**self.inputs(branch, latents, times[step]))[0])
                found.append((step, branch.number, outputs[-1]))
            if moves:
                guided = torch.cat(outputs).mean(dim=0, keepdim=True)
                before = times[step - 1] if step > start else None
                latents, old = take_step(scheduler, guided, times[step], before, latents, old, generator)
            else:
                latents = latents.clone()
                latents[:, -1] += 1
        return found

    def inputs(self, branch: Branch, latents: torch.Tensor, time: torch.Tensor) -> dict[str, Any]:
        """Of one call."""
        numbers = (0, 1) if branch.batched else (branch.number,)
        return {
            "hidden_states": torch.cat([latents] * len(numbers)),
            "timestep": time.expand(len(numbers)),
            "encoder_hidden_states": torch.cat([text_of(10 * self.prompt + number) for number in numbers]),
            "return_dict": False,
        }


def scheduled(make: Callable[[], Any]) -> Any:
    scheduler = make()
    scheduler.set_timesteps(STEPS)
    return scheduler


def take_step(
    scheduler: Any, output: Any, time: Any, time_before: Any, latents: Any, old: Any, generator: torch.Generator
) -> Any:
    """The latents after a step, and the last prediction, which CogVideoX's DPM wants back."""
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
        return scheduler.step(output, old, time, time_before, latents, **options, return_dict=False)
    return scheduler.step(output, time, latents, **options, return_dict=False)[0], None


def named(model: Any, name: str | None) -> Any:
    return contextlib.nullcontext() if name is None else model.cache_context(name)


def plan_with(make: Callable[[], Any], schedule: str) -> Plan:
    """A plan for all steps of a scheduler."""
    scheduler = scheduled(make)
    times = scheduler.timesteps.double().numpy()
    sigmas = getattr(scheduler, "sigmas", None)
    noise = {} if sigmas is None else {"sigmas": sigmas.double().numpy()[: len(times)]}
    return replace(plan_of((schedule * len(times))[: len(times)]), timesteps=times, **noise)


def two_edits(name: str, style: str, strength: float) -> list[Edit]:
    """On other latents; the shorter ones with the same texts, which then tell nothing."""
    return [Edit(SCHEDULERS[name], style, strength, seed, prompt=seed if strength == 1 else 0) for seed in range(2)]


def check_kinds(
    session: hetcache.Session, plan: Plan, edits: Sequence[Sequence[tuple[int, int, torch.Tensor]]]
) -> None:
    """The plan is followed, but for first calls. Where an edit's first time is repeated, its next step might be
    another edit's first, after one that was cancelled."""
    kinds = iter(session.stats.kinds)
    assert plan.timesteps is not None
    for calls in edits:
        first = calls[0][0]
        seen: set[int] = set()
        for step, branch, _ in calls:
            is_doubtful = step > first and plan.timesteps[step] == plan.timesteps[first]
            planned = plan.steps[step] if branch in seen and not is_doubtful else StepKind.FULL
            assert next(kinds) is planned, (step, branch)
            seen.add(branch)
    assert next(kinds, None) is None
    assert session.stats.unplanned == 0


@pytest.mark.parametrize("strength", [1.0, pytest.param(0.6, marks=pytest.mark.wide)])
@pytest.mark.parametrize(("name", "style"), CROSS)
def test_full_steps_are_the_uncached_model(timely: Made, name: str, style: str, strength: float) -> None:
    edits = two_edits(name, style, strength)
    truths = [edit.run(timely.fast) for edit in edits]
    plan = plan_with(SCHEDULERS[name], "F")
    with hetcache.session(plan, strict=True) as session:
        found = [edit.run(timely.fast) for edit in edits]
    for outputs, truth in zip(found, truths, strict=True):
        assert all(torch.equal(a, b) for (*_, a), (*_, b) in zip(outputs, truth, strict=True))
        assert all(output.isfinite().all() for *_, output in truth)
    check_kinds(session, plan, found)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(("name", "style"), CROSS)
def test_no_call_has_the_cache_of_another(frozen: Made, name: str, style: str, strength: float) -> None:
    edits = two_edits(name, style, strength)
    truths = [{branch: output for _, branch, output in edit.run(frozen.fast, moves=False)} for edit in edits]
    distinct = [truth[0] for truth in truths] + [truths[0][branch] for branch in truths[0] if branch]
    assert all(max_error(a, b) > 100 * TOLERANCE for a in distinct for b in distinct if a is not b), "it can be seen"
    for schedule in SCHEDULES:
        plan = plan_with(SCHEDULERS[name], schedule)
        with hetcache.session(plan, strict=True) as session:
            found = [edit.run(frozen.fast, moves=False) for edit in edits]
        for outputs, truth in zip(found, truths, strict=True):
            assert max(max_error(output, truth[branch]) for _, branch, output in outputs) < TOLERANCE
        check_kinds(session, plan, found)


# Orders of calls that no pipeline has, but that a loop may


TIMES = [900.0, 800.0, 700.0, 600.0, 500.0, 400.0]
HEUN = [900.0, 800.0, 800.0, 700.0, 700.0, 600.0, 600.0]
FLAT = [900.0, 900.0, 800.0, 700.0]


@dataclass(frozen=True)
class Call:
    """One call by hand."""

    time: float
    text: int = 0
    latents: int = 0
    name: str | None = None


def kinds_of(frozen: Made, times: Sequence[float], calls: Sequence[Call]) -> str:
    """The kinds of these calls, which are right whatever they are; after the first step the plan has REUSE alone."""
    plan = replace(plan_of("F" + "R" * (len(times) - 1)), timesteps=np.array(times))
    with hetcache.session(plan, strict=True) as session:
        for number, one in enumerate(calls):
            latents = latents_of(one.latents)
            latents[:, -1] += TIMES.index(one.time) if times is TIMES else number
            kwargs = {
                "hidden_states": latents,
                "timestep": torch.tensor([one.time]),
                "encoder_hidden_states": text_of(one.text),
                "return_dict": False,
            }
            with named(frozen.fast, one.name):
                output = frozen.fast(**kwargs)[0]
            assert max_error(output, frozen.model(**kwargs)[0]) < TOLERANCE, number
    return "".join(kind.letter for kind in session.stats.kinds)


@pytest.mark.parametrize("cond_first", [True, False])
@pytest.mark.parametrize("start", [0, 3])
def test_named_guidance_in_another_interval_in_the_next_edit(frozen: Made, cond_first: bool, start: int) -> None:
    """The unconditional calls go on in time where those of the edit before ended."""
    calls = []
    for number, interval, begins in ((0, range(3), 0), (1, range(3, 6), start)):
        for step in range(begins, 6):
            both = [Call(TIMES[step], 0, number, "cond")]
            if step in interval:
                both.append(Call(TIMES[step], 1, number, "uncond"))
            calls += both if cond_first else both[::-1]
    assert kinds_of(frozen, TIMES, calls).count("F") == 4


def test_two_named_edits_in_turn(frozen: Made) -> None:
    """One begins two steps after the other; each has its steps."""
    calls = []
    for step in range(8):
        calls += [Call(TIMES[step], 0, 0, "a")] if step < 6 else []
        calls += [Call(TIMES[step - 2], 1, 1, "b")] if step >= 2 else []
    assert kinds_of(frozen, TIMES, calls) == "FRRF" + 8 * "R"


@pytest.mark.parametrize(
    "branches",
    [[(0, 0)], [(0, 0), (0, 1)], [(0, 0), (0, 1), (0, 2)], [(0, 0), (1, 1)], [(0, 0), (1, 0), (1, 1)]],
    ids=["one", "one text", "one text for three", "two texts", "an image and a text"],
)
@pytest.mark.parametrize("times", [TIMES, HEUN, FLAT], ids=["falling", "repeated", "repeated first"])
def test_branches_that_differ_in_their_latents(
    frozen: Made, times: list[float], branches: list[tuple[int, int]]
) -> None:
    """Other latents at the same time are the next step for one branch only. Where nothing but latents tells branches
    apart, one more step is FULL: until the second time, they might be an edit that began anew."""
    calls = [Call(time, text, latents) for time in times for text, latents in branches]
    num_full = 1 + (times is FLAT) + (len({text for text, _ in branches}) < len(branches))
    expected = "F" * len(branches) * num_full + "R" * len(branches) * (len(times) - num_full)
    assert kinds_of(frozen, times, calls) == expected


def test_edits_of_one_step(frozen: Made) -> None:
    assert kinds_of(frozen, TIMES, [Call(400.0, 0, number) for number in range(5)]) == "FFFFF"
