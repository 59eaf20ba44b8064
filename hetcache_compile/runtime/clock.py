"""Which step of a plan a call is, from the time that the model is given.

Samplers call a model once or more at each time, and times go one way. So a call is known by its time: the step of the
plan that has it, and its place among the calls at that time. Where time starts over, a new edit begins.

A model gets time in many forms: a number, one for each sample or token, in thousandths, as a noise level, rounded to
bfloat16 on the way. `Timeline` knows these forms of the plan's own times; nothing is matched by a tolerance wider than
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

SCALES: tuple[tuple[str, Callable[[Array, Array], Array]], ...] = (
    ("timesteps", lambda times, sigmas: times),
    ("timesteps / 1000", lambda times, sigmas: times / 1000),
    ("1 - timesteps / 1000", lambda times, sigmas: 1 - times / 1000),
    ("1000 - timesteps", lambda times, sigmas: 1000 - times),
    ("sigmas", lambda times, sigmas: sigmas),
    ("sigmas / (1 + sigmas)", lambda times, sigmas: sigmas / (1 + sigmas)),
    ("log(sigmas) / 4", lambda times, sigmas: np.log(np.maximum(sigmas, 1e-30)) / 4),
)
"""What models are given, made of a scheduler's timesteps and noise levels."""
ROUNDINGS = (torch.float32, torch.bfloat16, torch.float16)
"""Types that a time may have gone through."""
SAME = 4 * float(torch.finfo(torch.float32).eps)
"""Relative difference of two values that are one time, computed in float32 in two ways."""


def _rounded(values: Array, dtype: torch.dtype) -> Array:
    return torch.from_numpy(values).to(dtype).double().numpy()


def _forms_of(times: Array, sigmas: Array, scale: Callable[[Array, Array], Array]) -> Array:
    """`[forms, S]`: one scale of the plan's times, rounded before, after, before and after, or to whole numbers."""
    exact = scale(times, sigmas)
    forms = [exact, np.floor(exact), np.round(exact)] if np.abs(exact).max(initial=0) > 2 else [exact]
    for dtype in ROUNDINGS:
        forms.append(_rounded(exact, dtype))
        forms.append(_rounded(scale(_rounded(times, dtype), _rounded(sigmas, dtype)), dtype))
    return np.stack(forms)


class Timeline:
    """The times of a plan, in every form that a model may get them.

    Args:
        timesteps: float64 `[S]`, the scheduler's.
        sigmas: float64 `[S]`, its noise levels, or empty.
    """

    def __init__(self, timesteps: Array, sigmas: Array) -> None:
        self.tables: list[Array] = []
        for name, scale in SCALES:
            if "sigmas" in name and not sigmas.size:
                continue
            self.tables.append(_forms_of(timesteps, sigmas if sigmas.size else timesteps, scale))

    def steps_of(self, time: float, scale: int) -> list[int]:
        """The steps that are at a time, in one of the scales: none, one, or several where times repeat."""
        table = self.tables[scale]
        near = np.abs(table - time) <= SAME * max(abs(time), 1e-3)
        if near[0].any():  # exactly, without rounding
            return np.flatnonzero(near[0]).tolist()
        return np.flatnonzero(near.any(axis=0)).tolist()

    def scale_of(self, times: Sequence[float]) -> int | None:
        """The scale in which all of these are times of the plan; of several, the one that begins earliest in it."""
        found = []
        for scale in range(len(self.tables)):
            steps = [self.steps_of(time, scale) for time in times]
            if all(steps):
                found.append((steps[0][0], scale))
        return min(found)[1] if found else None


@dataclass
class Group:
    """The calls at one time.

    Attributes:
        time: as the model got it.
        steps: of the plan that are at this time; empty where the plan does not know it.
        at: which of these the calls are at now.
        place: how many calls were made at it.
    """

    time: float
    steps: tuple[int, ...]
    at: int = 0
    place: int = 0

    @property
    def step(self) -> int | None:
        """The step that the calls are at."""
        return self.steps[self.at] if self.steps else None


@dataclass(frozen=True)
class Reading:
    """What the clock says of a call.

    Attributes:
        group: the calls at its time; see `Clock.advance`.
        at: which of the group's steps it is.
        place: its place among the calls at this step.
        restarts: whether a new edit begins with it.
        fits: whether it is where the plan expects it: the plan knows its time, and no step was left out before it.
        rose: whether its time is above the one before.
    """

    group: Group
    at: int
    place: int
    restarts: bool
    fits: bool
    rose: bool = False

    @property
    def step(self) -> int | None:
        """The step of the plan, None where the plan does not know it."""
        return self.group.steps[self.at] if self.group.steps else None


@dataclass
class Clock:
    """Reads the times of one sequence of calls. `read` changes nothing; `advance` says that the call was made.

    Attributes:
        num_steps: S of the plan.
        timeline: the plan's times, or None where it was made without.
    """

    num_steps: int
    timeline: Timeline | None
    group: Group | None = None
    _scale: int | None = None
    _last_step: int | None = None
    _known_times: list[float] = field(default_factory=list)
    _rises: bool = False
    _rose: bool = False

    def restart(self) -> None:
        """The next call begins an edit."""
        self.group = self._last_step = None
        self._known_times.clear()

    def read(self, time: float, moved: Callable[[], bool]) -> Reading:
        """Where in the plan a call at `time` is.

        Args:
            time: what the model is given.
            moved: whether its latents are others than those of the call before. Asked only where the plan has several
                steps at one time, as second-order solvers do.
        """
        group = self.group
        if group is not None and time == group.time:
            fits = bool(group.steps)
            if group.place and group.at + 1 < len(group.steps) and moved():
                return Reading(group, group.at + 1, 0, restarts=False, fits=fits)
            return Reading(group, group.at, group.place, restarts=False, fits=fits)
        return self._by_order(time) if self.timeline is None else self._by_plan(time, self.timeline)

    def advance(self, reading: Reading) -> None:
        """The call was made."""
        group = reading.group
        if group is not self.group:
            self._rises = self._rises or (reading.rose and self._rose)
            self._rose = reading.rose
            if group.steps:
                self._known_times.append(group.time)
        self.group = group
        group.at, group.place = reading.at, reading.place + 1
        if group.steps:
            self._last_step = group.steps[-1]

    def _by_plan(self, time: float, timeline: Timeline) -> Reading:
        steps = timeline.steps_of(time, self._scale) if self._scale is not None else []
        if not steps:  # of one time alone the scale may have been guessed wrong
            scale = timeline.scale_of([*self._known_times, time])
            if scale is not None:
                self._scale, steps = scale, timeline.steps_of(time, scale)
        if not steps:
            return Reading(Group(time, ()), 0, 0, restarts=False, fits=False)
        before = self._last_step
        ahead = [step for step in steps if before is None or step > before]
        if not ahead:
            return Reading(Group(time, tuple(steps)), 0, 0, restarts=True, fits=True)
        fits = before is None or ahead[0] == before + 1
        return Reading(Group(time, tuple(ahead)), 0, 0, restarts=False, fits=fits)

    def _by_order(self, time: float) -> Reading:
        """Without times in the plan the n-th time is step n. Time is taken to fall until it rises twice in a row."""
        if self.group is None:
            return Reading(Group(time, (0,)), 0, 0, restarts=False, fits=True)
        rose = time > self.group.time
        if rose != (self._rises or (rose and self._rose)):
            return Reading(Group(time, (0,)), 0, 0, restarts=True, fits=True, rose=rose)
        step = self.num_steps if self._last_step is None else self._last_step + 1
        known = step < self.num_steps
        return Reading(Group(time, (step,) if known else ()), 0, 0, restarts=False, fits=known, rose=rose)
