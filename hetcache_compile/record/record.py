"""What one edit of a clip leaves for the next: the caches of its FULL steps, in the host's memory or a file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from ..capture.rewrite import Forms
from ..errors import OutputFileError, RecordError, RecordFileError
from ..files import ArrayFile
from ..passes.forms.pipeline import in_process
from ..passes.ir.cache import CacheEntry
from ..plan.partition import TokenKind
from ..plan.plan import Plan
from ..plan.schedule import StepKind
from .caches import kept_of, on_host

FILE = ArrayFile("hetrecord", "record", 3, "record the edit anew", RecordFileError)
TOKENS = ("active_index", "context_index", "context_cluster")
"""What plans must share where a cache holds only some of the tokens."""
Tensors = dict[str, torch.Tensor]
T = TypeVar("T")


class BranchKey(NamedTuple):
    """Whose calls were recorded.

    Attributes:
        model: the signature of its graph and weights.
        name: of the calls, or None.
        place: among the calls at one time.
    """

    model: str
    name: str | None
    place: int


@dataclass(eq=False)
class RecordedCalls:
    """What was recorded of one branch.

    Attributes:
        inputs: of its first recorded call, those that become tokens.
        conditions: such as texts, which may be others in a later edit: by the step from which on calls had them.
        settings: which must be the same, by name: by the step, too.
        steps: the cache after each FULL step, by the step's number and the entry's `input_name`.
    """

    inputs: Tensors
    conditions: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    settings: dict[int, Tensors] = field(default_factory=dict)
    steps: dict[int, Tensors] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """The step of its first recorded call."""
        return min(self.steps)

    def add(self, step: int, conditions: Sequence[torch.Tensor], settings: Tensors, tensors: Tensors) -> None:
        """Keep what a call had, and what it left."""
        self.steps[step] = tensors
        texts = tuple(map(on_host, conditions))
        if not self.conditions or not all(map(torch.equal, at(self.conditions, step), texts)):
            self.conditions[step] = texts
        numbers = {name: on_host(tensor) for name, tensor in settings.items()}
        before = at(self.settings, step) if self.settings else {}
        if not self.settings or not all(torch.equal(before[name], tensor) for name, tensor in numbers.items()):
            self.settings[step] = numbers


@dataclass(frozen=True, eq=False)
class RecordedStep:
    """A step of a branch that was recorded."""

    calls: RecordedCalls
    step: int

    @property
    def conditions(self) -> tuple[torch.Tensor, ...]:
        """Those of its call."""
        return at(self.calls.conditions, self.step)

    @property
    def settings(self) -> Tensors:
        """Those of its call."""
        return at(self.calls.settings, self.step)

    @property
    def tensors(self) -> Tensors:
        """The cache after it, by the entries' `input_name`."""
        return self.calls.steps[self.step]


@dataclass(eq=False)
class Record:
    """The caches of the FULL steps of one edit, for later edits of the same clip.

    A session with `record=True` fills it (`session.record`), and one with `memory_of=` reads it. It holds the plan of
    the recorded edit, and for each branch of guidance and each expert the cache after each FULL step, on the host. Its
    memory is given back when it is dropped.
    """

    plan: Plan
    branches: dict[BranchKey, RecordedCalls] = field(default_factory=dict)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that were recorded."""
        return tuple(sorted({step for calls in self.branches.values() for step in calls.steps}))

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds; its file is as large, but for a header."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @staticmethod
    def bytes_for(forms: Forms) -> int:
        """Bytes that a record takes for one branch of an edit that follows the plan of these forms."""
        full = in_process(forms.by_kind["full"], forms.plan.form_options)
        return forms.plan.steps.count(StepKind.FULL) * sum(kept.entry.num_bytes for kept in kept_of(full.reads))

    def __repr__(self) -> str:
        return f"Record({len(self.steps)} steps, {len(self.branches)} branches, {self.num_bytes / 2**30:.2g} GiB)"

    def add(
        self,
        key: BranchKey,
        step: int,
        inputs: Callable[[], Tensors],
        conditions: Sequence[torch.Tensor],
        settings: Tensors,
        tensors: Tensors,
    ) -> None:
        """Keep what a FULL step left. A step at or before the branch's first one begins the record of it anew.

        Args:
            key: of the branch.
            step: of the call.
            inputs: of it, for a first call.
            conditions: of it.
            settings: of it.
            tensors: what it left.
        """
        calls = self.branches.get(key)
        if calls is None or step <= calls.first:
            calls = self.branches[key] = RecordedCalls(inputs())
        calls.add(step, conditions, settings, tensors)

    def calls_of(self, key: BranchKey) -> RecordedCalls:
        """What was recorded of a branch.

        Raises:
            RecordError: nothing was, of this model or of this branch.
        """
        if key in self.branches:
            return self.branches[key]
        if all(known.model != key.model for known in self.branches):
            raise RecordError(
                "the model is not the recorded one: its weights, its settings or the sizes of its inputs are others. "
                "Record an edit with this model"
            )
        what = f"named {key.name!r}" if key.name is not None else f"number {key.place} at each time"
        raise RecordError(f"calls {what} were not recorded: edit with the guidance of the recorded edit")

    def places(self, key: BranchKey) -> int:
        """How many calls at each time were recorded of the model under the same name."""
        return sum((known.model, known.name) == (key.model, key.name) for known in self.branches)

    def check_plan(self, plan: Plan) -> None:
        """See that an edit may follow a plan from this record.

        Raises:
            RecordError: another grid, other times, other caches, tokens that were generated and would be read, or a
                FULL step that was not recorded.
        """
        own = self.plan
        if plan.grid != own.grid:
            raise RecordError(f"the record is of the token grid {own.grid}, and the plan is for {plan.grid}")
        times = [(one.timesteps, one.sigmas, np.array(len(one.steps))) for one in (own, plan)]
        if not all(map(np.array_equal, *times)) or own.token_inputs != plan.token_inputs:
            raise RecordError(
                f"the record is of another schedule: its {len(own.steps)} steps are not at the times of the plan's "
                f"{len(plan.steps)}"
            )
        check_recordable(plan)
        if different := own.form_options.for_kind("full").differences(plan.form_options.for_kind("full")):
            raise RecordError(f"the record is of a plan with another {different}")
        if not own.form_options.caches_all and not _same_tokens(own, plan):
            raise RecordError(
                "the record holds only some of the tokens, and the plan reads others: record with cached_ratio=1 and "
                "merged_ratio=1, or edit with the same mask"
            )
        generated = (own.token_kind == TokenKind.GENERATIVE) & ~plan.active_mask
        if generated.any():
            raise RecordError(
                f"{int(generated.sum())} tokens that the recorded edit generated are not active in the plan, which "
                "would take them for the clip: make it for both masks together, plan_for(pipe, mask=old | new, ...)"
            )
        missing = [step for step, kind in enumerate(plan.steps) if kind is StepKind.FULL and step not in self.steps]
        if missing:
            raise RecordError(
                f"step {missing[0]} is FULL in the plan and was not recorded: recorded were "
                f"{', '.join(map(str, self.steps)) or 'none'}"
            )

    def known_to(self, plan: Plan) -> Plan:
        """A plan that knows which of its computed tokens the recorded edit generated.

        They change because they are another's content now, and do not show how the context moves. Where no other token
        is computed outside the mask, the context stays.
        """
        if not plan.context_motion:
            return plan
        generated = self.plan.token_kind == TokenKind.GENERATIVE
        kind = np.where(generated, TokenKind.GENERATIVE, plan.token_kind).astype(np.uint8)
        known = replace(plan, token_kind=kind)
        return known if known.shows_motion else replace(known, context_motion=0)

    def check_entries(self, entries: tuple[CacheEntry, ...], plan: Plan) -> None:
        """See that what a form reads does not depend on which tokens are active, or that they are the recorded ones.

        Raises:
            RecordError: sums over the context are cached (linear attention), and the plan has another context.
        """
        if any(entry.role == "sum" for entry in entries) and not _same_tokens(self.plan, plan):
            raise RecordError(
                "this model caches sums over the inactive tokens (linear attention): only an edit with the same active "
                "tokens can read them"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as one safetensors file of `num_bytes`, atomically.

        Raises:
            OutputFileError: there is not enough room for it, or it cannot be written.
        """
        folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
        size, free = self.num_bytes, shutil.disk_usage(folder).free
        if free < size:
            sizes = f"the record has {size / 2**30:.2g} GiB, and {free / 2**30:.2g} GiB are free"
            raise OutputFileError(f"{path} cannot be written: {sizes}")
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to the host may be under way
        arrays, plan = self.plan.packed()
        tensors = {f"plan..{name}": torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        FILE.save_tensors(path, tensors | self._tensors(), {"plan": plan, "branches": list(self.branches)})

    def _tensors(self) -> Tensors:
        """Every recorded tensor, by its name in a file."""
        found: Tensors = {}
        for number, calls in enumerate(self.branches.values()):
            found |= {f"{number}.inputs.{name}": tensor for name, tensor in calls.inputs.items()}
            for step, conditions in calls.conditions.items():
                found |= {f"{number}.conditions.{step}.{place}": tensor for place, tensor in enumerate(conditions)}
            for step, settings in calls.settings.items():
                found |= {f"{number}.settings.{step}.{name}": tensor for name, tensor in settings.items()}
            for step, tensors in calls.steps.items():
                found |= {f"{number}.{step}.{name}": tensor for name, tensor in tensors.items()}
        return found

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Record:
        """Read a record into the host's memory, pinned where there is a GPU.

        Raises:
            RecordFileError: the file is missing, cut short, no record, or of another version.
        """
        return FILE.load_tensors(path, cls._unpacked)

    @classmethod
    def _unpacked(cls, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Record:
        groups: dict[str, dict[str, Tensors]] = {}
        for path, tensor in tensors.items():
            place, group, name = path.split(".", 2)
            held = tensor.pin_memory() if torch.cuda.is_available() and group.isdigit() else tensor
            groups.setdefault(place, {}).setdefault(group, {})[name] = held
        plan = {name: tensor.numpy() for name, tensor in groups.pop("plan")[""].items()}
        record = cls(Plan.unpacked(plan, header["plan"]))
        for number, key in enumerate(header["branches"]):
            of_branch = groups[str(number)]
            steps = {int(group): found for group, found in of_branch.items() if group.isdigit()}
            conditions, settings = (
                _by_step(of_branch.get(name, {}), min(steps)) for name in ("conditions", "settings")
            )
            texts = {
                first: tuple(found[place] for place in sorted(found, key=int)) for first, found in conditions.items()
            }
            record.branches[BranchKey(*key)] = RecordedCalls(of_branch.get("inputs", {}), texts, settings, steps)
        return record


def at(by_step: Mapping[int, T], step: int) -> T:
    """What calls had at a step, by the steps from which on they had it."""
    return by_step[max(first for first in by_step if first <= step)]


def _by_step(tensors: Tensors, first: int) -> dict[int, Tensors]:
    """The tensors of each step, by the names that stand behind it in a file. There were none where no step is named."""
    found: dict[int, Tensors] = {}
    for path, tensor in tensors.items():
        step, _, name = path.partition(".")
        found.setdefault(int(step), {})[name] = tensor
    return found or {first: {}}


def check_recordable(plan: Plan) -> None:
    """Raise `RecordError` if edits that follow a plan can neither be recorded nor read a record."""
    if plan.selects_at_run_time:
        raise RecordError(
            f"FULL steps choose the active tokens (selection {plan.selection!r}), and an edit from memory has none: "
            "make the plan with selection='uniform'"
        )


def _same_tokens(first: Plan, second: Plan) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in TOKENS)
