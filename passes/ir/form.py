"""A form: one static-shape graph of a model with explicit state."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from .cache import CacheEntry


@dataclass(frozen=True)
class Form:
    """A graph with explicit state.

    `module(*model_inputs, *indices, *reads)` returns `(*model_outputs, *writes)`, in these orders.
    """

    kind: str
    module: GraphModule
    indices: tuple[str, ...]
    reads: tuple[CacheEntry, ...]
    writes: tuple[CacheEntry, ...]
