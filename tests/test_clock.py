"""Which step a call is, from its time alone: every form of a time, and what samplers do with times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from hetcache_compile.pipelines.observe import noise_levels
from hetcache_compile.runtime.inputs import time_value
from hetcache_compile.sessions.clock import Clock, Reading, Timeline

S = 50
bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def scheduler_of(kind: Any, steps: int = S, **config: Any) -> Any:
    scheduler = kind(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def clock_of(scheduler: Any) -> Clock:
    """The clock of a plan made for a scheduler."""
    times = scheduler.timesteps.double().numpy()
    sigmas = getattr(scheduler, "sigmas", None)
    sigmas = np.zeros(0) if sigmas is None else sigmas.double().numpy()[: len(times)]
    return Clock(len(times), Timeline(times, sigmas))


def euler(shift: float = 3.0, steps: int = S) -> Any:
    return scheduler_of(FlowMatchEulerDiscreteScheduler, steps, shift=shift)


def unipc(shift: float = 3.0, steps: int = S) -> Any:
    return scheduler_of(UniPCMultistepScheduler, steps, flow_shift=shift, **FLOW)


def heun(steps: int = 10) -> Any:
    return scheduler_of(FlowMatchHeunDiscreteScheduler, steps, shift=3.0)


def call(clock: Clock, time: Any, moved: bool = True) -> Reading:
    """One call that is made; like the session, a restart comes before it."""
    reading = clock.read(time_value(time), lambda: moved)
    if reading.restarts:
        clock.restart()
    clock.advance(reading)
    return reading


def edit(clock: Clock, times: Sequence[Any], calls: int = 1) -> list[int | None]:
    """The steps of an edit with so many calls at each, whose latents move between its steps."""
    steps = []
    for time in times:
        for place in range(calls):
            reading = call(clock, time, moved=place == 0)
            assert reading.place == place
            assert reading.fits
        steps.append(reading.step)
    return steps


# Forms of a time


def per_token(time: torch.Tensor) -> torch.Tensor:
    """Tokens of a given first frame stand at 0."""
    return time * (torch.arange(15) >= 5)[None]


SHAPES: dict[str, Callable[[torch.Tensor], Any]] = {
    "number": float,
    "scalar": lambda time: time,
    "one for each sample": lambda time: time.expand(2),
    "one for each token": per_token,
}


def on_a_gpu(time: torch.Tensor) -> torch.Tensor:
    """Divided by 1000 there: multiplied by an inverse that was rounded, in float32 where the type is shorter."""
    if time.dtype is fp64:
        return time * (1 / 1000)
    inverse = (torch.ones((), dtype=torch.float32) / 1000).item()
    return (time.double() * inverse).float().to(time.dtype if time.is_floating_point() else fp32)


FORMS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "timesteps": lambda time, sigma: time,
    "thousandths": lambda time, sigma: time / 1000,
    "1 - t / 1000": lambda time, sigma: 1 - time / 1000,
    "1 - t / 1000, on a GPU": lambda time, sigma: 1 - on_a_gpu(time),
    "1000 - t": lambda time, sigma: 1000 - time,
    "sigmas": lambda time, sigma: sigma,
    "sigma / (1 + sigma)": lambda time, sigma: sigma / (1 + sigma),
    "int": lambda time, sigma: time.long(),
    "rounded": lambda time, sigma: time.round(),
}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "flow": euler,
    "flow, shift 1": lambda: euler(1.0),
    "flow, shift 7": lambda: euler(7.0),
    "flow, shift 30": lambda: euler(30.0),
    "unipc": unipc,
    "unipc, shift 30": lambda: unipc(30.0),
    "dpm++": lambda: scheduler_of(DPMSolverMultistepScheduler),
    "ddim": lambda: scheduler_of(CogVideoXDDIMScheduler),
    "heun": heun,
    "heun of noise": lambda: scheduler_of(HeunDiscreteScheduler, 10),
}


SCALED = (
    "timesteps", "thousandths", "1 - t / 1000", "1 - t / 1000, on a GPU", "sigmas", "sigma / (1 + sigma)",
)  # fmt: skip
CELLS = [
    (scheduler, form)
    for scheduler, make in SCHEDULERS.items()
    for form in FORMS
    if "sigma" not in form or hasattr(make(), "sigmas")
]


def forms_of(scheduler: Any, form: str, wrap: Callable[[Any, Any], Any] = lambda value, sigma: value) -> list[Any]:
    sigmas = getattr(scheduler, "sigmas", None)
    pairs = zip(scheduler.timesteps, scheduler.timesteps if sigmas is None else sigmas, strict=False)
    return [wrap(*pair) for pair in pairs]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_a_time(shape: str) -> None:
    scheduler = euler()
    assert edit(clock_of(scheduler), [SHAPES[shape](time) for time in scheduler.timesteps]) == list(range(S))


@pytest.mark.parametrize(("scheduler", "form"), CELLS)
@pytest.mark.parametrize("calls", [1, 2])
def test_forms_of_a_time(form: str, scheduler: str, calls: int) -> None:
    """Computed in the type that the scheduler has, as pipelines do."""
    made = SCHEDULERS[scheduler]()
    times = forms_of(made, form, FORMS[form])
    check_steps(clock_of(made), times, calls)


ROUNDED: dict[str, Callable[[Callable[..., Any], torch.dtype], Callable[..., Any]]] = {
    "before": lambda form, dtype: lambda time, sigma: form(time.to(dtype).float(), sigma.to(dtype).float()),
    "after": lambda form, dtype: lambda time, sigma: form(time, sigma).to(dtype),
    "throughout": lambda form, dtype: lambda time, sigma: form(time.to(dtype), sigma.to(dtype)),
}


@pytest.mark.parametrize(("scheduler", "form"), [cell for cell in CELLS if cell[1] in SCALED])
@pytest.mark.parametrize("where", ROUNDED)
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=["bf16", "fp16"])
def test_rounded_times(scheduler: str, form: str, where: str, dtype: torch.dtype) -> None:
    """Several steps may then have one time: latents that moved tell them apart."""
    made = SCHEDULERS[scheduler]()
    times = forms_of(made, form, ROUNDED[where](FORMS[form], dtype))
    for calls in (1, 2):
        check_steps(clock_of(made), times, calls)


def check_steps(clock: Clock, times: Sequence[Any], calls: int) -> None:
    """Rising times may first be taken for falling ones, which are likelier; time that starts over tells."""
    steps = edit(clock, times, calls)
    unsure = 2 if times[0] < times[-1] else 0
    assert steps[unsure:] == list(range(unsure, len(times)))
    assert edit(clock, times, calls) == list(range(len(times))), "in the next edit it is known"


def test_a_time_of_no_model_is_unknown() -> None:
    scheduler = euler()
    for time in (scheduler.timesteps[3] + 0.3, -5.0, 2000.0, float("nan")):
        reading = call(clock_of(scheduler), time)
        assert reading.step is None
        assert not reading.fits


# What samplers do


def test_heun_has_two_steps_at_each_time() -> None:
    scheduler = heun()
    assert len(scheduler.timesteps) == 19
    assert edit(clock_of(scheduler), scheduler.timesteps, calls=3) == list(range(19))


def test_calls_that_do_not_move_stay_at_their_step() -> None:
    """Of the two steps at a time the second is left out where nothing moved: no step is missed then."""
    scheduler = heun()
    clock = clock_of(scheduler)
    found = []
    for time in scheduler.timesteps.unique().flip(0):
        for place in range(3):
            reading = call(clock, time, moved=False)
            assert reading.fits
            assert reading.place == place
        found.append(reading.step)
    assert found == [0, *range(1, 19, 2)]


def test_unipc_repeats_whole_times() -> None:
    scheduler = unipc(shift=60.0)
    assert len(scheduler.timesteps.unique()) < S
    assert edit(clock_of(scheduler), scheduler.timesteps, calls=2) == list(range(S))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.9, 0.6, 0.2])
def test_strength_starts_in_the_middle(scheduler: str, strength: float) -> None:
    made = SCHEDULERS[scheduler]()
    order, times = made.order, made.timesteps
    start = round((1 - strength) * len(times) / order) * order
    clock = clock_of(made)
    steps = edit(clock, times[start:], calls=2)
    assert steps[0] <= start  # the earliest that has this time, as some model may get it
    assert steps[1:] == list(range(start + 1, len(times)))
    again = edit(clock, times[start:])
    assert again[1:] == steps[1:], "and again"


def test_a_skipped_step_is_noticed() -> None:
    scheduler = euler()
    clock = clock_of(scheduler)
    times = scheduler.timesteps
    assert edit(clock, times[:3]) == [0, 1, 2]
    reading = call(clock, times[5])
    assert (reading.step, reading.fits, reading.restarts) == (5, False, False)
    assert edit(clock, times[6:8]) == [6, 7]


def test_an_unknown_time_in_between() -> None:
    scheduler = euler()
    clock = clock_of(scheduler)
    times = scheduler.timesteps
    assert edit(clock, times[:3]) == [0, 1, 2]
    unknown = [call(clock, times[2] - 1.3, moved=moved) for moved in (False, False)]
    assert [(reading.step, reading.place, reading.fits) for reading in unknown] == [(None, 0, False), (None, 1, False)]
    assert edit(clock, times[3:6]) == [3, 4, 5]


def test_reading_changes_nothing() -> None:
    """A call that fails is read again."""
    scheduler = euler()
    clock = clock_of(scheduler)
    times = scheduler.timesteps.tolist()
    for step, time in enumerate(times):
        for _ in range(3):
            assert clock.read(time, lambda: True).step == step
        clock.advance(clock.read(time, lambda: True))


# New edits


@pytest.mark.parametrize("stop", [1, 2, 30, S])
@pytest.mark.parametrize("start", [0, 20])
def test_time_that_starts_over_is_a_new_edit(stop: int, start: int) -> None:
    scheduler = euler()
    clock = clock_of(scheduler)
    times = scheduler.timesteps[start:]
    for number in range(3):
        readings = [call(clock, time) for time in times[:stop]]
        if stop == 1 and number:
            assert readings[0].step == start  # the same time again: see `test_edits_of_one_step`
            continue
        assert [reading.restarts for reading in readings] == [number > 0] + [False] * (len(readings) - 1)
        assert [reading.step for reading in readings] == list(range(start, start + len(readings)))


def test_edits_of_one_step() -> None:
    """They cannot be told from guidance by their times: each has a place, and so a cache, of its own."""
    clock = clock_of(euler(steps=1))
    places = [call(clock, 1000.0).place for _ in range(3)]
    assert places == [0, 1, 2]
    clock.restart()
    assert call(clock, 1000.0).place == 0


def test_times_that_rise_through_the_same_values() -> None:
    """CogVideoX's times are the same when counted from the other end, until they go on."""
    scheduler = scheduler_of(CogVideoXDDIMScheduler)
    clock = clock_of(scheduler)
    readings = [call(clock, 1000 - time) for time in scheduler.timesteps[1:]]
    assert [reading.restarts for reading in readings] == [False, True] + [False] * (S - 3)
    assert [reading.step for reading in readings[2:]] == list(range(3, S))
    assert edit(clock, 1000 - scheduler.timesteps) == list(range(S))


def test_edits_of_one_step_that_begin_earlier_each_time() -> None:
    """The other end again: the time of the second was not the next of the first."""
    scheduler = scheduler_of(CogVideoXDDIMScheduler)
    clock = clock_of(scheduler)
    readings = [call(clock, scheduler.timesteps[step]) for step in (40, 39)]
    assert [(reading.step, reading.restarts) for reading in readings] == [(40, False), (39, True)]


def test_another_form_of_time_in_the_next_edit() -> None:
    scheduler = euler()
    clock = clock_of(scheduler)
    for form in FORMS.values():
        times = [form(time, sigma) for time, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False)]
        assert edit(clock, times) == list(range(S))
        clock.restart()  # diffusers says so


def test_one_call_to_warm_up_spoils_nothing() -> None:
    """Its time is known in another form only."""
    scheduler = euler()
    clock = clock_of(scheduler)
    call(clock, torch.tensor(float(scheduler.timesteps[20].floor())))
    assert edit(clock, scheduler.timesteps) == list(range(S))


# Plans without times


def without_times(steps: int = 10) -> Clock:
    return Clock(steps, None)


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_falling_times_are_counted(calls: int) -> None:
    clock = without_times()
    times = torch.linspace(1000.0, 100.0, 10)
    for _ in range(3):
        assert edit(clock, times, calls) == list(range(10))
    for _ in range(2):
        assert edit(clock, times[:4], calls) == list(range(4)), "it stops early, and starts over where time does"


def test_rising_times_are_counted_once_they_have_risen_twice() -> None:
    clock = without_times()
    times = torch.linspace(0.0, 0.9, 10)
    readings = [call(clock, time) for time in times]
    assert [reading.step for reading in readings] == [0, 0, *range(1, 9)]
    assert [reading.restarts for reading in readings] == [False, True] + [False] * 8
    assert edit(clock, times) == list(range(10))
    assert edit(clock, times[:4]) == list(range(4))
    assert edit(clock, times) == list(range(10))


def test_more_times_than_steps_are_unknown() -> None:
    clock = without_times(3)
    assert edit(clock, [900.0, 800.0, 700.0]) == [0, 1, 2]
    for time in (600.0, 500.0):
        reading = call(clock, time)
        assert (reading.step, reading.fits) == (None, False)
    assert edit(clock, [900.0, 800.0]) == [0, 1]


class OnDevice(torch.Tensor):
    """A tensor that numpy cannot read before it is brought to the host, as those on a GPU are."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("bring it to the host first")

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("bring it to the host first")

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_noise_levels_on_a_device() -> None:
    """Where `FlowMatchEulerDiscreteScheduler` keeps them once it has its times."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    expected = noise_levels(scheduler, 4)
    scheduler.sigmas = scheduler.sigmas.as_subclass(OnDevice)
    assert np.array_equal(noise_levels(scheduler, 4), expected)
    assert expected.tolist() == scheduler.sigmas.tolist()[:4]
