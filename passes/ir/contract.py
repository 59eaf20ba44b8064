"""What plans and passes agree on: budgets, the options of forms, and the limits of both. Plain data, no graphs."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

MAX_ORDER = 2
"""The highest order at which outputs are extrapolated."""
NUM_QUERIES = 256
"""Generative queries that attention is measured with, spread evenly over the mask."""
NEVER, CANDIDATE, ALWAYS = range(3)
"""A token's standing: margin that the plan leaves out, context, active whatever is chosen."""
STRATEGIES = ("attention", "kmeans", "hetcache")
"""Selections made in a FULL step: by relevance, by representativeness, by both."""
CACHE_DTYPES = ("same", "bf16", "fp8", "int8")
"""Types in which keys and values are cached: as computed, or smaller ones (see `passes.forms.store`)."""
CACHED_BY = ("distance", "attention")
"""Which of the inactive tokens are cached, where not all are: the nearest, or by FULL steps (see
`passes.forms.keep_relevant`)."""
STEP_WEIGHTS = "step_weights"
TOKEN_ANCHORS, NUM_ANCHORS = "token_anchors", 2
"""Context that moves: an index, and how many computed tokens show how one that is not computed has moved. One has noise
of its own, which would be that of all its neighbours; more are farther away."""
INACTIVE, ACTIVE = range(2)
"""The rows of `step_weights`."""


@dataclass(frozen=True)
class Budgets:
    """M active and C cached context tokens: all a form's shapes know of a plan."""

    num_active: int
    num_context: int


class FormOptions(NamedTuple):
    """All that forms know of a plan: plans that agree in it share their forms.

    Attributes:
        grid: token grid (T', H', W').
        num_active: M.
        num_context: C.
        num_merged: C', centroids that stand for the C cached tokens; C where none are merged.
        merging: how they are merged, "boxes" or "kmeans"; "boxes" where none are.
        extrapolation: order at which outputs are predicted.
        context_extrapolation: 1 where cached keys and values are predicted.
        selection: one of `STRATEGIES` where full steps choose the active tokens, else "fixed".
        cache_dtype: one of `CACHE_DTYPES`.
        cached_by: one of `CACHED_BY`; "distance" where all are.
        cached_counts: how many tokens each attention caches, in graph order; empty where it is C for all.
        context_motion: 1 where cached keys and values move with computed tokens near them.
    """

    grid: tuple[int, int, int]
    num_active: int
    num_context: int
    num_merged: int
    merging: str = "boxes"
    extrapolation: int = 0
    context_extrapolation: int = 0
    selection: str = "fixed"
    cache_dtype: str = "same"
    cached_by: str = "distance"
    cached_counts: tuple[int, ...] = ()
    context_motion: int = 0

    @property
    def num_tokens(self) -> int:
        """N."""
        return prod(self.grid)

    @property
    def budgets(self) -> Budgets:
        """M and C."""
        return Budgets(self.num_active, self.num_context)

    @property
    def merges(self) -> bool:
        """Whether centroids stand for the context."""
        return self.num_merged < self.num_context

    @property
    def caches_all(self) -> bool:
        """Whether every token is active or cached as it is."""
        return self.num_active + self.num_merged == self.num_tokens

    def for_kind(self, kind: str) -> FormOptions:
        """What a form of this kind that runs in a process knows of a plan.

        Where all rows are kept, full and reuse forms do not know M: plans of any M share them.
        """
        if kind == "partial" or self.selection != "fixed" or not self.caches_all:
            return self
        context = self.num_tokens - 1
        return self._replace(num_active=1, num_context=context, num_merged=context, context_motion=0)

    def at(self, budgets: Budgets) -> FormOptions:
        """The same options for another M and C."""
        merged = self.num_merged if self.merges else budgets.num_context
        return self._replace(num_active=budgets.num_active, num_context=budgets.num_context, num_merged=merged)

    def differences(self, other: FormOptions) -> str:
        """What the other has otherwise, such as `num_active (35, 40)`; empty where they agree."""
        pairs = zip(self._fields, self, other, strict=True)
        return ", ".join(f"{name} ({ours}, {theirs})" for name, ours, theirs in pairs if ours != theirs)
