"""Measure a calibration: the uncached model on a few clips, PARTIAL steps for some pairs of steps, and step times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ..calibration.calibration import Calibration
from ..calibration.output_weights import step_lengths
from ..calibration.record import DEFAULTS, FEWEST_STEPS, SLICES, Array, Costs, Measured
from ..capture.rewrite import Forms, rewrite, write_forms
from ..edit.editing import EditRequest, Progress, compiled, make_plan, run_pipeline, warm_up
from ..edit.media import Clip
from ..errors import CalibrationError, PlanError
from ..passes.forms.all_rows import KeepAllRows
from ..passes.forms.attention_mass import MeasureMass
from ..passes.ir.pipeline import run_passes
from ..passes.writing.write import WRITERS
from ..plan.partition import TokenKind
from ..plan.plan import Plan
from ..plan.schedule import StepKind
from ..runtime.backend import hetcache_backend
from ..sessions.session import session
from .quality import describe_clip

OFFSETS = (1, 2, 4, 8, 14)
SOURCES = (0.0, 0.04, 0.08, 0.15, 0.28, 0.42, 0.55, 0.69, 0.83, 0.97)
"""Where FULL caches come from, as shares of the steps: close together at the start, where schedules have them."""
FULL_BEFORE = 0.2
"""How far back the FULL step before them is at most, as a share of the steps."""
PROBES = (0.04, 0.16, 0.4, 0.75)
"""Where errors are put in, as shares of the steps: close together where what becomes of them changes most."""
SHARES = (0.0625, 0.25)
VARIANTS: tuple[dict[str, Any], ...] = tuple(
    {**margin, **predicted, **moving}
    for margin in ({}, {"margin": 1.0})
    for moving in ({}, {"context_motion": 1})
    for predicted in ({}, {"context_extrapolation": 1})
)
"""Options of a plan that change what PARTIAL steps are off by, and that a planner may choose."""
DIGESTS = "digests"
"""The setting that tells clips of one name apart."""
TIMED_CYCLE = (StepKind.FULL, StepKind.PARTIAL, StepKind.REUSE, StepKind.PARTIAL, StepKind.REUSE)
CHUNK = 2**16


@dataclass(frozen=True)
class RecordedCall:
    """One call of the model, without its arguments' meaning."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    @property
    def velocity(self) -> torch.Tensor:
        """The tensor in the output."""
        return velocity_of(self.output)


@dataclass
class Recorder:
    """Calls by step, then in the order in which a step makes them: the branches of guidance."""

    steps: list[list[RecordedCall]] = field(default_factory=list)

    def record(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook."""
        self.steps[-1].append(RecordedCall(args, kwargs, output))


def velocity_of(output: Any) -> torch.Tensor:
    """What a transformer predicts, however it returns it."""
    velocity: torch.Tensor = output[0] if isinstance(output, tuple | list) else getattr(output, "sample", output)
    return velocity


@torch.no_grad()
def calibrate(
    pipe: Any,
    clips: Sequence[Clip],
    out: Path,
    progress: Progress,
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    max_sequence_length: int = 512,
    seed: int = 0,
    inner: str = "inductor",
    costs: Costs | None = None,
    shares: Sequence[float] = SHARES,
    variants: Sequence[Mapping[str, Any]] = VARIANTS,
    settings: Mapping[str, Any] | None = None,
    **partition: Any,
) -> Calibration:
    """Measure, and write `out` after the step times and after each clip: a run that is cut short goes on where it was.

    Args:
        pipe: a pipeline that edits masked video with one transformer; it is left as it was.
        clips: to edit; the calibration is the mean over them.
        out: the calibration file.
        progress: called as `progress(stage, step, steps)`.
        num_inference_steps: S. Other numbers of steps are interpolated.
        guidance_scale: classifier-free guidance. Both branches count.
        max_sequence_length: text tokens.
        seed: of the noise.
        inner: the torch.compile backend of the timed forms. Errors are measured on forms that run eagerly.
        costs: what steps take, if that is known; nothing is timed then.
        shares: M / N of the PARTIAL steps that are timed.
        variants: options of `plan_for` that PARTIAL steps are run with, in turn, in place of those of `partition`;
            those that `partition` leaves no plan for the first clip are left out.
        settings: what else belongs to this calibration, such as the model's name; as JSON knows it.
        partition: of `plan_for`.

    Raises:
        CalibrationError: the file there belongs to other settings, the pipeline has two transformers, or two clips
            have one name.
        PlanError: a clip has no plan.
    """
    if getattr(pipe, "transformer_2", None) is not None:
        raise CalibrationError("pipelines with two transformers cannot be calibrated yet")
    if num_inference_steps < FEWEST_STEPS:
        raise CalibrationError(f"a calibration needs at least {FEWEST_STEPS} steps, got {num_inference_steps}")
    known = {
        **(settings or {}),
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "max_sequence_length": max_sequence_length,
        "seed": seed,
        "size": list(clips[0].video.shape[:3]) if clips else None,
        **partition,
    }
    requests = {
        clip.name: EditRequest(
            video=clip.video, mask=clip.mask, prompt=clip.prompt, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, max_sequence_length=max_sequence_length, seed=seed,
        )
        for clip in clips
    }  # fmt: skip
    plans = plans_of(pipe, requests, variants, partition)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(num_inference_steps)
    one_step = step_lengths(pipe.scheduler, num_inference_steps) is not None
    empty = _empty(
        scheduler.timesteps.double().cpu().numpy(),
        one_step=one_step,
        variants=tuple({**DEFAULTS, **partition, **chosen} for chosen, _ in plans),
        settings=known,
    )
    digests = {clip.name: str(describe_clip(clip)["digest"]) for clip in clips}
    if len(digests) < len(clips):
        raise CalibrationError(f"clips need names of their own, got {', '.join(clip.name for clip in clips)}")
    calibration = _open(out, empty, digests)
    # Times first: a calibration that is cut short after its first clip can be used as it is.
    if costs is None and requests and (calibration.costs is None or calibration.costs.inner != inner):
        request = next(iter(requests.values()))
        costs = measure_costs(pipe, request, make_plan(pipe, request, "full", **partition), shares, inner, progress)
    if costs is not None:
        calibration = replace(calibration, costs=costs)
        calibration.save(out)
    for number, (name, request) in enumerate(requests.items()):
        progress("clips", number, len(requests))
        if name not in calibration.clips:
            of_clip = [of_clips[name] for _, of_clips in plans]
            calibration = calibration.add(name, measure_clip(pipe, request, of_clip, calibration, progress))
            measured = {**calibration.settings.get(DIGESTS, {}), name: digests[name]}
            calibration = replace(calibration, settings={**calibration.settings, DIGESTS: measured})
            calibration.save(out)
    progress("clips", len(requests), len(requests))
    return calibration


def plans_of(
    pipe: Any,
    requests: Mapping[str, EditRequest],
    variants: Sequence[Mapping[str, Any]],
    partition: Mapping[str, Any],
) -> list[tuple[Mapping[str, Any], dict[str, Plan]]]:
    """The variants that the partition leaves a plan, each with the plans of all clips by name.

    Raises:
        PlanError: there is none, or another clip has none.
    """
    found: list[tuple[Mapping[str, Any], dict[str, Plan]]] = []
    refused: PlanError | None = None
    for chosen in variants:
        options = {"extrapolation": 0, "context_motion": 0, **partition, **chosen}
        of_clips: dict[str, Plan] = {}
        for name, request in requests.items():
            try:
                of_clips[name] = make_plan(pipe, request, "full", **options)
            except PlanError as error:
                if of_clips:
                    raise PlanError(f"the clip {name}: {error}") from error
                refused = error
                break
        else:
            found.append((chosen, of_clips))
    if refused is not None and not found:
        raise refused
    return found


def _open(out: Path, empty: Calibration, digests: Mapping[str, str]) -> Calibration:
    """What `out` holds already, or an empty calibration.

    Raises:
        CalibrationError: it holds one that was made otherwise, or with other clips of these names.
    """
    if not out.exists():
        return empty
    found = Calibration.load(out)
    there = dict(found.settings)
    measured = there.pop(DIGESTS, {})
    changed = sorted(name for name in {*empty.settings, *there} if empty.settings.get(name) != there.get(name))
    changed += ["variants"] if found.variants != empty.variants else []
    changed += ["version: what an error becomes was averaged otherwise"] if not found.sensitivity.size else []
    layout = ("timesteps", "sources", "offsets", "probes")
    changed += [name for name in layout if not np.array_equal(getattr(found, name), getattr(empty, name))]
    changed += [f"clip {name}" for name, digest in digests.items() if measured.get(name, digest) != digest]
    if changed:
        raise CalibrationError(
            f"{out} was calibrated otherwise (other {', '.join(changed)}): give another --out, or remove it"
        )
    return found


def _empty(timesteps: Array, **known: Any) -> Calibration:
    """What is to be measured, for so many steps."""
    steps = timesteps.size
    sources = np.unique([min(round(share * steps), steps - 2) for share in SOURCES])
    offsets = np.array([offset for offset in OFFSETS if offset < steps], dtype=np.int64)
    probes = np.unique([min(max(round(share * steps), 1), steps - 2) for share in PROBES])
    kinds = len(TokenKind)
    return Calibration(
        timesteps=timesteps,
        gram=np.zeros((kinds, steps, steps)),
        sources=sources,
        offsets=offsets,
        partial=np.zeros((len(known["variants"]), kinds, sources.size, offsets.size)),
        partial_correlation=np.zeros((len(known["variants"]), kinds)),
        probes=probes,
        log_amplification=np.zeros((kinds, probes.size)),
        sensitivity=np.zeros((kinds, probes.size)),
        **known,
    )


@torch.no_grad()
def measure_clip(
    pipe: Any, request: EditRequest, plans: Sequence[Plan], layout: Calibration, progress: Progress
) -> Measured:
    """What one clip shows. There is a plan for each variant; the first says of which kind a token is."""
    latents: list[torch.Tensor] = []
    with recorded(pipe, progress) as (recorder, observe):
        run_pipeline(pipe, request, "uncached", observe, decode=False, latents=latents)
    steps = recorder.steps
    if len({len(calls) for calls in steps}) != 1 or not steps[0]:
        raise CalibrationError("the pipeline does not call its transformer equally often in every step")
    masks = kind_masks(plans[0], steps[0][0].velocity)
    branches = range(len(steps[0]))
    gram = sum(inner_products([calls[branch].velocity for calls in steps], masks) for branch in branches)
    energy = np.asarray(np.trace(gram, axis1=1, axis2=2) / len(steps))
    present = energy > 0
    unit = np.where(present, energy, 1.0)[:, None, None]
    forms = rewrite(pipe.transformer, plans[0], steps[0][0].args, steps[0][0].kwargs)
    partial, correlation = np.zeros(layout.partial.shape), np.zeros(layout.partial_correlation.shape)
    variants = [write_forms(forms.program, forms.analysis, plan) for plan in plans]
    pairs = [(source, layout.target(source, offset)) for source in layout.sources for offset in layout.offsets]
    _, different = np.unique(pairs, axis=0, return_index=True)
    for variant, these in enumerate(variants):
        products = np.zeros((len(masks), layout.partial[0, 0].size, layout.partial[0, 0].size))
        for branch in branches:
            progress("partial steps", variant * len(branches) + branch, len(variants) * len(branches))
            calls = [step[branch] for step in steps]
            off = [
                difference
                for source in layout.sources.tolist()
                for difference in partial_differences(
                    these, calls, source, [layout.target(source, offset) for offset in layout.offsets.tolist()]
                )
            ]
            products += inner_products(off, masks)
        partial[variant] = np.diagonal(products, axis1=1, axis2=2).reshape(partial[variant].shape)
        correlation[variant] = [mean_correlation(of_kind[np.ix_(different, different)]) for of_kind in products]
    progress("partial steps", len(variants) * len(branches), len(variants) * len(branches))
    logs, sensitivity = np.zeros(layout.log_amplification.shape), np.zeros(layout.log_amplification.shape)
    for number, probe in enumerate(layout.probes):
        logs[:, number], swayed = put_error_in(pipe, request, int(probe), recorder, latents, masks, progress)
        sensitivity[:, number] = swayed * path_per_output(pipe.scheduler, layout, int(probe) + 1)
    attentions, mass, relevance = attention_mass(
        forms, [steps[at][branch] for at in layout.sources for branch in branches]
    )
    return Measured(
        np.asarray(gram) / unit, partial / unit, present, correlation, logs, sensitivity, attentions, mass, relevance
    )  # fmt: skip


def path_per_output(scheduler: Any, layout: Calibration, step: int) -> float:
    """How far a step as long as all of the path moves the latents for an output of 1; 0 for solvers without lengths."""
    lengths = step_lengths(scheduler, layout.num_steps)
    return 0.0 if lengths is None else float(lengths[step] / layout.shares_of_path(layout.timesteps)[step])


def put_error_in(
    pipe: Any,
    request: EditRequest,
    probe: int,
    recorder: Recorder,
    latents: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    progress: Progress,
) -> tuple[Array, Array]:
    """An edit whose step `probe` repeats the velocities before it.

    Returns:
        `[3]` the log of its error at the end over that at once, and `[3]` the error of the next velocity over that.
    """
    branches = len(recorder.steps[0])
    calls = iter(range(branches * len(recorder.steps)))
    compute = pipe.transformer.forward

    def replay(*args: Any, **kwargs: Any) -> Any:
        """Nothing is computed up to the probe: these steps are those of the uncached run."""
        step, branch = divmod(next(calls), branches)
        if step <= probe:
            return recorder.steps[min(step, probe - 1)][branch].output
        output = compute(*args, **kwargs)
        if step == probe + 1:
            off.append(velocity_of(output) - recorder.steps[step][branch].velocity)
        return output

    changed: list[torch.Tensor] = []
    off: list[torch.Tensor] = []
    with computed_by(pipe.transformer, replay):
        run_pipeline(pipe, request, f"an error at step {probe}", progress, decode=False, latents=changed)
    wrong = [[changed[probe] - latents[probe]], [changed[-1] - latents[-1]], off]
    before, after, next_output = (
        np.array([sum(float(one[..., mask].double().square().sum()) for one in many) / len(many) for mask in masks])
        for many in wrong
    )
    wrong_at_once, known = before > 0, (before > 0) & (after > 0)
    sensitivity = np.where(wrong_at_once, np.sqrt(next_output / np.where(wrong_at_once, before, 1)), 0)
    return np.asarray(0.5 * np.log(np.where(known, after, 1) / np.where(known, before, 1))), sensitivity


@contextmanager
def computed_by(model: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a model compute otherwise for a while; also right where another library has put its own `forward` there."""
    before = {name: value for name, value in vars(model).items() if name == "forward"}
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        vars(model).update(before)


@contextmanager
def recorded(pipe: Any, progress: Progress) -> Iterator[tuple[Recorder, Progress]]:
    """Record the calls of the transformer. The run has to report its steps to the `Progress` given here."""
    recorder = Recorder()

    def observe(stage: str, step: int, steps: int) -> None:
        progress(stage, step, steps)
        if step < steps:
            recorder.steps.append([])

    handle = pipe.transformer.register_forward_hook(recorder.record, with_kwargs=True)
    try:
        yield recorder, observe
    finally:
        handle.remove()


def partial_differences(
    forms: Forms, calls: Sequence[RecordedCall], source: int, targets: Sequence[int]
) -> Iterator[torch.Tensor]:
    """By how much PARTIAL steps on the FULL cache of `source` miss the uncached velocities of `targets`.

    Where cached keys and values are predicted, the FULL step before is half as many steps from the first, as in
    schedules, whose FULL steps lie closer together at the start; but never further back than `FULL_BEFORE`.
    """
    before = max(source // 2, source - round(FULL_BEFORE * len(calls)))
    first = before if forms.plan.context_extrapolation else source
    _, cache = forms.full(*calls[first].args, **calls[first].kwargs)
    if first < source:
        _, cache = forms.run("full", cache, calls[source].args, calls[source].kwargs)
    missed: dict[int, torch.Tensor] = {}  # near the end, offsets share their last step
    for target in targets:
        if target not in missed:
            output, _ = forms.partial(cache, *calls[target].args, **calls[target].kwargs)
            missed[target] = velocity_of(output) - calls[target].velocity
        yield missed[target]


def mean_correlation(products: Array) -> float:
    """Of vectors with these inner products `[n, n]`, two different ones at a time, weighted by their lengths."""
    norms = np.sqrt(np.diagonal(products))
    weights = np.outer(norms, norms)
    apart = ~np.eye(len(norms), dtype=bool)
    total = float(weights[apart].sum())
    return float(products[apart].sum()) / total if total > 0 else 0.0


def attention_mass(forms: Forms, calls: Iterable[RecordedCall]) -> tuple[tuple[str, ...], Array, Array]:
    """Where generative tokens look: the module paths of L attentions, `[L, 3]`, whose rows sum to 1, and `[L, R]`.

    The share of each kind of tokens in the attention that generative tokens give to tokens (in FULL steps, text left
    out), mean over the calls; and what inactive tokens get, in parts (see `Record.relevance`). L = 0 where no attention
    can be read (see `passes.forms.attention_mass`).
    """
    plan = forms.plan
    full = WRITERS["full"](forms.program.module, forms.analysis, plan.budgets)
    passes = [KeepAllRows(plan.num_tokens), MeasureMass(plan.num_tokens)]
    measured = run_passes("attention mass", passes, full, lambda form: form.module)
    mean, relevance = np.zeros((len(measured.writes), len(TokenKind))), np.zeros((len(measured.writes), SLICES))
    if not measured.writes:
        return (), mean, relevance
    measuring = replace(forms, by_kind={"full": measured})
    for number, call in enumerate(calls, start=1):
        _, found = measuring.full(*call.args, **call.kwargs)
        masses = [found[entry.input_name].double().cpu().numpy() for entry in measured.writes]
        by_kind = np.stack([np.bincount(plan.token_kind, mass, len(TokenKind)) for mass in masses])
        mean += (by_kind / by_kind.sum(axis=1, keepdims=True) - mean) / number
        relevance += (np.stack([in_slices(mass[~plan.active_mask]) for mass in masses]) - relevance) / number
    return tuple(entry.module for entry in measured.writes), mean, relevance


def in_slices(mass: Array) -> Array:
    """`[SLICES]`: the sums of equal parts of masses, from the largest on."""
    total = np.concatenate([[0.0], -np.sort(-mass)]).cumsum()
    return np.diff(np.interp(np.linspace(0, mass.size, SLICES + 1), np.arange(mass.size + 1), total))


def kind_masks(plan: Plan, velocity: torch.Tensor) -> list[torch.Tensor]:
    """Bool `[T, H, W]` over the latents, by token kind.

    Raises:
        CalibrationError: the output is no video of latents on the plan's grid.
    """
    sizes = velocity.shape[-3:]
    if velocity.ndim < 4 or any(size % tokens for size, tokens in zip(sizes, plan.grid, strict=True)):
        raise CalibrationError(f"an output of shape {tuple(velocity.shape)} is no video on token grid {plan.grid}")
    masks = []
    for kind in TokenKind:
        mask = torch.from_numpy(plan.tokens_of(kind))
        for dim, (size, tokens) in enumerate(zip(sizes, plan.grid, strict=True)):
            mask = mask.repeat_interleave(size // tokens, dim=dim)
        masks.append(mask.to(velocity.device))
    return masks


def inner_products(velocities: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]) -> Array:
    """`[3, S, S]` in float64: differences of near velocities are small against them."""
    products = []
    for mask in masks:
        rows = torch.stack([velocity[..., mask].flatten() for velocity in velocities])
        parts = (rows[:, start : start + CHUNK].double() for start in range(0, max(rows.shape[1], 1), CHUNK))
        products.append(torch.stack([part @ part.T for part in parts]).sum(dim=0).cpu().numpy())
    return np.stack(products)


def measure_costs(
    pipe: Any, request: EditRequest, plan: Plan, shares: Sequence[float], inner: str, progress: Progress
) -> Costs:
    """Median seconds of a call by step kind, compiled by `inner`, at several M / N."""
    steps = TIMED_CYCLE * 3
    short = replace(request, num_inference_steps=len(steps))
    found: list[dict[str, float]] = []
    with compiled(pipe, backend=hetcache_backend, options={"inner": inner}):
        for share in sorted(shares):
            active = np.arange(plan.num_tokens) < max(1, round(share * plan.num_tokens))
            timed = Plan.from_token_mask(active, plan.grid, num_inference_steps=len(steps), schedule=steps)
            warm_up(pipe, short, timed, progress)
            with session(timed) as opened:
                run = run_pipeline(pipe, short, f"timing M/N = {share:g}", progress, decode=False)
            found.append(replace(run, stats=opened.stats).median_seconds)
    full = median(seconds["FULL"] for seconds in found)
    # Against the FULL steps beside them: machines do not stay as fast as they were.
    partial = np.array([full * seconds["PARTIAL"] / seconds["FULL"] for seconds in found])
    reuse = full * median(seconds["REUSE"] / seconds["FULL"] for seconds in found)
    return Costs(full, reuse, np.array(sorted(shares), dtype=np.float64), partial, inner)
