"""Whole edits with the samplers of diffusers: whatever asks for a step in whatever style, no call gets a wrong cache.

Each cell is three edits in one session, of other latents and prompts, compared with the plain model. With a model that
ignores time, on latents that stay the same within an edit, every output is the plain one under any schedule: but for a
cache of another branch or edit.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from backend_checks import CountingInner, N, compiled, crossed, ignoring_time, max_error, plan_of, run, tiny_calls
from models import GRID, TinyDiT, call, wan

import hetcache_compile as hetcache
from hetcache_compile import Plan

STEPS = 8
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=5.0),
    "dpm++ multistep": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=5.0),
    "dpm++ singlestep": lambda: diffusers.DPMSolverSinglestepScheduler(**FLOW, flow_shift=5.0),
    "heun": diffusers.FlowMatchHeunDiscreteScheduler,
    "lcm": diffusers.LCMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "cogvideox ddim": diffusers.CogVideoXDDIMScheduler,
    "cogvideox dpm": diffusers.CogVideoXDPMScheduler,
}
FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda time: time.float(),
    "thousandths": lambda time: time.float() / 1000,
    "bf16": lambda time: time.to(torch.bfloat16).float(),
}
Branches = list[tuple[str | None, int]]
"""Names of the calls at one time, or None, and which conditions they have."""
STYLES: dict[str, Callable[[float], Branches]] = {
    "none": lambda done: [(None, 0)],
    "named": lambda done: [("cond", 0), ("uncond", 1)],
    "unnamed": lambda done: [(None, 0), (None, 1)],
    "three": lambda done: [(None, 0), (None, 1), (None, 2)],
    "off midway": lambda done: [(None, 0), (None, 1)] if done < 0.5 else [(None, 1)],
    "on midway": lambda done: [(None, 0)] if done < 0.5 else [(None, 1), (None, 0)],
    "batched": lambda done: [(None, 3)],
}
CROSS = crossed(SCHEDULERS, STYLES)
LETTERS = "FRPRRPRF"


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return ignoring_time(wan())


@pytest.fixture(scope="module")
def fast(model: Any) -> Any:
    torch._dynamo.reset()
    return compiled(model)


def plan_for_times(scheduler: Any, all_full: bool) -> Plan:
    times = scheduler.timesteps.double().numpy()
    letters = "F" * len(times) if all_full else "F" + (LETTERS[1:-1] * len(times))[: len(times) - 2] + "F"
    return replace(plan_of(letters), timesteps=times)


def conditions(model: Any, number: int, prompt: int) -> dict[str, torch.Tensor]:
    """Text states of a branch of a prompt; of number 3 two samples in one batch."""
    if number == 3:
        both = [conditions(model, n, prompt)["encoder_hidden_states"] for n in range(2)]
        return {"encoder_hidden_states": torch.cat(both)}
    return {"encoder_hidden_states": call(model, seed=50 * (number + 4 * prompt))["encoder_hidden_states"]}


def edit(model: Any, fast: Any, times: torch.Tensor, style: str, form: str, latents: Any, prompt: int) -> list[float]:
    """The error of every call of an edit."""
    errors = []
    texts = [conditions(model, number, prompt) for number in range(4)]
    for step, time in enumerate(times):
        for name, number in STYLES[style](step / len(times)):
            hidden = latents(step)
            hidden = torch.cat([hidden, hidden]) if number == 3 else hidden
            timestep = FORMS[form](time).expand(hidden.shape[0])
            kwargs = {"hidden_states": hidden, "timestep": timestep, "return_dict": False, **texts[number]}
            if name is None:
                output = fast(**kwargs)[0]
            else:
                with fast.cache_context(name):
                    output = fast(**kwargs)[0]
            errors.append(max_error(output, model(**kwargs)[0]))
    return errors


@pytest.mark.parametrize(("name", "style"), CROSS)
def test_samplers(model: Any, fast: Any, name: str, style: str) -> None:
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS)
    frozen = [call(model, seed=seed)["hidden_states"] for seed in range(3)]
    moving = [call(model, seed=seed)["hidden_states"] for seed in range(len(scheduler.timesteps))]
    for form in FORMS if style == "unnamed" else ["as it is"]:
        for start in (0, 3):
            # Second-order solvers take steps in pairs, and pipelines skip whole ones.
            times = scheduler.timesteps[start * getattr(scheduler, "order", 1) :]
            with hetcache.session(plan_for_times(scheduler, all_full=True)) as session:
                errors = edit(model, fast, times, style, form, lambda step: moving[step], prompt=0)
            assert max(errors) == 0, (form, start)
            with hetcache.session(plan_for_times(scheduler, all_full=False)) as session:
                # Other latents with the same prompt, then another prompt too.
                errors = edit(model, fast, times, style, form, lambda step: frozen[0], prompt=0)
                errors += edit(model, fast, times, style, form, lambda step: frozen[1], prompt=0)
                errors += edit(model, fast, times, style, form, lambda step: frozen[2], prompt=1)
            assert max(errors) < 1e-5, (form, start)
            assert session.stats.unplanned == 0, (form, start)
            assert session.stats.kinds.count(hetcache.StepKind.FULL) < len(errors), (form, start)


def boxes(count: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(0)
    for _ in range(count):
        mask = np.zeros(GRID, dtype=bool)
        top, left = generator.integers(0, GRID[1] - 1), generator.integers(0, GRID[2] - 1)
        mask[:, top : top + generator.integers(1, GRID[1]), left : left + generator.integers(1, GRID[2])] = True
        yield mask


@pytest.mark.wide
@pytest.mark.usefixtures("fresh")
def test_a_day_of_masks() -> None:
    """Fifty edits: a handful of forms, no compilation after these, no memory kept, each equal to its own session."""
    model, inner = TinyDiT(), CountingInner()
    fast, calls = compiled(model, inner), tiny_calls("FPRPRF")
    plans = [Plan.from_mask(mask, GRID, num_inference_steps=6, schedule=list("FPRPRF"), margin=0) for mask in boxes(50)]
    rungs = {plan.num_active for plan in plans}
    assert len(rungs) <= 16
    alone = []
    for plan in plans:
        with hetcache.session(plan, strict=True):
            alone.append(run(fast, calls))
    graphs = inner.graphs
    assert graphs == 2 + len(rungs)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())

    before = tensors()
    for plan, outputs in zip(plans, alone, strict=True):
        with hetcache.session(plan, strict=True):
            again = run(fast, calls)
        assert all(map(torch.equal, again, outputs))
    del again
    assert inner.graphs == graphs
    assert tensors() <= before
    assert plans[0].num_tokens == N
