"""What of a cache is recorded, and how a later edit gets it back.

=============================  =============================================  =======================================
entry                          recorded after a FULL step                     in an edit from memory
=============================  =============================================  =======================================
keys and values of attentions  all of it                                      read as it is
outputs, hidden states         all rows, with earlier outputs and times       inactive rows; active ones are its own
anything else                  no                                             a PARTIAL step computes it
=============================  =============================================  =======================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..passes.ir.axis import Tokens
from ..passes.ir.cache import CacheEntry
from ..passes.prediction.history import times_of

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
        self._rows: dict[Tokens, torch.Tensor] = {}

    def restore(self, reads: Sequence[CacheEntry], buffers: Sequence[torch.Tensor], recorded: Tensors) -> None:
        """Make buffers hold what they held after a FULL step of the recorded edit, but for rows of active tokens.

        Args:
            reads: the entries in the buffers.
            buffers: of the branch.
            recorded: by the entries' `input_name`; a buffer that is the recorded tensor itself stays as it is.
        """
        by_name = {entry.input_name: buffer for entry, buffer in zip(reads, buffers, strict=True)}
        for kept in kept_of(reads):
            buffer, values = by_name[kept.entry.input_name], recorded[kept.entry.input_name]
            if kept.rows is None:
                if buffer is not values:
                    buffer.copy_(values)
                continue
            rows = self._rows_of(kept.rows)
            values = values.index_select(kept.rows.dim, rows).to(buffer.device)
            buffer.index_copy_(kept.rows.dim, rows.to(buffer.device), values)

    def _rows_of(self, tokens: Tokens) -> torch.Tensor:
        if tokens not in self._rows:
            self._rows[tokens] = torch.from_numpy(rows_of(tokens, self.inactive))
        return self._rows[tokens]


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
        found[kept.entry.input_name] = buffer if is_lent(kept.entry) else buffer.detach().to("cpu", copy=True)
    return found
