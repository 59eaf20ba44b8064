"""The best schedule for an edit under a budget, and what a calibration expects of any schedule.

`error_model` says what a schedule leaves wrong, `step_costs` what it takes; `schedule_search` searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import CalibrationError
from ..plan.prediction import Prediction
from ..plan.schedule import StepKind
from .error_model import RecordedErrors
from .record import Array, Record
from .schedule_search import Budget, StepCosts, shortest, total_error

CALLS_OF_GUIDANCE = 2
"""In each step: with the text and without."""


@dataclass(frozen=True)
class Expectation:
    """What a calibration expects of a schedule.

    Attributes:
        steps: the schedule.
        error: of the last latents, over what the whole path moves them; infinite where it was not measured.
        seconds: in the model, of one branch of guidance (their mean, where they share their context), at the size that
            the calibration timed.
        full_seconds: of as many FULL steps.
    """

    steps: tuple[StepKind, ...]
    error: float
    seconds: float
    full_seconds: float

    @property
    def time_factor(self) -> float:
        """How much less time than FULL steps only."""
        return self.full_seconds / self.seconds

    def describe(self) -> str:
        """One line."""
        counts = ", ".join(f"{self.steps.count(kind)} {kind.name}" for kind in StepKind)
        error = f"{self.error:.2%}" if np.isfinite(self.error) else "unknown, as a FULL step is too long ago,"
        return (
            f"{counts}: {self.time_factor:.2f}x less time in the model than {len(self.steps)} FULL steps, "
            f"error of the result {error} expected"
        )


def expect(
    calibration: Record,
    steps: Sequence[StepKind],
    timesteps: Array,
    share: float,
    method: Prediction | None = None,
    lengths: Array | None = None,
    *,
    shared_context: bool = False,
) -> Expectation:
    """What the calibration expects of any schedule, at M / N = `share`; see `optimal_schedule`."""
    costs, method = step_costs(calibration, share, shared_context=shared_context), method or Prediction()
    error = total_error(RecordedErrors(calibration, timesteps, method, lengths), steps, method.order)
    counts = (steps.count(StepKind.FULL), steps.count(StepKind.PARTIAL))
    return Expectation(tuple(steps), float(np.sqrt(error)), costs.of(*counts, len(steps)), costs.baseline * len(steps))


def optimal_schedule(
    calibration: Record,
    budget: Budget | str,
    timesteps: Array,
    share: float,
    method: Prediction | None = None,
    lengths: Array | None = None,
    *,
    shared_context: bool = False,
) -> tuple[StepKind, ...]:
    """The best schedule for an edit.

    Args:
        calibration: of its model and machine.
        budget: see `Budget.parse`.
        timesteps: `[S]` of the edit, decreasing.
        share: M / N of its plan.
        method: how outputs are predicted and corrected.
        lengths: `[S]` of its solver, see `output_weights.step_lengths`.
        shared_context: whether the calls of a step of guidance share their context. What that changes of results was
            not measured by a calibration, and counts for nothing.

    Raises:
        PlanError: the budget cannot be kept.
        CalibrationError: the calibration is not finished.
    """
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    method = method or Prediction()
    errors = RecordedErrors(calibration, timesteps, method, lengths)
    costs = step_costs(calibration, share, shared_context=shared_context)
    return shortest(errors, costs, len(timesteps), budget, order=method.order)


def step_costs(calibration: Record, share: float, *, shared_context: bool = False) -> StepCosts:
    """Seconds of a call by step kind at M / N = `share`.

    Args:
        calibration: that measured them.
        share: M / N.
        shared_context: whether of the calls of a step of guidance, two as a rule, only one computes all tokens.
    """
    costs = calibration.costs
    if costs is None:
        raise CalibrationError("the calibration holds no step costs yet: run hetcache calibrate again")
    partial = costs.partial_at(share)
    shared = (costs.full + (CALLS_OF_GUIDANCE - 1) * partial) / CALLS_OF_GUIDANCE
    full = shared if shared_context else costs.full
    return StepCosts(full, partial, costs.reuse, uncached=costs.full)
