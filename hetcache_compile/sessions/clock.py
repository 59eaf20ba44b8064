"""Which step of a plan a call is, from the time that the model is given.

Samplers call a model once or more at each time, and times go one way. So a call is known by its time: the step of the
plan that has it, and its place among the calls at that time. Where time starts over, a new edit begins.

A model gets time in many forms: a number, one for each sample or token, in thousandths, as a noise level, rounded to
bfloat16 on the way. `Timeline` knows these forms of the plan's own times; nothing is matched by a tolerance wider than
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
Tensor = torch.Tensor


def thousandths_on_a_gpu(times: Tensor) -> Tensor:
    """Where torch multiplies by the inverse of a number, in float32 at least. What is left of 1 shows it."""
    precise = torch.promote_types(times.dtype, torch.float32)
    return (times.to(precise) * torch.tensor(1 / 1000, dtype=precise)).to(times.dtype)


SCALES: tuple[tuple[str, Callable[[Tensor, Tensor], Tensor]], ...] = (
    ("timesteps", lambda times, sigmas: times),
    ("timesteps / 1000", lambda times, sigmas: times / 1000),
    ("1 - timesteps / 1000", lambda times, sigmas: 1 - times / 1000),
    ("1 - timesteps / 1000 on a GPU", lambda times, sigmas: 1 - thousandths_on_a_gpu(times)),
    ("1000 - timesteps", lambda times, sigmas: 1000 - times),
    ("sigmas", lambda times, sigmas: sigmas),
    ("sigmas / (1 + sigmas)", lambda times, sigmas: sigmas / (1 + sigmas)),
    (
        "sin / (sin + cos) of timesteps that are angles",
        lambda times, sigmas: torch.where(times.abs() <= 2, times.sin() / (times.sin() + times.cos()), torch.nan),
    ),
    ("log(sigmas) / 4", lambda times, sigmas: sigmas.clamp_min(1e-30).log() / 4),
)
"""What models are given, made of a scheduler's timesteps and noise levels."""
ROUNDINGS = (torch.bfloat16, torch.float16)
"""Types that a time may have gone through."""
SAME = 4 * float(torch.finfo(torch.float32).eps)
"""Relative difference of two values that are one time, computed in float32 in two ways."""


def _forms_of(times: Tensor, sigmas: Tensor, scale: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """One scale of the plan's times: exact, cut to whole numbers, rounded before, after, or throughout."""
    exact, single = scale(times, sigmas), scale(times.float(), sigmas.float())
    forms = [exact, single]
    if exact.abs().max() > 2:
        forms += [exact.floor(), exact.round()]
    for dtype in ROUNDINGS:
        rounded = times.to(dtype), sigmas.to(dtype)
        forms += [exact.to(dtype), single.to(dtype), scale(*rounded), scale(rounded[0].float(), rounded[1].float())]
    return [form.double() for form in forms]


class Timeline:
    """The times of a plan, in every form that a model may get them.

    Args:
        timesteps: float64 `[S]`, the scheduler's.
        sigmas: float64 `[S]`, its noise levels, or empty.
    """

    def __init__(self, timesteps: Array, sigmas: Array) -> None:
        times = torch.from_numpy(timesteps)
        noise = torch.from_numpy(sigmas if sigmas.size else timesteps)
        scales = [scale for name, scale in SCALES if sigmas.size or "sigmas" not in name]
        forms = [form for scale in scales for form in _forms_of(times, noise, scale)]
        values = np.unique(torch.stack(forms).numpy(), axis=0)
        nowhere = np.zeros(values.shape, dtype=np.bool_)
        self._all = Known(values, values[:, 0] < values[:, -1], nowhere, nowhere, np.zeros(len(values), dtype=np.intp))

    def look(self, time: float, known: Known | None = None) -> Known | None:
        """The forms that know a time, of all or of those that knew the times before it."""
        known = self._all if known is None else known
        at = np.abs(known.values - time) <= SAME * max(abs(time), 1e-3)
        forms = np.asarray(at.any(axis=1))
        if not forms.any():
            return None
        return Known(known.values, known.rises, at, known.at, known.begins).only(forms)


@dataclass(frozen=True)
class Known:
    """The forms that know the times of an edit so far.

    Attributes:
        values: `[forms, S]`.
        rises: bool `[forms]`, whether the values rise.
        at: bool `[forms, S]`, the steps that are at the last of these times.
        was: the same for the time before it.
        begins: `[forms]`, the step at which the edit begins.
    """

    values: Array
    rises: NDArray[np.bool_]
    at: NDArray[np.bool_]
    was: NDArray[np.bool_]
    begins: NDArray[np.intp]

    def only(self, forms: NDArray[np.bool_]) -> Known:
        """Some of them."""
        return Known(
            self.values[forms], self.rises[forms], self.at[forms], self.was[forms], self.begins[forms]
        )  # fmt: skip

    def begun(self) -> Known:
        """The edit begins with the last time."""
        return replace(self, was=np.zeros_like(self.at), begins=self.at.argmax(axis=1))

    def going_on(self) -> Known:
        """Those in which the last time is a later step than the one before it."""
        steps = np.arange(self.at.shape[1])
        later = np.where(self.at, steps, -1).max(axis=1) > self.was.argmax(axis=1)
        return self.only(np.asarray(later))

    def steps(self) -> tuple[list[int], list[int]]:
        """The steps at the time before the last and at the last, in the likeliest forms.

        These are the falling ones, if any, in which the edit begins earliest.
        """
        rank = self.begins + self.rises * self.at.shape[1]
        likeliest = rank == rank.min()
        was, now = (np.flatnonzero(steps[likeliest].any(axis=0)).tolist() for steps in (self.was, self.at))
        return was, now


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
        known: the forms of time that know it.
    """

    group: Group
    at: int
    place: int
    restarts: bool
    fits: bool
    rose: bool = False
    known: Known | None = None

    @property
    def step(self) -> int | None:
        """The step of the plan, None where the plan does not know it."""
        return self.group.steps[self.at] if self.group.steps else None

    @property
    def last_step(self) -> int | None:
        """The last step at its time, None where the plan does not know it."""
        return self.group.steps[-1] if self.group.steps else None


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
    _known: Known | None = None
    _last_step: int | None = None
    _known_times: list[float] = field(default_factory=list)
    _restarted: bool = False
    _rises: bool = False
    _rose: bool = False

    @property
    def last_step(self) -> int | None:
        """The step of the last call that the plan knows."""
        return self._last_step

    def restart(self) -> None:
        """The next call begins an edit."""
        self.group = self._last_step = None
        self._known_times.clear()
        self._restarted = False

    def read(self, time: float, moved: Callable[[], bool]) -> Reading:
        """Where in the plan a call at `time` is.

        Args:
            time: what the model is given.
            moved: whether it is a second call of one branch, on other latents. Asked only where the plan has several
                steps at one time, as second-order solvers do, and as rounding makes them.
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
                self._restarted = reading.restarts
        self.group = group
        group.at, group.place = reading.at, reading.place + 1
        if group.steps:
            self._last_step = reading.step
        if reading.known is not None:
            self._known = reading.known

    def _by_plan(self, time: float, timeline: Timeline) -> Reading:
        known = timeline.look(time, self._known)
        if known is None:  # the forms of earlier edits are not those of this one
            known = self._known_anew(time, timeline)
        if known is None:
            return Reading(Group(time, ()), 0, 0, restarts=False, fits=False)
        if self._last_step is None:
            known = known.begun()
            return Reading(Group(time, tuple(known.steps()[1])), 0, 0, restarts=False, fits=True, known=known)
        ahead, fits = self._ahead(known)
        if not ahead and self._restarted:  # twice in a row: time may be in a form that goes the other way
            onward = known.going_on()
            known = onward if onward.rises.size else known
            ahead, fits = self._ahead(known)
        if not ahead:
            known = known.begun()
            return Reading(Group(time, tuple(known.steps()[1])), 0, 0, restarts=True, fits=True, known=known)
        return Reading(Group(time, tuple(ahead)), 0, 0, restarts=False, fits=fits, known=known)

    def _known_anew(self, time: float, timeline: Timeline) -> Known | None:
        """Of all forms those that know every time of this edit."""
        known = None
        for earlier in self._known_times:
            begins, known = known is None, timeline.look(earlier, known)
            known = known.begun() if begins and known is not None else known
        return timeline.look(time, known)

    def _ahead(self, known: Known) -> tuple[list[int], bool]:
        """The steps at the last time that are yet to come, and whether none is left out before them."""
        was, steps = known.steps()
        before = self._last_step if self._last_step in was else was[0]  # it may have been taken for another form
        ahead = [step for step in steps if step > before]
        return ahead, bool(ahead) and set(was).issuperset(range(before + 1, ahead[0]))

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
