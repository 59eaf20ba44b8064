"""Which step is FULL, PARTIAL or REUSE: known before the first step.

TeaCache's distance (Liu et al. 2024, arXiv 2411.19108; HetCache, arXiv 2603.24260, section 3) depends on the
timesteps and the time-embedding weights only, never on the latents. So a schedule is data, made once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import PlanError


class StepKind(IntEnum):
    """What a denoising step computes."""

    FULL = 0
    PARTIAL = 1
    REUSE = 2

    @property
    def form(self) -> str:
        """The name of the form that runs it."""
        return self.name.lower()

    @property
    def letter(self) -> str:
        """F, P or R."""
        return self.name[0]


@dataclass(frozen=True)
class Preset:
    """A named choice: a schedule, and keywords of `plan_for` that hold unless they are given."""

    schedule: str
    options: Mapping[str, Any] = field(default_factory=dict)


PAPER = "teacache:0.07"
"""HetCache publishes no threshold that fits another scheduler. This one, in 50 steps of the reference model's, gives
the shares of the uncached FLOPs that its table reports, with the token options below on masks of 5 to 50 %: 0.42 for
slow (paper: 30.68 of 72.60 PFLOPs) and 0.32 for fast (23.60 of 72.60). TeaCache's polynomial, which is fitted to each
model, is left out: a threshold of distances themselves does without (see `time_distances`)."""
PAPER_OPTIONS = {"margin": 5.0, "extrapolation": 0, "selection": "hetcache"}
PRESETS: dict[str, Preset] = {
    "full": Preset("F"),
    "quality": Preset("FRPR"),
    "balanced": Preset("FRRPRRPRR"),
    "fast": Preset("FRRRPRRRPRRR"),
    "paper-slow": Preset(PAPER, {**PAPER_OPTIONS, "margin_ratio": 1.0, "context_ratio": 0.7}),
    "paper-fast": Preset(PAPER, {**PAPER_OPTIONS, "margin_ratio": 0.7, "context_ratio": 0.05}),
}
"""Cycles of step kinds, repeated over the steps. A FULL step in each cycle keeps the context from going stale.
`paper-*` is HetCache's method as it was published: a margin of 5 tokens, and the ends of its ranges of ratios."""

OPTIMAL = "optimal:"
"""What a schedule that is searched for begins with; its budget follows."""

Schedule = str | Sequence[StepKind | str]


def default_schedule(calibration: object | None) -> str:
    """What is done where nothing is asked for: with a calibration, the fastest that keeps a small error."""
    return "balanced" if calibration is None else OPTIMAL + "1%"


def make_schedule(
    schedule: Schedule,
    num_steps: int,
    distances: NDArray[np.float64] | None = None,
    search: Callable[[str], tuple[StepKind, ...]] | None = None,
) -> tuple[StepKind, ...]:
    """Step kinds for `num_steps` steps. The first is always FULL; so is the last one of a preset and of a cycle.

    Args:
        schedule: a preset (`PRESETS`), a cycle of letters such as `"FRRP"`, a word with a star behind the kind that
            is repeated, such as `"FFP*R"`, `"teacache:0.1"` for a threshold on `distances`, `"optimal:3x"` or
            `"optimal:2%"` for the best under a time factor or an error bound, or an explicit list with one kind for
            each step.
        num_steps: number of model steps.
        distances: `[num_steps]`, needed for `"teacache:d"` (see `time_distances`).
        search: from a budget to the best schedule of so many steps, needed for `"optimal:..."` (see
            `best_schedule.optimal_schedule`).

    Raises:
        PlanError: an unknown name, a list of another length, or a first step that is not FULL.
    """
    if num_steps < 1:
        raise PlanError(f"a schedule needs at least one step, got {num_steps}")
    if not isinstance(schedule, str):
        kinds = tuple(_kind(item) for item in schedule)
        if len(kinds) != num_steps:
            raise PlanError(f"the schedule lists {len(kinds)} steps but the sampler takes {num_steps}")
        if kinds[0] is not StepKind.FULL:
            raise PlanError("the first step must be FULL: there is no cache before it")
        return kinds
    asked = schedule
    if schedule in PRESETS:
        schedule = PRESETS[schedule].schedule
    name, _, argument = schedule.partition(":")
    if name == "teacache":
        if distances is None:
            raise PlanError(f"{asked} needs the model's time embedding: give --model, or use plan_for(pipe, ...)")
        if len(distances) != num_steps:
            raise PlanError(f"there are {len(distances)} distances but the sampler takes {num_steps} steps")
        try:
            return threshold_schedule(distances, float(argument))
        except ValueError as error:
            raise PlanError(f"teacache needs a threshold, as in teacache:0.1, got {schedule!r}") from error
    if name == "optimal":
        if search is None:
            raise PlanError("an optimal schedule needs a calibration: make one with hetcache calibrate, and pass it")
        return search(argument)
    if filled := re.fullmatch(r"(F[FPR]*)\*([FPR]*)", schedule):
        before, after = filled.groups()
        more = num_steps - len(before) - len(after)
        if more < 0:
            raise PlanError(f"the schedule {schedule} has {num_steps - more} steps at least, the sampler {num_steps}")
        return tuple(map(_kind, before + before[-1] * more + after))
    if not re.fullmatch("F[FPR]*", schedule):
        raise PlanError(
            f"unknown schedule {schedule!r}: give one of {', '.join(PRESETS)}, teacache:THRESHOLD, "
            "optimal:BUDGET, a cycle of letters that starts with F, such as FRRP, or such a word with a star, as FFP*R"
        )
    kinds = tuple(_kind(schedule[step % len(schedule)]) for step in range(num_steps))
    return (*kinds[:-1], StepKind.FULL)


def schedule_name(schedule: Schedule) -> str:
    """What a plan's file calls a schedule."""
    return schedule if isinstance(schedule, str) else "list"


def preset_options(schedule: Schedule | None) -> Mapping[str, Any]:
    """Keywords of `plan_for` that come with a schedule: those of a preset, none of any other."""
    return PRESETS[schedule].options if isinstance(schedule, str) and schedule in PRESETS else {}


def threshold_schedule(distances: NDArray[np.float64], threshold: float) -> tuple[StepKind, ...]:
    """HetCache's rule: the distance since the last computed step below d is REUSE, below 1.5 d PARTIAL.

    `distances[i]` is the distance from step i - 1 to step i. A computed step resets the sum.
    """
    if not threshold > 0:
        raise PlanError(f"the threshold must be positive, got {threshold}")
    kinds: list[StepKind] = []
    total = 0.0
    for step, distance in enumerate(distances):
        total += float(distance)
        if step in (0, len(distances) - 1) or total >= 1.5 * threshold:
            kind = StepKind.FULL
        else:
            kind = StepKind.REUSE if total < threshold else StepKind.PARTIAL
        if kind is not StepKind.REUSE:
            total = 0.0
        kinds.append(kind)
    return tuple(kinds)


@torch.no_grad()
def time_distances(
    model: nn.Module, timesteps: torch.Tensor, coefficients: Sequence[float] = (1.0, 0.0)
) -> NDArray[np.float64]:
    """Relative L1 change of the model's time embedding between consecutive timesteps, through a polynomial.

    Args:
        model: any diffusers transformer: its `Timesteps` and `TimestepEmbedding` modules are used as they are.
        timesteps: `[S]`, the scheduler's timesteps in sampling order.
        coefficients: of a polynomial fitted for the model, highest power first; the identity by default.

    Returns:
        `[S]` float64, 0 for the first step.

    Raises:
        PlanError: the model has no time embedding of diffusers' kind.
    """
    embedding = _time_embedding(model)
    if embedding is None:
        raise PlanError(f"{type(model).__name__} has no Timesteps and TimestepEmbedding modules")
    projection, embedder = embedding
    weight = next(embedder.parameters())
    if weight.is_meta:
        raise PlanError(f"the weights of {type(model).__name__} are nowhere while it is offloaded")
    states = embedder(projection(timesteps.to(weight.device).flatten()).to(weight.dtype)).double().cpu()
    change = (states[1:] - states[:-1]).abs().mean(dim=1) / states[:-1].abs().mean(dim=1)
    return np.concatenate([[0.0], np.polyval(coefficients, change.numpy())])


def _time_embedding(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The sinusoidal projection and the MLP behind it: siblings in one module, whatever their names are."""
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    for module in model.modules():
        children = list(module.children())
        projections = [child for child in children if isinstance(child, Timesteps)]
        embedders = [child for child in children if isinstance(child, TimestepEmbedding)]
        if projections and embedders:
            return projections[0], embedders[0]
    return None


def _kind(item: StepKind | str) -> StepKind:
    if isinstance(item, StepKind):
        return item
    for kind in StepKind:
        if isinstance(item, str) and item.upper() in (kind.name, kind.letter):
            return kind
    raise PlanError(f"unknown step kind {item!r}: give FULL, PARTIAL or REUSE")
