"""`hetcache calibrate`, and how the other commands use what it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..calibration.calibration import Calibration
from ..calibration.record import FEW_STEPS, FEWEST_STEPS
from ..console import console, progress_bars
from ..errors import InputFileError
from ..files import check_writable
from ..pipelines.planning import Choice
from ..plan.plan import Plan
from ..plan.schedule import preset_options
from .bench import clip_of_files
from .common import (
    ContextRatio,
    Device,
    GuidanceScale,
    Height,
    Inner,
    Invert,
    Labels,
    Margin,
    NumFrames,
    Seed,
    Steps,
    TextTokens,
    Threshold,
    Width,
    check_size,
    mask_options,
    torch_device,
    torch_dtype,
)

BESIDE_MODEL = "model.hetcal"
"""Where a model's folder holds its calibration."""
LEFT_ALONE = (
    "not searched, but yours to set: context_ratio, selection, merging (docs/plan-options.md says what they bring)"
)
CalibrationFile = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="For optimal schedules: a file of `hetcache calibrate`, or `reference` for the one shipped. "
        "[default: model.hetcal in the folder of --model, if it is there]",
    ),
]


def calibrate(
    model: Annotated[str, typer.Option(help="A local checkpoint, or `reference` for the one shipped.")] = "reference",
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write; a run cut short goes on there.")] = Path(
        BESIDE_MODEL
    ),
    clips: Annotated[int | None, typer.Option(help="How many procedural clips to edit. [default: 6]", min=1)] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="A video to edit, in place of procedural clips. Repeatable.")
    ] = None,
    mask: Annotated[list[Path] | None, typer.Option(help="The mask of each --video.")] = None,
    threshold: Threshold = None,
    invert: Invert = False,
    labels: Labels = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to generate inside each mask, or none.")] = None,
    height: Height = 128,
    width: Width = 128,
    num_frames: NumFrames = 17,
    steps: Steps = 50,
    guidance_scale: GuidanceScale = None,
    max_sequence_length: TextTokens = None,
    seed: Seed = 0,
    margin: Margin = 2.0,
    context_ratio: ContextRatio = 0.05,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16, whose rounding is larger than many of these errors.")
    ] = "float32",
    inner: Inner = "inductor",
    device: Device = "auto",
) -> None:
    """Measure what PARTIAL and REUSE steps cost and save, for `hetcache plan --budget`.

    Times each kind of step on this machine, then runs the uncached model on a few clips. Procedural clips are square,
    of --height.
    """
    from .. import reference
    from ..bench.calibrate import calibrate as measure
    from ..bench.quality import weights_digest
    from ..edit.editing import check_edits_video, load_pipeline
    from ..provenance import processor_name

    check_writable(out)
    videos, masks, prompts = video or [], mask or [], prompt or []
    if len(masks) != len(videos) or len(prompts) not in (0, len(videos)) or (videos and clips is not None):
        raise InputFileError("give each --video a --mask, and all or none a --prompt; or --clips without any of them")
    reading = mask_options(threshold, invert, labels, has_mask=bool(masks))
    edits = [
        clip_of_files(file, of_file, None, text, (num_frames, height, width), reading)
        for file, of_file, text in zip(videos, masks, prompts or [""] * len(videos), strict=True)
    ] or reference.calibration_clips(clips or 6, num_frames, height)
    shipped = model == "reference"
    folder = reference.FOLDER if shipped else Path(model)
    check_edits_video(folder)
    with console.status(f"loading {model}"):
        pipe = load_pipeline(folder, torch_dtype(dtype), torch_device(device))
    check_size(height, width, num_frames, pipe)
    usual_guidance, usual_length = (reference.GUIDANCE_SCALE, reference.MAX_TEXT_LENGTH) if shipped else (5.0, 512)
    settings = {
        "model": model, "weights": weights_digest(pipe), "dtype": dtype,
        "processor": processor_name(torch_device(device)),
    }  # fmt: skip
    with progress_bars() as progress:
        measured = measure(
            pipe, edits, out, progress, num_inference_steps=steps,
            guidance_scale=usual_guidance if guidance_scale is None else guidance_scale,
            max_sequence_length=max_sequence_length or usual_length, seed=seed, inner=inner, settings=settings,
            margin=margin, context_ratio=context_ratio,
        )  # fmt: skip
    print(measured.describe())
    print(f"wrote {out}")


def load_calibration(name: str | None, model: Path | None = None) -> Calibration | None:
    """The calibration of this name, where `reference` is the one that is shipped; else the one in the model's folder.

    None where there is none.
    """
    if name is None:
        beside = model / BESIDE_MODEL if model is not None else None
        return Calibration.load(beside) if beside is not None and beside.exists() else None
    from .. import reference

    return Calibration.load(reference.CALIBRATION if name == "reference" else name)


def not_counted(calibration: Calibration, schedule: str, options: Mapping[str, Any]) -> str:
    """Lines on the options that change what steps cost and miss, and that were not measured; empty if there are none.

    The calibration's PARTIAL steps attend to all context, and compute what is spread evenly over it. Options are those
    of the preset too.
    """
    options = {**preset_options(schedule), **options}
    usual = {"cached_ratio": 1.0, "merged_ratio": 1.0, "margin_ratio": 1.0, "selection": "uniform", "context_motion": 0}
    measured = {**usual, **calibration.like(options).variants[0]}
    changed = [f"{name} {options[name]}" for name, value in measured.items() if options.get(name, value) != value]
    lines = f"not measured, so what is expected leaves it out: {', '.join(changed)}\n" if changed else ""
    if options.get("shared_context"):
        lines += "shared_context: the time is that of two calls a step; what it misses was not measured\n"
    return lines


def calibrated_in_more(calibration: Calibration, plan: Plan) -> str:
    """A line on an edit of few steps that is planned with a calibration of many; empty for others."""
    timesteps = plan.timesteps if plan.timesteps.size else calibration.timesteps_for(len(plan.steps))
    if timesteps.size < 2:
        return ""
    apart = max(1.0, float(np.median(np.diff(calibration.positions(timesteps)))))
    steps = round(calibration.num_steps / apart)  # of the whole path: an edit may begin in the middle
    if apart < 2 or not FEWEST_STEPS <= steps <= FEW_STEPS:
        return ""
    return (
        f"the calibration is of {calibration.num_steps} steps, and this edit's are {apart:.1f} times as far apart: one "
        f"of {steps} steps would know them better (hetcache calibrate --steps {steps})\n"
    )


def measured_elsewhere(calibration: Calibration, pipe: Any, device: str | None = None) -> list[str]:
    """What to warn of: a calibration of another model than this pipeline's, or of another machine than `device`.

    Weights of another type cannot be told from others, and are taken for the same.
    """
    from ..bench.quality import weights_digest
    from ..provenance import processor_name

    there, found = calibration.settings, []
    same_type = there.get("dtype") == str(pipe.transformer.dtype).removeprefix("torch.")
    if same_type and "weights" in there and there["weights"] != weights_digest(pipe):
        found.append("the calibration is of another model or scheduler: run hetcache calibrate on this one")
    if device is not None and there.get("processor", processor_name(device)) != processor_name(device):
        found.append(f"the calibration's times are of {there['processor']}, not of {processor_name(device)}")
    return found


def expectation(calibration: Calibration, plan: Plan) -> str:
    """What the calibration expects of a plan, and of the presets beside it."""
    from ..calibration.best_schedule import expect
    from ..plan.schedule import PRESETS, make_schedule

    timesteps = plan.timesteps if plan.timesteps.size else calibration.timesteps_for(len(plan.steps))
    cycles = [name for name, preset in PRESETS.items() if not preset.options]
    named = {name: make_schedule(name, len(plan.steps)) for name in cycles} | {plan.schedule: plan.steps}
    share = plan.num_active / plan.num_tokens
    width = max(map(len, named))
    shared = bool(plan.shared_context)
    expected = {
        name: expect(calibration, steps, timesteps, share, plan.prediction, shared_context=shared)
        for name, steps in named.items()
    }
    return "\n".join(f"{name:{width}}  {found.describe()}" for name, found in expected.items())


def comparison(considered: Sequence[Choice]) -> str:
    """What an optimal plan was chosen from; empty where there was no choice."""
    if len(considered) < 2:
        return ""
    lines = []
    for choice in considered:
        assert choice.expectation is not None
        options = ", ".join(
            f"{name} {value if isinstance(value, str) else format(value, 'g')}"
            for name, value in choice.options.items()
        )
        lines.append(f"  {options}: {choice.expectation.describe()}")
    return "chosen, the first of:\n" + "\n".join(lines) + f"\n{LEFT_ALONE}\n"
