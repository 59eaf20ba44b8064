"""A calibration: what was measured of a model, and the schedules and weights that come of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..errors import PlanError
from ..plan.plan import Plan
from ..plan.prediction import Prediction
from ..plan.schedule import Schedule, StepKind, make_schedule, schedule_name
from .best_schedule import optimal_schedule
from .error_model import flow_lengths
from .output_weights import step_weights
from .record import Array, Record


@dataclass(frozen=True, eq=False)
class Calibration(Record):
    """Errors and costs of one model, measured over a few clips, that guide plans (see `plan.Guide`)."""

    def scheduled(
        self,
        plan: Plan,
        schedule: Schedule,
        *,
        timesteps: Array | None = None,
        lengths: Array | None = None,
        multistep: bool = True,
        distances: Array | None = None,
    ) -> Plan:
        """The same partition with the steps of a schedule, and weights of its outputs.

        Args:
            plan: partition and options.
            schedule: see `schedule.make_schedule`.
            timesteps: `[S]` of the edit; by default those of the calibration's own noise schedule, with its solver.
            lengths: `[S]` of the edit's solver (see `output_weights.step_lengths`); None if that cannot be corrected.
            multistep: whether outputs get fitted weights where they can.
            distances: `[S]`, see `schedule.time_distances`.

        Raises:
            PlanError: no such schedule, its budget cannot be kept, or the times do not fall from step to step.
        """
        if timesteps is None:
            timesteps = self.timesteps_for(len(plan.steps))
            lengths = flow_lengths(timesteps) if self.one_step else None
        if (np.diff(timesteps) > 0).any():
            raise PlanError("a calibration knows nothing of steps that look ahead: make the plan without it")
        share = plan.num_active / plan.num_tokens
        fitted = multistep and plan.extrapolation > 0 and not plan.selects_at_run_time
        prediction = Prediction(plan.extrapolation, fitted, corrects=fitted and lengths is not None)
        moves = flow_lengths(timesteps) if lengths is None else lengths

        def search(budget: str) -> tuple[StepKind, ...]:
            shared = bool(plan.shared_context)
            return optimal_schedule(self, budget, timesteps, share, prediction, moves, shared_context=shared)

        steps = make_schedule(schedule, len(plan.steps), distances, search)
        weights = step_weights(self, steps, timesteps, moves, prediction) if fitted else plan.weights[:0]
        return replace(plan, steps=steps, schedule=schedule_name(schedule), weights=weights)
