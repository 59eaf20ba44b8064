"""Whose cache a call has: one branch for each sequence of calls that shares a cache.

Classifier-free guidance calls a model two or three times at each time. Named calls (diffusers' `cache_context`,
`session.branch`) have a branch for each name; unnamed ones for each place among the calls at one time. Unnamed calls
are checked by their conditions too, text states and the like: where guidance is switched off midway, the call that is
left comes first, but it is not the branch that came first.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..record.caches import Correction
from ..record.record import RecordedCalls
from .clock import Clock, Group, Reading

Remembered = tuple[torch.Tensor, int]
"""A tensor, and how often it was changed in place when it was seen."""


def remember(tensors: Sequence[torch.Tensor]) -> tuple[Remembered, ...]:
    """The tensors as they are now."""
    return tuple((tensor, version(tensor)) for tensor in tensors)


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; tensors of inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def holds(known: Remembered, tensor: torch.Tensor) -> bool:
    """Whether a tensor holds what the remembered one held: by identity, and only then by value.

    A loop may convert its inputs for each call, so equal ones need not be one object. A remembered tensor that was
    changed since is taken for another one.
    """
    old, old_version = known
    if old_version != version(old):
        return False
    if old is tensor:
        return True
    alike = (old.dtype, old.device, old.shape) == (tensor.dtype, tensor.device, tensor.shape)
    return alike and bool(torch.equal(old, tensor))


class Compared(NamedTuple):
    """A condition beside the recorded one."""

    recorded: torch.Tensor
    own: Remembered
    is_other: bool


def compared(
    recorded: Sequence[torch.Tensor], given: Sequence[torch.Tensor], before: Sequence[Compared]
) -> list[Compared]:
    """Whether inputs of a call are those recorded of its step: looked at only where they were not before.

    Args:
        recorded: on the host.
        given: to the call.
        before: what was found of the call before.
    """
    known = before if len(before) == len(given) else [None] * len(given)
    return [
        one
        if one is not None and one.recorded is old and holds(one.own, tensor)
        else Compared(old, remember([tensor])[0], not torch.equal(old, tensor.cpu()))
        for old, tensor, one in zip(recorded, given, known, strict=True)
    ]


@dataclass
class Branch:
    """The cache of one sequence of calls, and what was last put into it.

    Attributes:
        owner: the graph and shape whose cache is valid, if any is.
        step: of the last call; None if the plan does not know it.
        weights: what the model's weights were when the cache was filled.
        conditions: of the last call.
        hosted: whether keys and values of its cache are in the host's memory.
        place: among the calls at one time, by which it was known first.
        seen: recorded calls that the edit was seen to go on from: it is one of their clip.
        has_other_text: whether its conditions at this step are not those of the recorded edit.
        correction: of what is read from memory, for another text.
        number: among the branches of its model, in the order of their first calls.
        made_of: what the keys and values were made of that no step changes.
        full_step: the step whose FULL call filled its cache.
        lender: the branch whose keys and values it reads in place of its own (the plan's `shared_context`).
    """

    owner: Hashable | None = None
    step: int | None = None
    weights: int | None = None
    conditions: tuple[Remembered, ...] = ()
    hosted: bool = False
    place: int = 0
    seen: set[RecordedCalls] = field(default_factory=set)
    has_other_text: bool = False
    correction: Correction | None = None
    _lent: set[Hashable] = field(default_factory=set)
    number: int | None = None
    made_of: Any = None
    full_step: int | None = None
    lender: Branch | None = None
    _compared: Sequence[Compared] = ()
    _settings: Sequence[Compared] = ()
    _filled_from: tuple[Remembered, ...] = ()
    _memory: dict[Hashable, torch.Tensor] = field(default_factory=dict)
    _memory_of: Hashable | None = None
    _changed: set[int] = field(default_factory=set)
    _unsteady: set[int] = field(default_factory=set)

    def has_memory(self, owner: Hashable) -> bool:
        """Whether its memory is that of this graph and shape."""
        return self._memory_of == owner

    def memory(self, owner: Hashable) -> dict[Hashable, torch.Tensor]:
        """The tensors of the cache by name, for one graph and shape: those of another one are given back."""
        if self._memory_of != owner:
            self._memory, self._memory_of, self.hosted, self.made_of = {}, owner, False, None
            self._lent.clear()
        return self._memory

    def is_valid(self, owner: Hashable, weights: int) -> bool:
        """Whether its cache is one of this graph and these weights, and so is what it reads of another branch."""
        own = self.owner == owner and self.weights == weights
        return own and (self.lender is None or self.lender.is_valid(owner, weights))

    def is_left(self, step: int | None) -> bool:
        """Whether the branch that it reads is no more called, as after an edit that was cancelled and made anew.

        Where calls come in another order at each step, the other one may still come.
        """
        if self.lender is None or step is None:
            return False
        return self.lender.step is None or self.lender.step < step - 1

    def fill(self, step: int | None, given: Sequence[torch.Tensor]) -> None:
        """A FULL call at a step has filled its cache from these inputs."""
        # Tensors of inference mode count no changes, so they are compared by value.
        self.full_step = step
        self._filled_from = remember([one.clone() if one.is_inference() else one for one in given])

    def shows(self, step: int, given: Sequence[torch.Tensor]) -> bool:
        """Whether its cache is that of a FULL call of its own at this step, on the same inputs."""
        return self.full_step == step and self.lender is None and same(self._filled_from, given)

    def lend(self, tensors: Mapping[Hashable, torch.Tensor]) -> None:
        """Let tensors of a record, or of another branch, be a part of its memory, by name.

        Its steps read them and leave the rows of inactive tokens as they are. A FULL step does not write them.
        """
        self._memory |= tensors
        self._lent |= tensors.keys()

    def give_back(self) -> dict[Hashable, torch.Tensor]:
        """Take what was lent out of its memory, for a step that writes. Returns what it was."""
        lent = {name: self._memory.pop(name) for name in self._lent if name in self._memory}
        self._lent.clear()
        return lent

    def invalidate(self) -> None:
        """The cache is valid no more. Its memory stays, and so does what tells its calls from others."""
        self.owner = self.step = self.weights = self.full_step = self.lender = None
        self._filled_from = ()

    def forget(self) -> None:
        """The cache is valid no more, and nothing is known of its calls; its memory stays."""
        self.invalidate()
        self.has_other_text = False
        self.correction = None
        self.conditions, self._compared, self._settings = (), (), ()
        self.seen.clear()
        self._changed.clear()
        self._unsteady.clear()

    def release(self) -> None:
        """The cache is valid no more, and its memory is given back."""
        self.forget()
        self._memory, self.hosted, self.made_of = {}, False, None
        self._lent.clear()

    def knows(self, conditions: Sequence[torch.Tensor]) -> bool:
        """Whether these are the conditions of this branch's last call, and it holds a cache."""
        return self.owner is not None and len(self._unsteady) < len(self.conditions) and not self.changes(conditions)

    def changes(self, conditions: Sequence[torch.Tensor]) -> set[int]:
        """Which conditions are others than in the last call, those left aside that change at every call."""
        if len(conditions) != len(self.conditions):
            return {-1}
        return {
            number
            for number, (known, tensor) in enumerate(zip(self.conditions, conditions, strict=True))
            if number not in self._unsteady and not holds(known, tensor)
        }

    def keep(self, conditions: Sequence[torch.Tensor], changed: set[int]) -> None:
        """Remember the conditions of a call. What changed in two calls in a row is no sign of another branch."""
        self._unsteady |= changed & self._changed
        self._changed = changed
        self.conditions = remember(conditions)

    def compare(self, recorded: Sequence[torch.Tensor], conditions: Sequence[torch.Tensor]) -> None:
        """See whether the conditions of a call are those recorded of its step. A correction for others goes.

        Args:
            recorded: on the host; one object as long as the recorded calls had the same.
            conditions: of the call.
        """
        found = compared(recorded, conditions, self._compared)
        others, corrected = ([one for one in pairs if one.is_other] for pairs in (found, self._compared))
        if len(others) != len(corrected) or any(a is not b for a, b in zip(others, corrected, strict=True)):
            self.correction = None
        self._compared, self.has_other_text = found, bool(others)

    def other_setting(self, recorded: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> str | None:
        """The name of a setting that is not the recorded one, if there is any. Both are by name."""
        self._settings = compared(list(recorded.values()), [given[name] for name in recorded], self._settings)
        return next((name for name, one in zip(recorded, self._settings, strict=True) if one.is_other), None)

    @property
    def num_bytes(self) -> int:
        """Bytes of the memory it holds, without what was lent to it."""
        return sum(tensor.nbytes for name, tensor in self._memory.items() if name not in self._lent)


class Track:
    """The calls of one model under one name, or all its unnamed ones: their clock and their branches.

    Args:
        name: of the calls, or None.
        clock: reads their times.
    """

    def __init__(self, name: str | None, clock: Clock) -> None:
        self.name, self.clock = name, clock
        self.branches: dict[int, Branch] = {}
        self.calls = self.all_calls = 0
        self.calls_before = 0
        """How many calls there were at the time before."""
        self.last_latents: list[tuple[Remembered, ...]] = []
        """Of each call at this step."""
        self.last_branches: list[Branch] = []
        self.last_conditions: list[tuple[Remembered, ...]] = []
        self.doubtful = False
        """Whether calls at this time may be of two edits: more than at the time before, and alike."""
        self.others: dict[Track, int] = {}
        """How many steps the other tracks of the model had taken at the last call of this one."""

    def restart(self) -> None:
        """The next call begins an edit. Memory is kept for it."""
        self.clock.restart()
        self.calls = self.calls_before = 0
        self.last_latents, self.last_branches, self.last_conditions = [], [], []
        self.doubtful = False
        for branch in self.branches.values():
            branch.forget()

    def invalidate_if_doubtful(self, reading: Reading) -> None:
        """Let a call be FULL where the cache may be one of an edit before.

        An edit that is cancelled at its first time and made again looks like guidance, and where times repeat like the
        next step. From the second time on it is known how many calls a time has.
        """
        group = self.clock.group
        if group is None:
            return
        guessed = reading.group is group and reading.at != group.at and not self.calls_before
        if guessed or (self.doubtful and reading.group is not group):
            self.doubtful = False
            for branch in self.branches.values():
                branch.invalidate()

    def read(self, time: float | None, latents: Sequence[torch.Tensor], conditions: Sequence[torch.Tensor]) -> Reading:
        """Where in the plan a call is. Calls of a model that is given no time are counted.

        Then unnamed calls on the same latents with other conditions are one step of guidance, and after the last step
        of the plan an edit begins.
        """
        if time is not None:
            return self.clock.read(time, lambda: self._moved(latents, conditions))
        group = self.clock.group
        if group is not None and self._is_guidance(latents, conditions):
            return self.clock.read(group.time, lambda: False)
        if self.calls >= self.clock.num_steps:
            return Reading(Group(0.0, (0,)), 0, 0, restarts=True, fits=True)
        return self.clock.read(float(-self.calls), lambda: True)

    def branch_of(self, reading: Reading, conditions: Sequence[torch.Tensor]) -> tuple[Branch, set[int]]:
        """The branch of a call, and which of its conditions are not those of that branch."""
        branch = self.branches.setdefault(reading.place, Branch(place=reading.place))
        if self.name is not None or branch.owner is None:
            return branch, set()
        changed = branch.changes(conditions)
        if changed:
            for other in self.branches.values():
                if other is not branch and other.knows(conditions):
                    return other, set()
        return branch, changed

    def advance(
        self,
        reading: Reading,
        branch: Branch,
        latents: Sequence[torch.Tensor],
        conditions: Sequence[torch.Tensor],
    ) -> None:
        """The call was made."""
        if not reading.place:
            self.calls, self.all_calls = self.calls + 1, self.all_calls + 1
            self.last_latents, self.last_branches, self.last_conditions = [], [], []
        if self.clock.group is not None and reading.group is not self.clock.group:
            self.calls_before = self.clock.group.place
        self.clock.advance(reading)
        if reading.place and reading.place >= self.calls_before:
            alike = (one for one in self.last_branches if one is not branch and not one.changes(conditions))
            self.doubtful = self.doubtful or self.name is not None or any(alike)
        self.last_latents.append(remember(latents))
        self.last_branches.append(branch)
        if self.clock.timeline is None:
            self.last_conditions.append(remember(conditions))

    def is_left_over(self, reading: Reading) -> bool:
        """Whether it stands where an edit before this one left it: others went on without it, and beyond this call."""
        if reading.step is None or not self.calls:
            return False
        return any(
            other.all_calls >= known + 2 and (other.clock.last_step or 0) > reading.step
            for other, known in self.others.items()
        )

    def _moved(self, latents: Sequence[torch.Tensor], conditions: Sequence[torch.Tensor]) -> bool:
        """Whether a call at the time of the last one is the next step: another call of one branch, on other latents.

        Branches may differ in their latents too. Where nothing else tells them apart, as many are expected as at the
        time before.
        """
        if any(same(known, latents) for known in self.last_latents):
            return False
        if self.name is not None:
            return True
        alike = [branch for branch in self.branches.values() if not branch.changes(conditions)]
        if len(alike) > 1:
            return len(self.last_latents) >= self.calls_before
        return any(branch is one for one in alike for branch in self.last_branches)

    def _is_guidance(self, latents: Sequence[torch.Tensor], conditions: Sequence[torch.Tensor]) -> bool:
        if self.name is not None or not self.last_latents or not same(self.last_latents[-1], latents):
            return False
        return not any(
            len(known) == len(conditions) and all(map(holds, known, conditions)) for known in self.last_conditions
        )


def same(known: Sequence[Remembered], tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors hold what some remembered ones held; there must be some."""
    return len(known) == len(tensors) > 0 and all(map(holds, known, tensors))
