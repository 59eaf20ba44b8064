"""One call as a session knows it, what the session makes of it, and the compiled model that it is of."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..plan.schedule import StepKind
from ..record.record import BranchKey, RecordedStep
from .branches import Branch, Track
from .clock import Reading

ALONE = 2
"""Steps that a model makes alone before another one that begins is taken for the next expert."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a model, as a session needs to know it.

    Attributes:
        model: what the model is known by, as long as it lives: one of its parameters, or an engine.
        owner: the graph and shape that run.
        time: what the model is given; None if it is given none.
        latents: the tensors that hold tokens.
        conditions: other tensors that tell branches of guidance apart.
        weights: a number that changes with the weights; given True, every weight is looked at.
        signature: tells the graph and its weights from others, in any process.
        can_share: whether it can run on another branch's keys and values.
        settings: what else must be equal for that, such as control scales.
    """

    model: Any
    owner: Hashable
    time: float | None
    latents: Sequence[torch.Tensor]
    conditions: Sequence[torch.Tensor]
    weights: Callable[[bool], int] = lambda thorough: 0
    signature: Callable[[], str] = lambda: ""
    can_share: bool = False
    settings: Sequence[torch.Tensor] = ()

    @property
    def known(self) -> list[torch.Tensor]:
        """What makes keys and values of the context, but for the text."""
        return [*self.latents, *self.settings]


@dataclass(slots=True)
class Turn:
    """What the session makes of a call: its kind and its branch.

    Attributes:
        kind: of the step.
        step: of the plan; None where the plan does not know it.
        branch: whose buffers it uses.
        fresh: whether the branch holds nothing that the call could go on from.
        weights: the number of the weights that it runs on.
        recorded: the step as it was recorded; None if it was not, or in a session without memory.
        weighed_as: the kind of step whose weights its outputs have: one from memory, or on another branch's context,
            stands for the planned one.
        lender: the branch whose keys and values a call at a FULL step reads in place of computing its own.
        reading: what the clock made of its time.
        model: the compiled model.
        track: of the model, that the call is on.
        changed: the conditions, by number, that are others than those of the branch before.
    """

    kind: StepKind
    step: int | None
    branch: Branch
    fresh: bool
    weights: int
    recorded: RecordedStep | None
    weighed_as: StepKind
    lender: Branch | None
    reading: Reading
    model: Model
    track: Track
    changed: set[int]

    @property
    def recalls(self) -> bool:
        """Whether it reads the cache that was recorded of this step."""
        return self.recorded is not None and self.kind is StepKind.PARTIAL

    @property
    def corrects(self) -> bool:
        """Whether it shows how another text changes what was recorded."""
        return self.recorded is not None and self.kind is StepKind.FULL


class Model:
    """A compiled model within a session: its tracks, by the names of calls."""

    def __init__(self) -> None:
        self.tracks: dict[str | None, Track] = {}
        self.calls = self.num_steps = 0
        self.step: int | None = None
        self.was_followed = False
        self.calls_of_others: dict[Model, int] = {}
        self._signed: tuple[Hashable, int, str] | None = None

    def branches(self) -> Iterator[Branch]:
        """Every branch."""
        for track in self.tracks.values():
            yield from track.branches.values()

    def lender(self, call: Call, weights: int, branch: Branch, step: int) -> Branch | None:
        """Another branch that had a FULL call at this step, with the same latents: guidance by another text, say."""
        others = (other for other in self.branches() if other is not branch and other.is_valid(call.owner, weights))
        return next((other for other in others if other.shows(step, call.known)), None)

    def key(self, call: Call, weights: int, track: Track, branch: Branch) -> BranchKey:
        """What a branch is known by in a record."""
        if self._signed is None or self._signed[:2] != (call.owner, weights):
            self._signed = call.owner, weights, call.signature()
        return BranchKey(self._signed[2], track.name, branch.place)

    def restart(self) -> None:
        """Its next call begins an edit."""
        self.step, self.num_steps = None, 0
        for track in self.tracks.values():
            track.restart()

    def follows(self, other: Model, step: int) -> bool:
        """Whether another model has no more steps in the edit in which this one makes its first call, at `step`.

        So it is where the other one was alone for some steps, or has only the cache of an edit before, in which it
        followed this one. If it calls after all, its call is FULL, and both are there to stay.
        """
        if other.step is None or other.step > step:
            return self.was_followed
        return other.num_steps >= ALONE and other.step < step

    def release(self) -> int:
        """Give its memory back. Returns how many bytes that is."""
        freed = sum(branch.num_bytes for branch in self.branches())
        self.restart()
        for branch in self.branches():
            branch.release()
        return freed
