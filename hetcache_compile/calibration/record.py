"""What caching costs and saves on one model and one machine: error matrices, step costs, and their file.

The error of a cached step is the relative error of the model's output, the velocity of flow matching, on tokens of
one kind. Two facts keep the record small:

* A REUSE step answers with a linear combination of earlier velocities, whatever its order of extrapolation. So the
  inner products of the velocities of all steps (`gram`) give its error exactly, for every pair of steps and any order.
* A PARTIAL step has to be run. It is run for some pairs of steps, and its error is kept as a share of what REUSE
  costs there; that share is smooth, and is interpolated.

What an error of one step does to the result is measured too (`amplification`): early errors on generated tokens grow
as the model goes on from them, while those on known tokens are healed by the control input. And so is what it does to
the next output at once (`sensitivity`), which a step that corrects must know.

`bench.calibrate` measures. `error_model` says what a schedule is expected to leave wrong, and `schedule_search` looks
for the best one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RegularGridInterpolator

from ..errors import CalibrationError, PlanError
from ..files import ArrayFile
from ..plan.partition import TokenKind
from ..plan.plan import Plan

Array = NDArray[np.float64]
FILE = ArrayFile("hetcal", "calibration", 4, "calibrate anew", CalibrationError)
NUM_KINDS = len(TokenKind)
FEW_STEPS = 8
"""So many steps after a FULL one PARTIAL steps are considered, however far that is in time."""
FEWEST_STEPS = 3
"""A calibration has at least so many."""
SLICES = 64
"""R: parts of the inactive tokens of which attention is known, from the most attended on."""
QUARTERS = 4
"""Attentions cache so many parts of C on average, each some whole number of parts: so that few numbers differ, and what
is compiled for blocks of one number is compiled once."""
DEFAULTS = {"margin": 2.0, "context_extrapolation": 0, "context_motion": 0}
"""What a plan has where it says nothing."""


@dataclass(frozen=True, eq=False)
class Costs:
    """Seconds of one model call by step kind.

    Attributes:
        full: of a FULL step.
        reuse: of a REUSE step.
        shares: float64 `[P]`, increasing: the M / N that PARTIAL steps were timed at.
        partial: float64 `[P]`: their seconds.
        inner: the torch.compile backend of the forms.
    """

    full: float
    reuse: float
    shares: Array
    partial: Array
    inner: str = "inductor"

    def partial_at(self, share: float) -> float:
        """Seconds of a PARTIAL step at M / N = `share`: between what was timed, with N / N as a FULL step."""
        return float(np.interp(share, [*self.shares, 1.0], [*self.partial, self.full]))


@dataclass(frozen=True, eq=False)
class Measured:
    """What one clip adds to a calibration, in units of its mean energy per step; see `Record` for the axes.

    Attributes:
        gram: `[3, S, S]`.
        partial: `[V, 3, A, B]`.
        present: bool `[3]`: the kinds of tokens that this clip has.
        partial_correlation: `[V, 3]`; None where it was not measured.
        log_amplification: `[3, P]`; None where it was not measured.
        sensitivity: `[3, P]`; None where it was not measured.
        attentions: module paths of the L attentions.
        attention_mass: `[L, 3]`; None where it was not measured.
        relevance: `[L, R]`; None where it was not measured.
    """

    gram: Array
    partial: Array
    present: NDArray[np.bool_]
    partial_correlation: Array | None = None
    log_amplification: Array | None = None
    sensitivity: Array | None = None
    attentions: tuple[str, ...] = ()
    attention_mass: Array | None = None
    relevance: Array | None = None


@dataclass(frozen=True, eq=False)
class Record:
    """Errors and costs of one model, measured over a few clips.

    Squared errors and inner products are in units of a clip's mean energy per step, then averaged over clips.

    Attributes:
        timesteps: float64 `[S]`, decreasing; proportional to the noise level in flow matching.
        gram: float64 `[3, S, S]` by token kind: inner products of the uncached velocities of two steps.
        sources: int64 `[A]`: steps whose FULL caches PARTIAL steps were run from.
        offsets: int64 `[B]`: how many steps later, but never past the last step.
        variants: V choices of what PARTIAL steps compute and read: options of `plan_for`, such as `margin`.
        partial: float64 `[V, 3, A, B]`: squared distance of the PARTIAL velocity to the uncached one.
        partial_correlation: float64 `[V, 3]`: mean correlation of what two different PARTIAL steps are off by. Their
            context is stale in much the same way, so their errors do not average out.
        probes: int64 `[P]`: steps whose velocity was replaced by that of the step before, to see what becomes of it.
        log_amplification: float64 `[3, P]` by token kind: log of the error of the last latents over that of the latents
            right after the probed step. The error's root mean square over clips counts: those that are most sensitive
            decide what a schedule can leave wrong.
        sensitivity: float64 `[3, P]` by token kind: how much the error of the latents after the probed step puts the
            next output off, as a share of that error, in a step as long as all of the path. Root mean square over
            clips; 0 of solvers whose steps have no length, and `[3, 0]` in files from before it was measured.
        attention_mass: float64 `[L, 3]`: the shares of generative, margin and context tokens in the attention that
            generative tokens give to tokens, mean over clips. L = 0 where it was not measured in every clip.
        relevance: float64 `[L, R]`: the share of their attention that generative tokens give to inactive ones, these
            ordered from the most attended on and cut into R equal parts, mean over clips. L = 0 where it was not
            measured.
        attentions: the module path of each of the L attentions.
        counts: int64 `[3]`: how many clips have tokens of the kind.
        clips: names of the clips measured so far.
        costs: seconds by step kind, or None while they are not measured.
        one_step: whether the solver moves the latents by its step's length times the output, and by nothing else (see
            `output_weights.step_lengths`).
        settings: what was measured: model, machine, options.
    """

    timesteps: Array
    gram: Array
    sources: NDArray[np.int64]
    offsets: NDArray[np.int64]
    partial: Array
    partial_correlation: Array = field(default_factory=lambda: np.zeros((1, NUM_KINDS)))
    probes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    log_amplification: Array = field(default_factory=lambda: np.zeros((NUM_KINDS, 0)))
    sensitivity: Array = field(default_factory=lambda: np.zeros((NUM_KINDS, 0)))
    attention_mass: Array = field(default_factory=lambda: np.zeros((0, NUM_KINDS)))
    relevance: Array = field(default_factory=lambda: np.zeros((0, SLICES)))
    attentions: tuple[str, ...] = ()
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(NUM_KINDS, dtype=np.int64))
    clips: tuple[str, ...] = ()
    costs: Costs | None = None
    one_step: bool = False
    variants: tuple[Mapping[str, Any], ...] = ({},)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps, sources, offsets = self.num_steps, self.sources, self.offsets
        if self.timesteps.ndim != 1 or steps < 2 or not (np.diff(self.timesteps) < 0).all() or self.timesteps[-1] <= 0:
            raise CalibrationError("a calibration needs at least two timesteps, positive and decreasing")
        for name, shape in (
            ("gram", (NUM_KINDS, steps, steps)),
            ("partial", (len(self.variants), NUM_KINDS, sources.size, offsets.size)),
            ("partial_correlation", (len(self.variants), NUM_KINDS)),
            ("log_amplification", (NUM_KINDS, self.probes.size)),
            ("sensitivity", (NUM_KINDS, self.probes.size if self.sensitivity.size else 0)),
            ("attention_mass", (len(self.attentions), NUM_KINDS)),
            ("relevance", (len(self.attentions) if self.relevance.size else 0, SLICES)),
            ("counts", (NUM_KINDS,)),
        ):
            array = getattr(self, name)
            if array.shape != shape or not np.isfinite(array).all():
                raise CalibrationError(f"{name} must hold finite numbers of shape {shape}, got shape {array.shape}")
        for name, index, most in (
            ("sources", sources, steps - 2), ("offsets", offsets, steps - 1), ("probes", self.probes, steps - 2)
        ):  # fmt: skip
            least = 0 if name == "sources" else 1
            if name == "probes" and not index.size:
                continue
            if index.ndim != 1 or not index.size or index.min() < least or index.max() > most:
                raise CalibrationError(f"{name} must name steps between {least} and {most}")
            if (np.diff(index) <= 0).any():
                raise CalibrationError(f"{name} must be increasing")

    @property
    def num_steps(self) -> int:
        """S."""
        return int(self.timesteps.size)

    def target(self, source: int, offset: int) -> int:
        """The step of a measured PARTIAL step."""
        return min(source + offset, self.num_steps - 1)

    def add(self, name: str, clip: Measured) -> Self:
        """With one more clip, of this name. What was not measured of it counts as 0."""
        counts = self.counts + clip.present
        # A running mean over the clips that have the kind.
        share = np.where(clip.present, 1 / np.maximum(counts, 1), 0.0)

        def mean(field_name: str, axis: int, scale: Callable[[Array], Array] = np.asarray) -> Array:
            """On a scale; what it gives is on that scale."""
            before, value = getattr(self, field_name), getattr(clip, field_name)
            weight = share.reshape([-1 if dim == axis else 1 for dim in range(before.ndim)])
            before, value = scale(before), scale(np.zeros(before.shape) if value is None else value)
            return np.asarray((1 - weight) * before + weight * value)

        return replace(
            self,
            gram=mean("gram", 0),
            partial=mean("partial", 1),
            partial_correlation=mean("partial_correlation", 1),
            log_amplification=np.log(mean("log_amplification", 0, lambda logs: np.exp(2 * logs))) / 2,
            sensitivity=np.sqrt(mean("sensitivity", 0, np.square)) if self.sensitivity.size else self.sensitivity,
            **self._with_attention(clip),
            counts=counts,
            clips=(*self.clips, name),
        )

    def _with_attention(self, clip: Measured) -> dict[str, Any]:
        """What is known of attentions with one more clip: nothing as soon as one has others than the first."""
        if clip.attention_mass is None or (self.clips and clip.attentions != self.attentions):
            return {
                "attentions": (), "attention_mass": np.zeros((0, NUM_KINDS)), "relevance": np.zeros((0, SLICES))
            }  # fmt: skip

        def mean(before: Array, value: Array) -> Array:
            return before + (value - before) / (len(self.clips) + 1) if self.clips else value

        known = clip.relevance is not None and (self.relevance.size or not self.clips)
        return {
            "attentions": clip.attentions,
            "attention_mass": mean(self.attention_mass, clip.attention_mass),
            "relevance": mean(self.relevance, np.asarray(clip.relevance)) if known else np.zeros((0, SLICES)),
        }

    def counts_for(self, plan: Plan) -> tuple[int, ...]:
        """How many tokens each attention should cache, in as many bytes as the plan has, to lose the least attention.

        What an attention loses is convex in their number, since the most attended tokens are cached first. So to take
        the next part where it is worth most, again and again, finds the best numbers.

        Raises:
            PlanError: that was not measured, or the plan's attentions do not choose.
        """
        if not self.relevance.size:
            raise PlanError("cached_shares 'measured' needs a calibration that measured attentions: calibrate anew")
        if plan.form_options.cached_by != "attention":
            raise PlanError("cached_shares 'measured' needs cached_by 'attention' and a cached_ratio below 1")
        inactive, part = plan.num_tokens - plan.num_active, max(1, plan.num_context // QUARTERS)
        parts = inactive // part
        ends = np.arange(parts + 1) * (part / inactive * SLICES)
        total = np.concatenate([np.zeros((len(self.relevance), 1)), self.relevance.cumsum(axis=1)], axis=1)
        worth = np.stack([np.diff(np.interp(ends, np.arange(SLICES + 1), row)) for row in total])
        most = len(worth) * (plan.num_context // part - 1)  # each has one part in any case
        best = np.argsort(-worth[:, 1:].ravel(), kind="stable")[:most]
        taken = 1 + np.bincount(best // (parts - 1), minlength=len(worth))
        return tuple((part * taken).tolist())

    def timesteps_for(self, num_steps: int) -> Array:
        """Timesteps `[num_steps]` of the same noise schedule at another number of steps, ends at 0 alike."""
        if num_steps == self.num_steps:
            return self.timesteps
        places = np.arange(num_steps) / num_steps
        known = np.arange(self.num_steps + 1) / self.num_steps
        return np.asarray(np.interp(places, known, [*self.timesteps, 0.0]))

    def positions(self, timesteps: Array) -> Array:
        """Where timesteps `[T]` lie among the calibrated steps: fractional step numbers, 0 to S - 1."""
        return np.asarray(np.interp(-timesteps, -self.timesteps, np.arange(self.num_steps)))

    def gram_at(self, timesteps: Array) -> Array:
        """`[3, T, T]`: inner products of velocities that are interpolated linearly over the timesteps."""
        place = self.positions(timesteps)
        low = np.minimum(place.astype(int), self.num_steps - 2)
        weights = np.zeros((place.size, self.num_steps))
        weights[np.arange(place.size), low] = 1 - (place - low)
        weights[np.arange(place.size), low + 1] = place - low
        products: Array = weights @ self.gram @ weights.T
        return products

    def amplification_at(self, timesteps: Array) -> Array:
        """`[3, T]`: how many times an error of a step's latents is in the last ones; 1 at the last step.

        Interpolated in its logarithm. 1 everywhere if it was not measured.
        """
        places = [*self.probes, self.num_steps - 1]
        logs = [np.interp(self.positions(timesteps), places, [*log, 0.0]) for log in self.log_amplification]
        return np.exp(np.stack(logs)) if self.probes.size else np.ones((NUM_KINDS, timesteps.size))

    def sways_at(self, timesteps: Array) -> Array:
        """`[3, T]`: how much of an error of the latents before a step its output adds to it; 0 if not measured."""
        if not self.sensitivity.size:
            return np.zeros((NUM_KINDS, timesteps.size))
        after = self.probes + 1
        rates = [np.interp(self.positions(timesteps), after, of_kind) for of_kind in self.sensitivity]
        return np.stack(rates) * self.shares_of_path(timesteps)

    def shares_of_path(self, timesteps: Array) -> Array:
        """`[T]`: how much of the calibrated path each step takes, by timesteps."""
        return np.asarray(-np.diff([*timesteps, 0.0]) / self.timesteps[0])

    def reuse_errors(self, timesteps: Array | None = None) -> Array:
        """`[3, T, T]` by (kind, source, target): relative error of repeating a velocity. NaN for absent kinds."""
        gram = self.gram_at(self.timesteps if timesteps is None else timesteps)
        energy = np.diagonal(gram, axis1=1, axis2=2)
        squared = energy[:, :, None] + energy[:, None, :] - 2 * gram
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.sqrt(np.maximum(squared, 0) / energy[:, None, :]))

    def alternatives(self, given: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Options of a plan that this calibration can compare: those of each variant, but for the ones `given`."""
        first = self.variants[0]
        varied = {name for variant in self.variants for name, value in variant.items() if value != first.get(name)}
        names = sorted(varied - set(given))
        found = dict.fromkeys(tuple(variant[name] for name in names) for variant in self.variants)
        return [dict(zip(names, values, strict=True)) for values in found]

    def like(self, options: Mapping[str, Any]) -> Self:
        """Only the variant that is nearest to the options of a plan: near where they are measures, else the same."""

        def distance(variant: Mapping[str, Any]) -> tuple[int, float]:
            pairs = [(value, options.get(name, DEFAULTS.get(name, value))) for name, value in variant.items()]
            whole = sum(mine != asked for mine, asked in pairs if not isinstance(mine, float))
            return whole, sum(abs(mine - asked) for mine, asked in pairs if isinstance(mine, float))

        nearest = min(range(len(self.variants)), key=lambda number: distance(self.variants[number]))
        return replace(
            self,
            variants=(self.variants[nearest],),
            partial=self.partial[[nearest]],
            partial_correlation=self.partial_correlation[[nearest]],
        )

    def partial_errors(self, timesteps: Array | None = None) -> Array:
        """`[3, T, T]` by (kind, source, target): relative error of a PARTIAL step on the FULL cache of the source.

        Of the first variant. Infinite where the target does not come after the source, or later than any measured pair.
        In few steps the next ones are that late: there the share of what REUSE costs goes on as it went at last, up to
        all of it.
        """
        timesteps = self.timesteps if timesteps is None else timesteps
        place = self.positions(timesteps)
        source, target = np.meshgrid(place, place, indexing="ij")
        offset = target - source
        errors = self.reuse_errors(timesteps)
        points = np.stack([source.clip(*self.sources[[0, -1]]), offset.clip(self.offsets[0])], axis=-1)
        later = offset > self.offsets[-1] + 1e-9
        for kind, measured in enumerate(self._share_of_reuse()):
            share = _interpolate(self.sources, self.offsets, measured, points)
            errors[kind] *= np.where(later, share.clip(0, 1), share)
        steps_later = np.arange(len(place)) - np.arange(len(place))[:, None]
        allowed = (steps_later > 0) & (~later | (steps_later <= FEW_STEPS))
        return np.where(allowed, errors, np.inf)

    def correlation_of(self, kind: TokenKind) -> float:
        """How alike the errors of different PARTIAL steps are, 0 to 1. Of the first variant."""
        return float(self.partial_correlation[0, kind].clip(0, 1))

    def _share_of_reuse(self) -> Array:
        """`[3, A, B]`: error of PARTIAL over error of REUSE, where it was measured."""
        targets = np.array([[self.target(s, o) for o in self.offsets] for s in self.sources])
        gram, sources = self.gram, self.sources[:, None]
        reuse = gram[:, sources, sources] + gram[:, targets, targets] - 2 * gram[:, sources, targets]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.sqrt(self.partial[0] / reuse))

    def describe(self) -> str:
        """The calibration in two lines, and one on attention where it was measured."""
        errors = self.reuse_errors()
        one_later = {
            kind.name.lower(): float(np.mean(np.diagonal(errors[kind], offset=1)))
            for kind in TokenKind
            if self.counts[kind]
        }
        repeated = ", ".join(f"{error:.1%} on {name}" for name, error in one_later.items())
        if self.costs is None:
            times = "step times are not measured yet"
        else:
            partial = ", ".join(
                f"{seconds / self.costs.full:.3f} at M/N = {share:g}"
                for share, seconds in zip(self.costs.shares, self.costs.partial, strict=True)
            )
            times = (
                f"a FULL step takes {self.costs.full:.3g} s; of that PARTIAL takes {partial}, "
                f"REUSE {self.costs.reuse / self.costs.full:.3f}"
            )
        return (
            f"{len(self.clips)} clips, {self.num_steps} steps: the velocity of the step before is off by {repeated} "
            f"tokens\n{times}{self._describe_attention()}"
        )

    def _describe_attention(self) -> str:
        """A line on the attention that generative tokens give to the context; empty if it was not measured."""
        if not self.attentions:
            return ""
        context = self.attention_mass[:, TokenKind.CONTEXT]
        least, most = (
            f"in {self.attentions[place] or 'the model'} ({context[place]:.0%})"
            for place in (context.argmin(), context.argmax())
        )
        mean = f"generative tokens look at the context for {context.mean():.0%} of their attention"
        return f"\n{mean}: least {least}, most {most}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as one safetensors file with a JSON header, atomically."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        header: dict[str, Any] = {
            "clips": list(self.clips), "settings": self.settings, "costs": None, "one_step": self.one_step,
            "attentions": list(self.attentions), "variants": list(self.variants),
        }  # fmt: skip
        if self.costs is not None:
            arrays |= {"cost_shares": self.costs.shares, "cost_partial": self.costs.partial}
            header["costs"] = {"full": self.costs.full, "reuse": self.costs.reuse, "inner": self.costs.inner}
        FILE.save(path, arrays, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a calibration.

        Raises:
            CalibrationError: the file is missing, cut short, no calibration, or of another schema version.
        """

        def decode(header: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Record:
            times, costs = header["costs"], None
            if times is not None:
                measured = arrays["cost_shares"], arrays["cost_partial"]
                costs = Costs(float(times["full"]), float(times["reuse"]), *measured, str(times["inner"]))
            recorded = {name: arrays[name] for name in ARRAYS if name not in ADDED or name in arrays}
            return cls(
                **recorded, clips=tuple(header["clips"]), attentions=tuple(header["attentions"]), costs=costs,
                one_step=bool(header["one_step"]), variants=tuple(header["variants"]),
                settings=dict(header["settings"]),
            )  # fmt: skip

        return cast(Self, FILE.load(path, decode))


def _interpolate(sources: NDArray[np.int64], offsets: NDArray[np.int64], values: Array, points: Array) -> Array:
    """Bilinear, beyond the ends too; along an axis with one measured place the value is constant."""
    axes: list[Sequence[float]] = []
    for position, axis in enumerate((sources, offsets)):
        if axis.size == 1:
            values = np.repeat(values, 2, axis=position)
        axes.append([*axis.tolist(), *([axis[0] + 1.0] if axis.size == 1 else [])])
    known = RegularGridInterpolator(tuple(axes), values, bounds_error=False, fill_value=None)
    return np.asarray(known(points), dtype=np.float64)


ARRAYS = (
    "timesteps",
    "gram",
    "sources",
    "offsets",
    "partial",
    "partial_correlation",
    "probes",
    "log_amplification",
    "sensitivity",
    "counts",
    "attention_mass",
    "relevance",
)
ADDED = ("relevance", "sensitivity")
"""Those that older files do not have."""
