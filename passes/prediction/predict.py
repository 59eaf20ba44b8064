"""Let attention read cached keys and values as they should be now, instead of as they were in the last FULL step.

Keys and values of known context do not stand still: they move nearly as fast as those of generated tokens, but along
a nearly straight line in the time of the flow (docs/drift.md). Each cached tensor keeps the value of the FULL step
before beside the latest one, and a partial step reads the line through both at the present time.

=========  ==========================================================================
form       after the pass
=========  ==========================================================================
full       what the cache held becomes the older value, unless it is of the same time
partial    reads `latest + (latest - older) * (now - t0) / (t0 - t1)`
reuse      as before
=========  ==========================================================================

Until two FULL steps at different times were taken, the latest value is read as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from ..ir.axis import Tokens
from ..ir.cache import CacheEntry
from ..ir.editor import FormEditor, FormPass
from ..ir.graphs import AddNode
from .times import NOT_COMPUTED, arithmetic_of, latest_time, time_of

aten = torch.ops.aten


@dataclass(frozen=True)
class PredictContext(FormPass):
    """Cached keys and values predicted along a straight line in time.

    Attributes:
        time_input: the placeholder that holds the time of the step; by default the one called like `timestep`.

    Raises:
        UnsupportedGraphError: no input is the time.
    """

    time_input: str | None = None

    name = "predict"

    def cached(self, entries: tuple[CacheEntry, ...]) -> tuple[CacheEntry, ...]:
        """See `FormPass`."""
        predicted = [entry for entry in entries if entry.group == "key_values"]
        return (*entries, *map(older, predicted), *map(full_step_times, predicted[:1]))

    def edit(self, form: FormEditor) -> None:
        """Read lines in partial steps; keep two values in full steps."""
        entries = [entry for entry in dict.fromkeys((*form.reads, *form.writes)) if entry.group == "key_values"]
        if not entries:
            return
        time = time_of(form, self.time_input)
        call = form.at_start()
        times_entry = full_step_times(entries[0])
        now = latest_time(call, time, times_entry.dtype, form.device)
        times = form.read(times_entry)
        if form.kind == "partial":
            line = _Line(call, times, now)
            for entry in entries:
                latest = form.read(entry)
                line.read(form.before_users(latest), latest, form.read(older(entry)))
            # What the last full step computed stays as it is: predictions start from it.
            form.writes = {entry: value for entry, value in form.writes.items() if entry not in entries}
            return
        # A step at the time of the last one (a second-order solver) replaces it. Nor may this be a plain copy:
        # compilers write buffers in the order of arguments, where the latest value, which is overwritten too, is first.
        moves = call(aten.ne.Tensor, now, call(aten.select.int, times, 0, 0))
        before = {
            older(entry): form.after(value)(aten.where.self, moves, form.read(entry), form.read(older(entry)))
            for entry, value in form.writes.items()
            if entry in entries
        }
        moved = call(aten.cat.default, [call(aten.view.default, now, [1]), call(aten.slice.Tensor, times, 0, 0, 1)])
        # History is stored first: it reads what the latest values are about to overwrite.
        form.writes = {**before, times_entry: call(aten.where.self, moves, moved, times), **form.writes}


def older(entry: CacheEntry) -> CacheEntry:
    """The value one FULL step earlier."""
    return replace(entry, name=f"{entry.name}.1", role="older")


def full_step_times(entry: CacheEntry) -> CacheEntry:
    """`[2]`: when the last two FULL steps were, latest first; `NOT_COMPUTED` where there was none."""
    return replace(
        entry, name="times", role="times", layer=None, rows="none", dim=0, shape=(2,), dtype=arithmetic_of(entry),
        tokens=Tokens(0), initial=NOT_COMPUTED,
    )  # fmt: skip


class _Line:
    """How far the line goes beyond the latest value, in units of the last interval; whether there is no interval."""

    def __init__(self, call: AddNode, times: Node, now: Node) -> None:
        latest, before = (call(aten.select.int, times, 0, i) for i in range(2))
        apart = call(aten.sub.Tensor, latest, before)
        never = call(aten.lt.Scalar, before, 0.5 * NOT_COMPUTED)
        self.missing = call(aten.logical_or.default, never, call(aten.eq.Scalar, apart, 0))
        self.weight = call(aten.div.Tensor, call(aten.sub.Tensor, now, latest), apart)

    def read(self, call: AddNode, latest: Node, before: Node) -> None:
        """Every reader of the latest value gets the line's."""
        readers = list(latest.users)
        weight = call(aten._to_copy.default, self.weight, dtype=latest.meta["val"].dtype)
        step = call(aten.mul.Tensor, call(aten.sub.Tensor, latest, before), weight)
        # Memory that was never written may hold NaN, which no weight takes away.
        prediction = call(aten.add.Tensor, latest, call(aten.masked_fill.Scalar, step, self.missing, 0))
        for reader in readers:
            reader.replace_input_with(latest, prediction)
