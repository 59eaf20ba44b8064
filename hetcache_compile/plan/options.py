"""What a plan may choose about how to cache: one dataclass, that Python, the command line and the docs read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

from ..errors import PlanError
from ..passes.ir.contract import CACHE_DTYPES, CACHED_BY, MAX_ORDER, STRATEGIES

SELECTIONS = ("none", "uniform", "random", *STRATEGIES)
"""How context tokens are chosen for PARTIAL steps: not at all, evenly by distance, at random; or by full steps."""
CACHE_DEVICES = ("auto", "same", "cpu")
"""Where keys and values are cached: where the model runs, in the host's memory (see `runtime.streaming`), or there only
if they do not fit beside the model."""
CACHED_SHARES = ("same", "measured")
"""How many tokens attentions cache that choose them: as many each, or so that they lose the least (see
`Record.counts_for`)."""
MERGINGS = ("boxes", "kmeans")
"""How cached tokens are merged: in boxes of neighbours; or by full steps, alike keys of each attention."""
RUNGS = 16
"""Values that M may have where `multiple` is 0: shares of N."""
TILE = 32
"""Each of them is a multiple of it, but for N: GPUs like full tiles."""
WHERE_IT_CAN = -1
"""Of `context_motion`: on in plans that can have it, off in others."""
KINDS = {"int": (Integral, "a whole number"), "float": (Real, "a number"), "str": (str, "a name")}
"""What a value of each type must be, and what that is called."""


USUAL: Mapping[str, Any] = {"extrapolation": 1, "context_motion": WHERE_IT_CAN}
"""What plans for a model's edits take where nothing else is asked for: both need no measuring, and hardly any time."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class PlanOptions:
    """What a plan may choose about how to cache. Each field's `metadata["help"]` says what it is."""

    margin: float = _option(2.0, "how far from the mask the margin reaches, in tokens")
    margin_ratio: float = _option(1.0, "share of the margin that PARTIAL steps compute, nearest first")
    context_ratio: float = _option(0.05, "share of the context that PARTIAL steps compute too")
    cached_ratio: float = _option(
        1.0, "share of the remaining tokens whose keys and values PARTIAL steps read; 1 is exact"
    )
    cached_by: str = _option(
        "distance",
        f"which of them these are where not all are read, one of {', '.join(CACHED_BY)}: the nearest to the mask, or "
        "those that generated tokens attend to most, which each attention chooses in FULL steps",
    )
    cached_shares: str = _option(
        "same",
        f"how many of them each attention caches where attentions choose, one of {', '.join(CACHED_SHARES)}: as many "
        "as all others; or as many as the calibration says, in the same bytes",
    )
    multiple: int = _option(
        0,
        f"M is rounded up to a multiple of it; 0: to one of {RUNGS} steps of a ladder, so that varied masks share a "
        "handful of compiled forms",
    )
    extrapolation: int = _option(
        0,
        f"order (0 to {MAX_ORDER}) at which outputs that a step does not compute are predicted; 0 repeats. "
        "`plan_for` takes 1 where the model has a timestep",
    )
    context_extrapolation: int = _option(
        0, "1 to predict cached keys and values from the last two FULL steps, for twice their memory"
    )
    context_motion: int = _option(
        0,
        "1 to move the cached keys and values of a token as those of the nearest computed tokens outside the mask have "
        "moved since the last FULL step, -1 to do so where the plan can; `plan_for` takes -1",
    )
    shared_context: int = _option(
        0,
        "1 to let the calls of a step of guidance read the keys and values that its first call computed: then FULL "
        "steps compute all tokens in one call only, and the cache is kept once, but the others' results are no more "
        "exact",
    )
    selection: str = _option(
        "uniform",
        f"how the context among the active tokens is chosen, one of {', '.join(SELECTIONS)}: none of it, spread "
        "evenly, at random; or by FULL steps: what generated tokens attend to most, one from every part of the "
        "context, or both, as in the paper",
    )
    merged_ratio: float = _option(
        1.0, "how many centroids stand for the cached keys and values, as a share of them; 1 merges none"
    )
    merging: str = _option(
        "boxes",
        f"how cached tokens are merged, one of {', '.join(MERGINGS)}: boxes of neighbours, or in FULL steps keys of "
        "each attention that are alike",
    )
    cache_dtype: str = _option(
        "same",
        f"the type that keys and values are cached in, one of {', '.join(CACHE_DTYPES)}: as computed, or smaller; fp8 "
        "(e4m3) and int8 have a scale for each token and head",
    )
    cache_device: str = _option(
        "auto",
        f"where keys and values are cached, one of {', '.join(CACHE_DEVICES)}: where the model runs if they fit; there "
        "in any case; or in the host's memory, from where each is copied in just ahead of the block that reads it",
    )
    multistep: int = _option(
        1,
        "1 to weigh outputs as the calibration's regression says, 0 to go by their times; without a calibration, or "
        "where FULL steps choose the active tokens, it is 0",
    )

    @property
    def computes_context(self) -> bool:
        """Whether PARTIAL steps are asked to compute tokens outside the mask."""
        margin = self.margin >= 1 and self.margin_ratio > 0
        return margin or (self.context_ratio > 0 and self.selection != "none")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The options, in order."""
        return tuple(one.name for one in fields(cls))

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Whether these are options, by name and type. Whether a value is in range is known with the edit.

        Raises:
            PlanError: no such option, or no value for it.
        """
        types = {one.name: str(one.type) for one in fields(cls)}
        for name, value in options.items():
            if name not in types:
                raise PlanError(f"there is no option {name!r}: give one of {', '.join(types)}")
            kind, noun = KINDS[types[name]]
            if not isinstance(value, kind):
                raise PlanError(f"{name} must be {noun}, got {value!r}")

    def with_changes(self, options: Mapping[str, Any]) -> PlanOptions:
        """These options with some of them changed.

        Raises:
            PlanError: see `check`.
        """
        self.check(options)
        return replace(self, **options)
