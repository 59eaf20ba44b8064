"""What of a cache is recorded, and how a later edit gets it back.

What a step computed under another text, its keys and values differ by nearly the same at every step. So where a branch
has another text than the recorded one, its first step is FULL, and the difference that it shows is added to what later
steps read (`Correction`).

=============================  =============================================  =======================================
entry                          recorded after a FULL step                     in an edit from memory
=============================  =============================================  =======================================
keys and values of attentions  all of it                                      read as it is, or corrected
outputs, hidden states         all rows, with earlier outputs and times       inactive rows; active ones are its own
anything else                  no                                             a PARTIAL step computes it
=============================  =============================================  =======================================
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..passes.forms.store import LARGEST, TYPES, decode, encode, stored_as
from ..passes.ir.axis import Tokens
from ..passes.ir.cache import CacheEntry
from ..passes.prediction.history import times_of
from ..passes.prediction.predict import older

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Kept:
    """A cache entry that is recorded.

    Attributes:
        entry: of the cache.
        rows: the dim that holds tokens and how they lie in it, where an edit keeps its own active rows; None where it
            reads the whole entry.
    """

    entry: CacheEntry
    rows: Tokens | None


def kept_of(reads: Sequence[CacheEntry]) -> Iterator[Kept]:
    """What is recorded of the entries of a form that runs in a process."""
    by_times = {times_of(entry, 0).input_name: entry for entry in reads if entry.rows == "tokens"}
    for entry in reads:
        if entry.group == "key_values":
            yield Kept(entry, None)
        elif entry.rows == "tokens":
            yield Kept(entry, entry.tokens.at(entry.dim))
        elif entry.input_name in by_times:
            yield Kept(entry, by_times[entry.input_name].tokens.at(1))


def rows_of(tokens: Tokens, selected: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The positions of the selected tokens, bool `[N]`, along a dim that holds tokens."""
    parts = [np.zeros(tokens.whole[0], dtype=np.bool_)]
    for length in tokens.whole[1:]:
        parts += [selected, np.zeros(length, dtype=np.bool_)]
    return np.flatnonzero(np.tile(np.repeat(np.concatenate(parts), tokens.inner), tokens.outer))


class Restorer:
    """Puts what was recorded into the buffers of an edit.

    Args:
        inactive: bool `[N]`, the tokens that PARTIAL steps of the edit do not compute.
    """

    def __init__(self, inactive: NDArray[np.bool_]) -> None:
        self.inactive = inactive
        self._rows: dict[tuple[Tokens, torch.device], torch.Tensor] = {}

    def restore(
        self,
        reads: Sequence[CacheEntry],
        buffers: Sequence[torch.Tensor],
        recorded: Tensors,
        correction: Correction | None = None,
    ) -> None:
        """Make buffers hold what others held after a FULL step, but for rows of active tokens.

        Args:
            reads: the entries in the buffers.
            buffers: of the branch.
            recorded: what the others hold, or a record does, by the entries' `input_name`; a buffer that is that tensor
                itself stays as it is.
            correction: of keys and values, if the branch has another text.
        """
        by_name = {entry.input_name: buffer for entry, buffer in zip(reads, buffers, strict=True)}
        for kept in kept_of(reads):
            buffer, values = by_name[kept.entry.input_name], recorded[kept.entry.input_name]
            if kept.rows is None:
                if buffer is not values:
                    buffer.copy_(values)
                continue
            chosen = values.index_select(kept.rows.dim, self._rows_of(kept.rows, values.device))
            buffer.index_copy_(kept.rows.dim, self._rows_of(kept.rows, buffer.device), chosen.to(buffer.device))
        if correction is not None:
            correction.add(by_name)

    def _rows_of(self, tokens: Tokens, device: torch.device) -> torch.Tensor:
        if (tokens, device) not in self._rows:
            self._rows[tokens, device] = torch.from_numpy(rows_of(tokens, self.inactive)).to(device)
        return self._rows[tokens, device]


class Correction:
    """How keys and values of a branch differ from the recorded ones, as one FULL step shows it.

    The values of one FULL step earlier, in whose place the branch has those of another text, or none, become the
    recorded ones, corrected by the same.

    Args:
        reads: the entries in the buffers of the FULL step.
        buffers: after it.
        recorded: of the same step, by the entries' `input_name`.
    """

    def __init__(self, reads: Sequence[CacheEntry], buffers: Sequence[torch.Tensor], recorded: Tensors) -> None:
        by_name = {entry.input_name: buffer for entry, buffer in zip(reads, buffers, strict=True)}
        stored = [found for entry in reads if (found := _stored(entry))]
        self.latest = [found for found in stored if found[0].role != "older"]
        self.older = {found[0].name: found for found in stored if found[0].role == "older"}
        self.differences: list[torch.Tensor] = []
        for found in self.latest:
            now, then = (_read(found, values) for values in (by_name, recorded))
            kind = found[0].dtype
            kept = kind if len(found) == 1 and kind.itemsize > 1 else torch.bfloat16
            self.differences.append((now - then.to(now.device)).to(kept))
        for entry in (*itertools.chain(*self.older.values()), *(entry for entry in reads if entry.role == "times")):
            if entry.group == "key_values":
                by_name[entry.input_name].copy_(recorded[entry.input_name])
        for found, difference in zip(self.latest, self.differences, strict=True):
            _add(self.older.get(older(found[0]).name, ()), difference, by_name)

    def add(self, by_name: Tensors) -> None:
        """Correct buffers that hold what was recorded of another step."""
        for found, difference in zip(self.latest, self.differences, strict=True):
            _add(found, difference, by_name)
            _add(self.older.get(older(found[0]).name, ()), difference, by_name)


def _add(stored: Sequence[CacheEntry], difference: torch.Tensor, by_name: Tensors) -> None:
    """Add a difference to what the entries of one key, value or sum hold."""
    if stored:
        encoded: Any = encode(_call, _read(stored, by_name) + difference, tuple(stored))  # type: ignore[arg-type]
        for entry, corrected in zip(stored, encoded, strict=True):
            by_name[entry.input_name].copy_(corrected)


def _call(op: Any, *args: Any, **kwargs: Any) -> Any:
    """What adds a node to a graph computes here."""
    return op(*args, **kwargs)


def _stored(entry: CacheEntry) -> tuple[CacheEntry, ...]:
    """The entries that hold one key, value or sum: the numbers, and their scales if there are any; else nothing."""
    if entry.group != "key_values" or entry.role not in ("key", "value", "sum", "older"):
        return ()
    names = [name for name, dtype in TYPES.items() if dtype == entry.dtype and dtype in LARGEST]
    return stored_as(replace(entry, dtype=torch.float32), names[0]) if names else (entry,)


def _read(stored: Sequence[CacheEntry], values: Tensors) -> torch.Tensor:
    given: Any = tuple(values[entry.input_name] for entry in stored)
    found: Any = decode(_call, given, torch.float32)
    return torch.as_tensor(found)


def recorded_of(
    reads: Sequence[CacheEntry], buffers: Sequence[torch.Tensor], is_lent: Callable[[CacheEntry], bool]
) -> dict[str, torch.Tensor]:
    """What is recorded of a cache after a FULL step, by the entries' `input_name`.

    Args:
        reads: the entries in the buffers.
        buffers: of the branch.
        is_lent: whether an entry's buffer itself becomes a part of the record. Of others a copy on the host does.
    """
    by_name = {entry.input_name: buffer for entry, buffer in zip(reads, buffers, strict=True)}
    found = {}
    for kept in kept_of(reads):
        buffer = by_name[kept.entry.input_name]
        found[kept.entry.input_name] = buffer if is_lent(kept.entry) else on_host(buffer)
    return found


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory, whose numbers lie one after the other: a file takes no others."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
