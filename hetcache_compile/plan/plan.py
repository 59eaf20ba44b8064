"""The plan: partition, budgets and step schedule, made before the first step and saved as one file."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import MaskError, PlanError, PlanFileError
from ..files import ArrayFile
from ..passes.ir.contract import (
    ALWAYS,
    CACHE_DTYPES,
    CACHED_BY,
    CANDIDATE,
    MAX_ORDER,
    NEVER,
    NUM_ANCHORS,
    NUM_QUERIES,
    STRATEGIES,
    Budgets,
    FormOptions,
)  # fmt: skip
from .cache_size import CacheSize
from .options import CACHE_DEVICES, CACHED_SHARES, MERGINGS, SELECTIONS, WHERE_IT_CAN, PlanOptions
from .partition import (
    Grid,
    TokenKind,
    check_grid,
    choose_active,
    choose_context,
    classify,
    merge_context,
    nearest,
    to_token_grid,
)
from .prediction import Prediction
from .schedule import Schedule, StepKind, make_schedule, schedule_name

FILE = ArrayFile("hetplan", "plan", 1, "make the plan anew", PlanFileError)
ARRAYS = (
    "active_index",
    "context_index",
    "token_kind",
    "timesteps",
    "sigmas",
    "distances",
    "context_cluster",
    "weights",
)
HEADER = (
    "schedule",
    "extrapolation",
    "context_extrapolation",
    "context_motion",
    "selection",
    "merging",
    "cache_dtype",
    "cache_device",
    "shared_context",
    "cached_by",
    "cached_counts",
    "token_inputs",
)
"""What the file's header holds beside the grid."""
COUNTED, SIZES = "cache_size", ("branch", "keys_and_values", "window", "branches", "shareable")
"""Where the header has the size of the cache, and what of it: it is of the file's own plan."""


class Guide(Protocol):
    """What schedules a plan by what it knows of a model: a `Calibration`."""

    def like(self, options: Mapping[str, Any]) -> Self:
        """What it knows of the measured variant that is nearest to these options of a plan."""

    def counts_for(self, plan: Plan) -> tuple[int, ...]:
        """How many tokens each attention should cache, in as many bytes as the plan has."""

    def scheduled(self, plan: Plan, schedule: Schedule, *, multistep: bool = True) -> Plan:
        """The plan with the steps of a schedule, and weights of its outputs if `multistep`."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What every step of an edit computes.

    Attributes:
        grid: token grid (T', H', W'); N = T'·H'·W'.
        active_index: int64 `[M]`, sorted; the tokens a PARTIAL step computes.
        context_index: int64 `[C]`, sorted; the tokens whose cached K/V it reads. Disjoint from `active_index`.
        token_kind: uint8 `[N]` of `TokenKind`.
        steps: one `StepKind` for each model step.
        timesteps: float64 `[S]`, the scheduler's, or empty if the plan was made without one.
        sigmas: float64 `[S]`, the scheduler's noise levels, or empty: some models are given these.
        distances: float64 `[S]` of `time_distances`, or empty.
        schedule: how `steps` was asked for.
        extrapolation: order at which outputs that a step does not compute are predicted (see
            `passes.prediction.extrapolate`).
        context_extrapolation: 1 where cached K/V are predicted from two FULL steps, which takes their memory twice (see
            `passes.prediction.predict`); 0 where they are read as they are.
        context_motion: 1 where cached K/V move with computed tokens near them (see `passes.prediction.motion`).
        selection: how the context among the active tokens is chosen (see `options.SELECTIONS`). Where full steps
            choose it (`passes.forms.select`), `active_index` is what they start from.
        context_cluster: int64 `[C]`, which of C' centroids each cached token goes into (see `passes.forms.merge`), or
            empty where none are merged.
        weights: float32 `[S, 2, extrapolation + 2]` of every step's outputs (see `output_weights.step_weights`), or
            empty where steps go by their times.
        merging: how cached tokens are merged (see `options.MERGINGS`). Where full steps cluster the keys of each
            attention (`passes.kernels.kmeans`), they start from `context_cluster`.
        cache_dtype: the type that keys and values are cached in (see `passes.forms.store`).
        cache_device: where they are cached (see `options.CACHE_DEVICES`).
        cached_by: what chooses the cached tokens where not all are (see `contract.CACHED_BY`). Where FULL steps do,
            `context_index` says how many they are, and what attentions read whose scores cannot be.
        cached_counts: how many tokens each attention caches, in graph order, where FULL steps choose them and the
            numbers differ; else empty.
        shared_context: 1 where the calls of a step of guidance read the keys and values of the first one.
        token_inputs: where latents come packed, the inputs of the model that hold tokens: the dim of the tokens and
            the row of the first, by name. References may stand before and behind them.
        counted: how large the cache is, where the model was known (see `cache_size`).
    """

    grid: Grid
    active_index: NDArray[np.int64]
    context_index: NDArray[np.int64]
    token_kind: NDArray[np.uint8]
    steps: tuple[StepKind, ...]
    timesteps: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    distances: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    schedule: str = "list"
    extrapolation: int = 0
    context_extrapolation: int = 0
    selection: str = "uniform"
    context_cluster: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    weights: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    merging: str = "boxes"
    cache_dtype: str = "same"
    cache_device: str = "auto"
    cached_by: str = "distance"
    cached_counts: tuple[int, ...] = ()
    sigmas: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    context_motion: int = 0
    shared_context: int = 0
    token_inputs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    counted: CacheSize | None = None

    def __post_init__(self) -> None:
        check_grid(self.grid)
        active, context = self.active_index, self.context_index
        if any(index.dtype != np.int64 or index.ndim != 1 for index in (active, context)):
            raise PlanError("token indices must be int64 vectors")
        both = np.concatenate([active, context])
        if active.size < 1:
            raise PlanError("a plan needs at least one active token")
        if both.min() < 0 or both.max() >= self.num_tokens or np.unique(both).size != both.size:
            raise PlanError(f"token indices must be distinct and lie between 0 and {self.num_tokens - 1}")
        if (np.diff(active) < 0).any() or (np.diff(context) < 0).any():
            raise PlanError("token indices must be sorted")
        if self.token_kind.shape != (self.num_tokens,) or self.token_kind.max() > max(TokenKind):
            raise PlanError(f"token_kind must hold a kind for each of the {self.num_tokens} tokens")
        if self.extrapolation not in range(MAX_ORDER + 1):
            raise PlanError(f"extrapolation must be 0 to {MAX_ORDER}, got {self.extrapolation}")
        if self.context_extrapolation not in (0, 1):
            raise PlanError(f"context_extrapolation must be 0 or 1, got {self.context_extrapolation}")
        if self.context_motion not in (0, 1):
            raise PlanError(f"context_motion must be 0 or 1, got {self.context_motion}")
        if self.shared_context not in (0, 1):
            raise PlanError(f"shared_context must be 0 or 1, got {self.shared_context}")
        if self.shared_context and self.selects_at_run_time:
            raise PlanError(f"selection {self.selection!r} chooses tokens in each call: shared_context must be 0")
        if self.selection not in SELECTIONS:
            raise PlanError(f"selection must be one of {', '.join(SELECTIONS)}, got {self.selection!r}")
        if self.selects_at_run_time and both.size < self.num_tokens:
            raise PlanError(f"selection {self.selection!r} needs every token active or cached: use cached_ratio 1")
        if self.cache_dtype not in CACHE_DTYPES:
            raise PlanError(f"cache_dtype must be one of {', '.join(CACHE_DTYPES)}, got {self.cache_dtype!r}")
        if self.cache_device not in CACHE_DEVICES:
            raise PlanError(f"cache_device must be one of {', '.join(CACHE_DEVICES)}, got {self.cache_device!r}")
        self._check_clusters()
        self._check_cached_by()
        if self.context_motion and self.immovable is not None:
            raise PlanError(self.immovable)
        if not self.steps or self.steps[0] is not StepKind.FULL:
            raise PlanError("a plan needs at least one step, and its first step must be FULL")
        self._check_weights()
        per_step = (self.timesteps, self.sigmas, self.distances)
        if any(array.shape not in ((0,), (len(self.steps),)) for array in per_step):
            raise PlanError(
                f"timesteps, sigmas and distances must be empty or hold one value for each of {len(self.steps)} steps"
            )

    def _check_clusters(self) -> None:
        cluster = self.context_cluster
        if self.merging not in MERGINGS:
            raise PlanError(f"merging must be one of {', '.join(MERGINGS)}, got {self.merging!r}")
        if not cluster.size:
            return
        if cluster.dtype != np.int64 or cluster.shape != self.context_index.shape:
            raise PlanError(f"context_cluster must be int64 [{self.num_context}], got {cluster.dtype} {cluster.shape}")
        if np.unique(cluster).tolist() != list(range(self.num_merged)):
            raise PlanError("the clusters of context_cluster must be numbered from 0, and none may be empty")
        if self.selects_at_run_time:
            raise PlanError(f"selection {self.selection!r} changes the context while it runs: it cannot be merged")
        if self.merging == "kmeans" and self.context_extrapolation:
            raise PlanError("merging 'kmeans' draws new clusters in full steps, which context_extrapolation needs kept")

    def _check_cached_by(self) -> None:
        if self.cached_by not in CACHED_BY:
            raise PlanError(f"cached_by must be one of {', '.join(CACHED_BY)}, got {self.cached_by!r}")
        if self.form_options.cached_by == "attention" and (self.num_merged < self.num_context):
            raise PlanError(
                "cached_by 'attention' chooses tokens in FULL steps, which cannot be merged: merged_ratio 1"
            )
        if self.form_options.cached_by == "attention" and self.context_extrapolation:
            raise PlanError(
                "cached_by 'attention' chooses other tokens in each FULL step: context_extrapolation, which compares "
                "two of them, must be 0"
            )
        if not self.cached_counts:
            return
        if self.form_options.cached_by != "attention":
            raise PlanError("numbers of cached tokens for each attention need cached_by 'attention', cached_ratio < 1")
        most, total = self.num_tokens - self.num_active, len(self.cached_counts) * self.num_context
        if not all(0 < count <= most for count in self.cached_counts) or sum(self.cached_counts) > total:
            raise PlanError(f"cached_counts must be 1 to {most} for each attention, and no more than {total} in all")

    def _check_weights(self) -> None:
        if not self.weights.size:
            return
        shape = (len(self.steps), 2, self.extrapolation + 2)
        if self.weights.dtype != np.float32 or self.weights.shape != shape or not np.isfinite(self.weights).all():
            raise PlanError(f"weights must be finite float32 {shape}, got {self.weights.dtype} {self.weights.shape}")
        if not self.extrapolation or self.selects_at_run_time:
            raise PlanError("weights need an extrapolation of at least 1, and a selection that full steps do not make")

    @property
    def immovable(self) -> str | None:
        """Why cached keys and values cannot move as `context_motion` has it; None where they can."""
        if self.selects_at_run_time:
            return f"selection {self.selection!r} changes the active tokens, with which others move: context_motion=0"
        if not self.form_options.caches_all:
            return "context_motion needs every token active or cached: use cached_ratio 1 and merged_ratio 1"
        return None

    @property
    def num_tokens(self) -> int:
        """N."""
        return prod(self.grid)

    @property
    def num_active(self) -> int:
        """M."""
        return int(self.active_index.size)

    @property
    def num_context(self) -> int:
        """C."""
        return int(self.context_index.size)

    @property
    def num_merged(self) -> int:
        """C': keys and values that stand for the C cached tokens."""
        return int(self.context_cluster.max()) + 1 if self.context_cluster.size else self.num_context

    @property
    def context_log_size(self) -> NDArray[np.float32]:
        """Float32 `[C']`: the log of how many tokens a centroid stands for."""
        return np.log(np.bincount(self.context_cluster)).astype(np.float32)

    @property
    def form_options(self) -> FormOptions:
        """All that forms know of the plan: not how a fixed selection was made, nor how nothing is merged."""
        merged = self.num_merged < self.num_context
        return FormOptions(
            self.grid, self.num_active, self.num_context, self.num_merged, self.merging if merged else "boxes",
            self.extrapolation, self.context_extrapolation, self.selection if self.selects_at_run_time else "fixed",
            self.cache_dtype, self.cached_by if self.num_active + self.num_context < self.num_tokens else "distance",
            self.cached_counts, self.context_motion,
        )  # fmt: skip

    @property
    def cache_size(self) -> CacheSize | None:
        """How large its cache is; None where that was not counted, or for other options."""
        if self.counted is None or self.counted.options != self.form_options:
            return None
        return replace(self.counted, shared=bool(self.shared_context))

    @property
    def budgets(self) -> Budgets:
        """M and C: plans that share them share their compiled forms."""
        return Budgets(self.num_active, self.num_context)

    @property
    def batch_key(self) -> Hashable:
        """Plans with equal keys can share a session, and so their edits a batch."""
        return (
            self.form_options, self.steps, self.timesteps.tobytes(), self.weights.size > 0, self.cache_device,
            self.shared_context, tuple(self.token_inputs.items()),
        )  # fmt: skip

    @property
    def selects_at_run_time(self) -> bool:
        """Whether FULL steps choose the active tokens."""
        return self.selection in STRATEGIES

    @property
    def active_mask(self) -> NDArray[np.bool_]:
        """Bool `[N]`: which tokens are active."""
        mask = np.zeros(self.num_tokens, dtype=np.bool_)
        mask[self.active_index] = True
        return mask

    @property
    def token_standing(self) -> NDArray[np.int64]:
        """Int64 `[N]`: whether FULL steps may choose a token (see `passes.kernels.token_choice`): context only."""
        kept = np.where(self.active_mask, ALWAYS, NEVER)
        return np.where(self.token_kind == TokenKind.CONTEXT, CANDIDATE, kept).astype(np.int64)

    @property
    def token_anchors(self) -> NDArray[np.int64]:
        """Int64 `[NUM_ANCHORS, N]`: the places in `active_index` of the tokens that show how a token's K/V have moved.

        They are the nearest active ones outside the mask; the nearest active ones where all are inside.
        """
        known = np.flatnonzero(self.token_kind[self.active_index] != TokenKind.GENERATIVE)
        known = known if known.size else np.arange(self.num_active)
        return known[nearest(self.active_index[known], self.grid, NUM_ANCHORS)]

    @property
    def shows_motion(self) -> bool:
        """Whether some computed token lies outside the mask, and so shows how the context moves."""
        return bool((self.token_kind[self.active_index] != TokenKind.GENERATIVE).any())

    @property
    def query_index(self) -> NDArray[np.int64]:
        """Int64 `[NUM_QUERIES]`: generative tokens, spread evenly, that measure how relevant the others are."""
        generative = np.flatnonzero(self.token_kind == TokenKind.GENERATIVE)
        return generative[(np.arange(NUM_QUERIES) * generative.size) // NUM_QUERIES]

    @property
    def prediction(self) -> Prediction:
        """How outputs are predicted and corrected."""
        fresh = self.weights[..., 0] if self.weights.size else self.weights
        return Prediction(
            self.extrapolation, bool(self.weights.size), corrects=bool(np.isin(fresh, (0, 1), invert=True).any())
        )

    @property
    def step_weights(self) -> NDArray[np.float32]:
        """Float32 `[2, extrapolation + 2]`: those of a step outside the plan, which goes by its time."""
        return np.zeros((2, self.extrapolation + 2), dtype=np.float32)

    @classmethod
    def from_mask(
        cls,
        mask: Any,
        grid: tuple[int, int, int],
        *,
        num_inference_steps: int = 50,
        schedule: Schedule = "balanced",
        temporal_factor: int = 4,
        temporal_patch: int = 1,
        reference_frames: int = 0,
        calibration: Guide | None = None,
        options: PlanOptions | None = None,
        **changes: Any,
    ) -> Plan:
        """A plan from a mask in pixels or on the token grid.

        Args:
            mask: bool `[T, H, W]` or anything else that `mask.to_mask` takes; see `partition.to_token_grid` for the
                layout of frames.
            grid: token grid (T', H', W'), with reference frames in front.
            num_inference_steps: number of model steps.
            schedule: see `schedule.make_schedule`.
            temporal_factor: pixel frames per latent frame after the first.
            temporal_patch: latent frames per token frame.
            reference_frames: latent frames of reference images, in front.
            calibration: of the model, for an `"optimal:..."` schedule and for fitted weights; its noise schedule and
                its solver are taken for the edit's.
            options: how to cache; by default `PlanOptions()`.
            changes: fields of `PlanOptions`, over those of `options`: `margin=1.0`.

        Raises:
            MaskError: the mask is empty or does not fit the grid.
            PlanError: an argument is out of range.
        """
        chosen = (options or PlanOptions()).with_changes(changes)
        grid = check_grid(grid)
        generative = to_token_grid(
            mask,
            grid,
            temporal_factor=temporal_factor,
            temporal_patch=temporal_patch,
            reference_frames=reference_frames,
        )
        kind, distance = classify(generative, chosen.margin)
        active = choose_active(
            kind, distance, margin_ratio=chosen.margin_ratio, context_ratio=chosen.context_ratio,
            multiple=chosen.multiple, selection=chosen.selection,
        )  # fmt: skip
        context = choose_context(active, distance, cached_ratio=chosen.cached_ratio)
        clusters = merge_context(context, distance, grid, merged_ratio=chosen.merged_ratio)
        plan = cls(
            grid, active, context, kind, make_schedule("full", num_inference_steps),
            extrapolation=chosen.extrapolation, context_extrapolation=chosen.context_extrapolation,
            selection=chosen.selection, context_cluster=clusters, merging=chosen.merging,
            cache_dtype=chosen.cache_dtype, cache_device=chosen.cache_device, cached_by=chosen.cached_by,
            shared_context=chosen.shared_context,
        )._moving(chosen)  # fmt: skip
        if chosen.cached_shares not in CACHED_SHARES:
            raise PlanError(f"cached_shares must be one of {', '.join(CACHED_SHARES)}, got {chosen.cached_shares!r}")
        if chosen.cached_shares == "measured" and calibration is None:
            raise PlanError("cached_shares 'measured' needs a calibration, which measures attentions")
        if calibration is None:
            return plan.with_schedule(schedule)
        if chosen.cached_shares == "measured":
            plan = replace(plan, cached_counts=calibration.counts_for(plan))
        varied = {
            "margin": float(chosen.margin), "context_extrapolation": chosen.context_extrapolation,
            "context_motion": plan.context_motion,
        }  # fmt: skip
        return calibration.like(varied).scheduled(plan, schedule, multistep=bool(chosen.multistep))

    def _moving(self, options: PlanOptions) -> Plan:
        """The plan with the `context_motion` that its options ask for."""
        asked, reason = options.context_motion, self.immovable
        if asked not in (0, 1, WHERE_IT_CAN):
            raise PlanError(f"context_motion must be 0, 1 or {WHERE_IT_CAN} (where the plan can), got {asked}")
        if self.num_context and not self.shows_motion:
            reason = (
                "context_motion needs computed tokens outside the mask: a context_ratio above 0, or a margin and "
                "margin_ratio above 0"
            )
        if asked == 1 and reason is not None:
            raise PlanError(reason)
        # Tokens that only fill M up do not count: plans of one batch would differ by them.
        can = reason is None and self.num_context > 0 and options.computes_context
        return replace(self, context_motion=int(asked == 1 or (asked == WHERE_IT_CAN and can)))

    @classmethod
    def from_token_mask(
        cls,
        active: Any,
        grid: tuple[int, int, int],
        *,
        num_inference_steps: int = 50,
        schedule: Schedule = "balanced",
        extrapolation: int = 0,
        context_extrapolation: int = 0,
        context_motion: int = 0,
    ) -> Plan:
        """A plan in which exactly the tokens `active` (bool `[N]`) are active and all others are context.

        For tests and research. Active tokens count as generative.

        Raises:
            MaskError: another shape or type, or no token is active.
        """
        grid = check_grid(grid)
        array = np.asarray(active.cpu() if hasattr(active, "cpu") else active)
        if array.shape != (prod(grid),) or array.dtype != np.bool_:
            raise MaskError(f"active must be bool [{prod(grid)}], got {array.dtype} {array.shape}")
        if not array.any():
            raise MaskError("the mask is empty: there is nothing to generate")
        kind = np.where(array, TokenKind.GENERATIVE, TokenKind.CONTEXT).astype(np.uint8)
        steps = make_schedule(schedule, num_inference_steps)
        indices = np.flatnonzero(array), np.flatnonzero(~array)
        return cls(
            grid, *indices, kind, steps, schedule=schedule_name(schedule), extrapolation=extrapolation,
            context_extrapolation=context_extrapolation, context_motion=context_motion,
        )  # fmt: skip

    def with_schedule(self, schedule: Schedule) -> Plan:
        """The same partition with other step kinds."""
        steps = make_schedule(schedule, len(self.steps), self.distances if self.distances.size else None)
        return replace(self, steps=steps, schedule=schedule_name(schedule), weights=self.weights[:0])

    def with_steps(self, steps: Sequence[StepKind]) -> Plan:
        """The same partition with other steps, any number of them, of which no times and no weights are known."""
        nothing = np.zeros(0)
        return replace(
            self, steps=tuple(steps), schedule="list", timesteps=nothing, sigmas=nothing, distances=nothing,
            weights=self.weights[:0],
        )  # fmt: skip

    def tokens_of(self, kind: TokenKind) -> NDArray[np.bool_]:
        """Bool `[T', H', W']`: the tokens of one kind."""
        return np.asarray(self.token_kind == kind).reshape(self.grid)

    def describe(self) -> str:
        """The plan in two lines, and one on its cache where that was counted."""
        counts = {kind: int((self.token_kind == kind).sum()) for kind in TokenKind}
        merged = f" in {self.num_merged} centroids ({self.merging})" if self.num_merged < self.num_context else ""
        tokens = ", ".join(f"{count} {kind.name.lower()}" for kind, count in counts.items())
        share = self.num_active / self.num_tokens
        selection = "" if self.selection == "uniform" else f", selection {self.selection}"
        stored = "" if self.cache_dtype == "same" else f" as {self.cache_dtype}"
        stored += ", by attention" if self.form_options.cached_by == "attention" else ""
        if self.cached_counts:
            stored += f", {min(self.cached_counts)} to {max(self.cached_counts)} each"
        stored += " in the host's memory" if self.cache_device == "cpu" else ""
        predicted = ", cached K/V predicted" if self.context_extrapolation else ""
        predicted += ", cached K/V move" if self.context_motion else ""
        predicted += ", shared by the calls of a step" if self.shared_context else ""
        outputs = "fitted weights" if self.weights.size else f"extrapolation {self.extrapolation}"
        size = self.cache_size
        cache = "" if size is None else f"\n{size.describe(hosted=self.cache_device == 'cpu')}"
        return (
            f"{self.num_tokens} tokens on grid {self.grid}: {tokens}; M = {self.num_active} active ({share:.0%}), "
            f"C = {self.num_context} cached{stored}{merged}{predicted}{selection}\n"
            f"{len(self.steps)} steps ({self.schedule}, {outputs}): "
            f"{''.join(kind.letter for kind in self.steps)}{cache}"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as one safetensors file with a JSON header, atomically."""
        FILE.save(path, *self.packed())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan.

        Raises:
            PlanFileError: the file is missing, cut short, no plan, or of another schema version.
        """

        return FILE.load(path, lambda header, arrays: cls.unpacked(arrays, header))

    def packed(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """The plan as arrays and a header, for a file. Anchors are there for those who run its engines in a loop."""
        header: dict[str, Any] = {"grid": list(self.grid), **{name: getattr(self, name) for name in HEADER}}
        if self.cache_size is not None:
            header[COUNTED] = {name: getattr(self.cache_size, name) for name in SIZES}
        steps = np.array([int(step) for step in self.steps], dtype=np.uint8)
        anchors = {"token_anchors": self.token_anchors} if self.context_motion else {}
        return {"steps": steps, **{name: getattr(self, name) for name in ARRAYS}, **anchors}, header

    @classmethod
    def unpacked(cls, arrays: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> Plan:
        """The plan of what `packed` gave."""
        fields: dict[str, Any] = {name: arrays[name] for name in ARRAYS if name in arrays}
        fields |= {name: header[name] for name in HEADER if name in header}
        fields["cached_counts"] = tuple(fields.get("cached_counts", ()))
        fields["token_inputs"] = {name: tuple(where) for name, where in fields.get("token_inputs", {}).items()}
        steps = tuple(StepKind(int(step)) for step in arrays["steps"])
        plan = cls(grid=tuple(header["grid"]), steps=steps, **fields)
        sizes = header.get(COUNTED)
        if sizes is None:
            return plan
        sizes = {"shareable": sizes["keys_and_values"], **sizes}  # what a file from before knows of it
        return replace(plan, counted=CacheSize(plan.form_options, **sizes))
