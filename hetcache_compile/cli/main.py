"""The command line: `hetcache demo | plan | edit | compile | explain | estimate | calibrate | bench`.

Only it prints and exits.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..console import TokenInput, console, progress_bars, token_inputs
from ..errors import HetCacheError, PlanError
from ..files import check_writable
from .bench import bench
from .calibrate import (
    CalibrationFile,
    calibrate,
    comparison,
    expectation,
    load_calibration,
    measured_elsewhere,
    not_counted,
)
from .common import (
    ContextRatio,
    Device,
    Extrapolation,
    Height,
    Inner,
    Invert,
    Labels,
    Margin,
    MaskFile,
    More,
    NumFrames,
    ScheduleName,
    StartFrame,
    Steps,
    Threshold,
    Width,
    check_size,
    mask_options,
    options_of,
    torch_device,
    torch_dtype,
)
from .compile import compile_forms
from .estimate import estimate_command

app = typer.Typer(
    help="Token-partitioned caching for diffusion transformers, as a compiler pass.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")
app.command()(calibrate)
app.command("compile")(compile_forms)
app.command("estimate")(estimate_command)


@app.command()
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/demo"),
    edit: Annotated[str, typer.Option(help="remove: take the object away; replace: put in another.")] = "remove",
    steps: Steps = 50,
    schedule: ScheduleName = None,
    margin: Margin = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    inner: Inner = "inductor",
    device: Device = "auto",
    eager: Annotated[bool, typer.Option(help="Time the uncompiled model too.")] = False,
) -> None:
    """Edit a clip with the reference model that is in the package, uncached and cached, and compare.

    Writes OUT/report.html, report.json, side_by_side.mp4, edit.mp4, plan.png and edit.hetplan.
    """
    from .. import reference
    from ..calibration.calibration import Calibration
    from ..edit.editing import EditRequest
    from ..edit.report import FILES

    check_writable(*(out / name for name in FILES))
    clip = reference.demo_clip(edit)
    with console.status("loading the reference model"):
        pipe = reference.load(torch_dtype(dtype), torch_device(device))
    assert clip.truth is not None
    request = EditRequest(
        video=clip.truth,
        mask=clip.mask,
        prompt=clip.prompt,
        num_inference_steps=steps,
        guidance_scale=reference.GUIDANCE_SCALE,
        max_sequence_length=reference.MAX_TEXT_LENGTH,
    )
    _edit(
        pipe, request, out, schedule, inner,
        baseline=True, eager=eager, calibration=Calibration.load(reference.CALIBRATION),
        **options_of(context, schedule, margin=margin),
    )  # fmt: skip


@app.command()
def edit(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="Local diffusers checkpoint, such as Wan2.1-VACE-1.3B-diffusers.")],
    video: Annotated[Path, typer.Option(help="Video file, or folder of pictures.")],
    mask: MaskFile,
    prompt: Annotated[str, typer.Option(help="What to generate inside the mask.")],
    negative_prompt: Annotated[str, typer.Option(help="What to keep away from.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/edit"),
    height: Height = 480,
    width: Width = 832,
    num_frames: NumFrames = 81,
    start_frame: StartFrame = 0,
    threshold: Threshold = None,
    invert: Invert = False,
    labels: Labels = None,
    steps: Steps = 50,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 turns it off.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    plan: Annotated[Path | None, typer.Option(help="A plan from `hetcache plan`, in place of the options.")] = None,
    schedule: ScheduleName = None,
    calibration: CalibrationFile = None,
    margin: Margin = None,
    context_ratio: ContextRatio = 0.05,
    extrapolation: Extrapolation = None,
    more: More = None,
    keep_masked: Annotated[
        bool, typer.Option(help="Let the model see what the video has inside the mask; else it sees grey there.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    inner: Inner = "inductor",
    device: Device = "auto",
    baseline: Annotated[bool, typer.Option(help="Run the plain compiled model too, and compare.")] = True,
    eager: Annotated[bool, typer.Option(help="Time the uncompiled model too.")] = False,
    engine: Annotated[
        Path | None, typer.Option(help="Run the transformer from this folder of hetcache-export, with its plan.")
    ] = None,
    provider: Annotated[
        str, typer.Option(help="What runs the engine: ort-cpu, ort-cuda, tensorrt or tensorrt-rtx.")
    ] = "ort-cpu",
    compiled: Annotated[
        Path | None, typer.Option(help="A folder of hetcache compile: the forms are not compiled again.")
    ] = None,
) -> None:
    """Edit a video with any local diffusers checkpoint that takes a video and a mask."""
    from ..compilation.artefact import load_compiled
    from ..edit.editing import EditRequest, load_engine_pipeline, load_pipeline
    from ..edit.media import playback_of, read_mask, read_video
    from ..edit.report import FILES
    from ..engine.engine import load
    from ..plan.plan import Plan

    if compiled is not None and engine is not None:
        raise PlanError("--compiled is for the model's own forms: leave --engine or --compiled out")
    check_writable(*(out / name for name in FILES))
    known_plan = Plan.load(plan) if plan else None
    known_calibration = load_calibration(calibration, model)
    frames = read_video(video, num_frames, height, width, start_frame)
    playback = playback_of(video, num_frames, start_frame)
    of_mask = mask_options(threshold, invert, labels)
    pixels = read_mask(mask, num_frames, height, width, start=start_frame, video=video, **of_mask)
    with console.status(f"loading {model}"):
        if engine is not None:
            pipe = load_engine_pipeline(model, load(engine, provider))
            known_plan = known_plan or pipe.transformer.plan
        else:
            pipe = load_pipeline(model, torch_dtype(dtype), torch_device(device))
            warn(measured_elsewhere(known_calibration, pipe, torch_device(device)) if known_calibration else ())
    if compiled is not None:
        load_compiled(compiled, pipe.transformer)
    check_size(height, width, num_frames, pipe)
    request = EditRequest(
        video=frames,
        mask=pixels,
        prompt=prompt,
        negative_prompt=negative_prompt,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        keep_masked=keep_masked,
        playback=playback,
    )
    _edit(
        pipe, request, out, schedule, inner,
        baseline=baseline, eager=eager, plan=known_plan, calibration=known_calibration,
        **options_of(context, schedule, more, margin=margin, context_ratio=context_ratio, extrapolation=extrapolation),
    )  # fmt: skip


@app.command("plan")
def make_plan(
    context: typer.Context,
    mask: MaskFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan file to write.")] = Path("edit.hetplan"),
    preview: Annotated[Path | None, typer.Option(help="Draw the plan into this PNG.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint to read patch size, VAE factors, scheduler and time embedding of."),
    ] = None,
    height: Height = 480,
    width: Width = 832,
    num_frames: NumFrames = 81,
    video: Annotated[
        Path | None, typer.Option(help="What is edited: a mask of its size, of another rate or length fits to it.")
    ] = None,
    start_frame: StartFrame = 0,
    threshold: Threshold = None,
    invert: Invert = False,
    labels: Labels = None,
    steps: Steps = 50,
    reference_images: Annotated[int, typer.Option(help="How many reference images the edit has.", min=0)] = 0,
    schedule: ScheduleName = None,
    budget: Annotated[
        str | None, typer.Option(help="The best schedule under 3x, a time factor, or 2%, an expected error.")
    ] = None,
    calibration: CalibrationFile = None,
    margin: Margin = None,
    context_ratio: ContextRatio = 0.05,
    extrapolation: Extrapolation = None,
    more: More = None,
) -> None:
    """Partition the tokens of an edit and schedule its steps.

    Without --model the layout is Wan's: patches of 1x2x2 latents, 8 pixels and 4 frames to a latent.
    """
    from ..edit.editing import load_pipeline
    from ..edit.media import read_mask
    from ..pipelines.planning import choices, plan_for
    from ..plan.plan import Plan
    from ..plan.preview import save_preview
    from ..plan.schedule import OPTIMAL, default_schedule

    check_writable(out, *([preview] if preview else []))
    if model is None:
        check_size(height, width, num_frames)
    known = load_calibration(calibration, model)
    if budget is not None:
        if schedule is not None:
            raise PlanError(f"--budget {budget} finds a schedule: leave --schedule {schedule} out, or the budget")
        schedule = OPTIMAL + budget
    schedule = default_schedule(known) if schedule is None else schedule
    of_mask = mask_options(threshold, invert, labels)
    pixels = read_mask(mask, num_frames, height, width, start=start_frame, video=video, **of_mask)
    options = options_of(
        context, schedule, more, margin=margin, context_ratio=context_ratio, extrapolation=extrapolation
    )
    pipe = None
    if model is not None:
        with console.status(f"loading {model}"):
            pipe = load_pipeline(model, torch_dtype("float32"), "cpu")
        check_size(height, width, num_frames, pipe)
        make = partial(
            plan_for, pipe, mask=pixels, height=height, width=width, num_frames=num_frames, num_inference_steps=steps,
            num_reference_images=reference_images, schedule=schedule, calibration=known,
        )  # fmt: skip
    else:
        options = {"extrapolation": 1, **options}
        make = partial(
            Plan.from_mask, pixels, (reference_images + (num_frames - 1) // 4 + 1, height // 16, width // 16),
            num_inference_steps=steps, schedule=schedule, reference_frames=reference_images, calibration=known,
        )  # fmt: skip
    with console.status("planning"):
        considered = choices(make, schedule, known, options)
    made = considered[0].plan
    made.save(out)
    if preview is not None:
        save_preview(made, preview)
    print(made.describe())
    if known is not None:
        print(expectation(known.like(options | dict(considered[0].options)), made))
        print(comparison(considered) + not_counted(known, schedule, options), end="")
        warn(measured_elsewhere(known, pipe) if pipe is not None else ())
    print(f"wrote {out}" + (f" and {preview}" if preview else ""))


@app.command()
def explain(
    model: Annotated[
        str,
        typer.Argument(help="Local diffusers checkpoint, or package.module:function returning (model, kwargs, grid)."),
    ],
    height: Height = 480,
    width: Width = 832,
    num_frames: NumFrames = 81,
    active: Annotated[float, typer.Option(help="Share of tokens that are active.", min=0.0, max=1.0)] = 0.25,
    token_input: TokenInput = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it into this .svg or .html file.")] = None,
) -> None:
    """Show what the analysis finds in a model: where tokens are born and die, caches, FLOPs of each form."""
    import numpy as np

    from ..capture.explain import explain as explain_forms
    from ..capture.explain import write_picture
    from ..capture.rewrite import rewrite
    from ..edit.editing import load_pipeline
    from ..edit.first_call import call_of_function, call_of_pipeline
    from ..plan.plan import Plan

    if picture is not None:
        check_writable(picture)
    if ":" in model and not Path(model).exists():
        call = call_of_function(model)
    else:
        with console.status(f"loading {model}"):
            pipe = load_pipeline(Path(model), torch_dtype("float32"), "cpu")
        check_size(height, width, num_frames, pipe)
        call = call_of_pipeline(pipe, height, width, num_frames)
    number = int(np.prod(call.grid))
    plan = Plan.from_token_mask(np.arange(number) < max(1, round(active * number)), call.grid)
    forms = rewrite(call.model, plan, call.args, call.kwargs, token_inputs=token_inputs(token_input))
    explanation = explain_forms(forms)
    print(explanation)
    if picture is not None:
        write_picture(explanation, picture)
        print(f"wrote {picture}")


def _edit(
    pipe: Any, request: Any, out: Path, schedule: str | None, inner: str, *, baseline: bool, eager: bool,
    plan: Any = None, **partition: Any,
) -> None:  # fmt: skip
    """Plan, run each way, compare, write and print."""
    from ..edit import editing
    from ..edit.report import busy_machine_warning, make_report, table_rows, write_report
    from ..engine.engine import Engine

    made = plan or editing.make_plan(pipe, request, schedule, **partition)
    if plan is not None:
        editing.check_plan(plan, pipe, request)
        request = replace(request, num_inference_steps=len(plan.steps))
    console.print(made.describe(), highlight=False)
    with progress_bars() as progress:
        if isinstance(pipe.transformer, Engine):
            cached = editing.run_planned(pipe, request, made, "hetcache", progress)
            uncached = editing.run_pipeline(pipe, request, "uncached", progress) if baseline else None
        else:
            cached = editing.run_hetcache(pipe, request, made, inner, progress)
            uncached = editing.run_compiled(pipe, request, inner, progress) if baseline else None
        uncompiled = editing.run_eager(pipe, request, progress) if eager else None
    report = make_report(request, made, cached, uncached, uncompiled, str(pipe.device))
    write_report(out, report, request, made, cached, uncached)
    table = Table(box=None, show_header=False)
    for row in table_rows(report):
        table.add_row(*row)
    Console().print(table)
    if (warning := busy_machine_warning(report)) is not None:
        warn([warning])
    print(f"wrote {out / 'report.html'}")


def warn(reasons: Sequence[str]) -> None:
    """A line for each."""
    for warning in reasons:
        console.print(f"warning: {warning}", style="yellow")


def main() -> None:
    """Entry point: bad input is one clear line and exit status 2."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(variable, "1")
    try:
        app()
    except HetCacheError as error:
        print(f"hetcache: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("hetcache: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
