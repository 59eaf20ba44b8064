"""The methods that `hetcache bench quality` compares, and how they are written.

full                       the plain compiled model: the uncached result
steps:20                   the plain model with fewer steps
balanced                   any schedule: a preset, FRRP, teacache:0.1, optimal:3x
balanced+o0+margin=1       a schedule with options of `plan_for`; +o0 is short for +extrapolation=0
crop:0.25                  the plain model on the mask's surroundings, put back: see `Box.around` of `plan.crop`
crop:0.25+balanced         the same, with a plan
ahead:0.45+FFP*            a schedule that counts one more step, at 0.45 of the first time: see `pipelines.look_ahead`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..calibration.schedule_search import Budget
from ..edit.editing import EditRequest, Progress, Run
from ..errors import PlanError
from ..pipelines.look_ahead import check_ahead
from ..plan.options import PlanOptions
from ..plan.schedule import StepKind, make_schedule

FULL = "full"
NUMBER = r"[0-9]+(\.[0-9]+)?"

RunEdit = Callable[[Any, EditRequest, Progress], tuple[Run, dict[str, Any]]]
"""Another library's cache or solver: edits with a pipeline that it leaves as it was; says what else to record of it.

It warms up by itself. It raises `MethodError` where it cannot run; the cell then holds the reason.
"""


@dataclass(frozen=True)
class Method:
    """One way of running an edit.

    Attributes:
        name: as it was written.
        schedule: how `plan_for` is asked for the plan, or None without one.
        options: of `plan_for`.
        steps: how many steps the plain model takes; None: as many as the rest.
        runner: in place of a plan. With `steps` it runs the plain model, so that its calls are plain ones.
        surroundings: how far around the mask the video is cropped before the edit; None: not at all.
        ahead: the time of one more step, right after the first, as a share of the first one's; None: there is none.
    """

    name: str
    schedule: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    runner: RunEdit | None = None
    surroundings: float | None = None
    ahead: float | None = None

    @property
    def needs_calibration(self) -> bool:
        """Whether the schedule is searched for."""
        return self.schedule is not None and self.schedule.startswith("optimal:")


def parse_methods(text: str) -> tuple[Method, ...]:
    """The methods of a comma-separated list; see the module. `full` always comes first.

    Raises:
        PlanError: no schedule, no `steps:N`, or an option that `plan_for` does not have.
    """
    names = [FULL, *(name.strip() for name in text.split(",") if name.strip())]
    return tuple(parse_method(name) for name in dict.fromkeys(names))


def parse_method(name: str) -> Method:
    """One method of `parse_methods`."""
    if name == FULL:
        return Method(name)
    kind, _, argument = name.partition(":")
    if kind == "steps":
        if not re.fullmatch("[1-9][0-9]*", argument):
            raise PlanError(f"steps needs a number of steps, as in steps:20, got {name!r}")
        return Method(name, steps=int(argument))
    if kind == "crop":
        surroundings, _, schedule = argument.partition("+")
        if not re.fullmatch(NUMBER, surroundings):
            raise PlanError(f"crop needs a share of the mask's size, as in crop:0.25, got {name!r}")
        method = parse_method(schedule or FULL)
        if method.surroundings is not None:
            raise PlanError(f"what is cropped cannot be cropped again, got {name!r}")
        return replace(method, name=name, surroundings=float(surroundings))
    if kind == "ahead":
        at, _, schedule = argument.partition("+")
        if not re.fullmatch(NUMBER, at) or ":" in schedule or schedule in ("", FULL):
            raise PlanError(f"to look ahead needs a time and a schedule, as in ahead:0.45+FFP*, got {name!r}")
        check_ahead(float(at))
        method = parse_method(schedule)
        between = {"context_extrapolation": 1, **method.options}  # of the two FULL steps
        return replace(method, name=name, ahead=float(at), options=between)
    schedule, *parts = name.split("+")
    many = 2 + len(schedule)  # as many as any word of letters needs
    make_schedule(schedule, many, np.zeros(many), _no_search)
    try:
        options = dict(_short_option(part) or parse_option(part) for part in parts)
    except PlanError as error:
        raise PlanError(f"{error}; {name!r} is not written as in FRRP+margin=1 or FRRP+o0") from error
    PlanOptions.check(options)
    return Method(name, schedule, options)


def _short_option(text: str) -> tuple[str, Any] | None:
    return ("extrapolation", int(text[1:])) if re.fullmatch("o[0-9]+", text) else None


def parse_option(text: str) -> tuple[str, Any]:
    """An option of a plan, from `name=value`: a number where it is one.

    Raises:
        PlanError: it is written otherwise.
    """
    option, equals, value = text.partition("=")
    if not (option and equals and value):
        raise PlanError(f"an option is written as name=value, got {text!r}")
    for number in (int, float):
        try:
            return option, number(value)
        except ValueError:
            continue
    return option, value


def _no_search(budget: str) -> tuple[StepKind, ...]:
    """Stands in for the search while there is no edit: only the budget is read."""
    Budget.parse(budget)
    return StepKind.FULL, StepKind.FULL
