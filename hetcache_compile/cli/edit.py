"""`hetcache edit`: one edit of a video or a picture, uncached and cached."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..console import console, progress_bars, warn
from ..errors import PlanError
from ..files import check_writable
from .calibrate import CalibrationFile, load_calibration, measured_elsewhere
from .call import (
    CallArguments,
    ImageFile,
    OwnFrames,
    OwnHeight,
    OwnSteps,
    OwnWidth,
    Prompt,
    call_arguments,
    check_call,
    check_prompt,
    check_source,
    inputs_of,
    size_of,
    steps_of,
)
from .common import (
    ContextRatio,
    Device,
    Dtype,
    Extrapolation,
    Inner,
    Invert,
    Labels,
    Margin,
    MaskFile,
    Memory,
    More,
    ScheduleName,
    StartFrame,
    Threshold,
    check_size,
    mask_options,
    options_of,
    torch_device,
    torch_dtype,
)


def edit(
    context: typer.Context,
    model: Annotated[
        Path, typer.Option(help="Local diffusers checkpoint, such as Wan2.1-VACE-1.3B-diffusers or FLUX.1-Fill-dev.")
    ],
    mask: MaskFile,
    video: Annotated[Path | None, typer.Option(help="The video to edit: a file, or a folder of pictures.")] = None,
    image: ImageFile = None,
    prompt: Prompt = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep away from.")] = None,
    call: CallArguments = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/edit"),
    height: OwnHeight = None,
    width: OwnWidth = None,
    num_frames: OwnFrames = None,
    start_frame: StartFrame = 0,
    threshold: Threshold = None,
    invert: Invert = False,
    labels: Labels = None,
    steps: OwnSteps = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="As the pipeline takes it; Wan: 1 turns guidance off. [default: its own]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    plan: Annotated[Path | None, typer.Option(help="A plan from `hetcache plan`, in place of the options.")] = None,
    schedule: ScheduleName = None,
    calibration: CalibrationFile = None,
    margin: Margin = None,
    context_ratio: ContextRatio = 0.05,
    extrapolation: Extrapolation = None,
    more: More = None,
    memory: Memory = None,
    keep_masked: Annotated[
        bool,
        typer.Option(help="Let WanVACE see what the video has inside the mask; else it sees grey there, and inpaints."),
    ] = False,
    dtype: Dtype = "bfloat16",
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
    """Edit a video or a picture with any local diffusers checkpoint that takes one, with its mask or without.

    Where the pipeline takes no mask, only the plan has it: white is computed in every step that computes.
    """
    from ..compilation.artefact import load_compiled
    from ..edit.editing import EditRequest, load_engine_pipeline, load_pipeline
    from ..edit.media import playback_of, read_mask, read_source
    from ..edit.report import FILES
    from ..engine.engine import load
    from ..plan.plan import Plan

    if memory is not None and (plan is not None or engine is not None):
        raise PlanError("--memory chooses a plan: leave out --plan and --engine, or --memory")
    if compiled is not None and engine is not None:
        raise PlanError("--compiled is for the model's own forms: leave --engine or --compiled out")
    check_writable(*(out / name for name in FILES))
    known_plan = Plan.load(plan) if plan else None
    known_calibration = load_calibration(calibration, model)
    given = call_arguments(call or ())
    inputs = inputs_of(model, video, image)
    check_source(inputs, video, image)
    check_prompt(inputs, prompt, given)
    check_call(inputs, given, prompt=prompt, negative_prompt=negative_prompt, guidance_scale=guidance_scale)
    size = size_of(inputs, num_frames, height, width, image)
    source = video or image
    assert source is not None
    frames = read_source(source, *size, start_frame)
    playback = playback_of(source, size[0], start_frame)
    pixels = read_mask(mask, *size, start=start_frame, video=source, **mask_options(threshold, invert, labels))
    with console.status(f"loading {model}"):
        if engine is not None:
            pipe = load_engine_pipeline(model, load(engine, provider))
            known_plan = known_plan or pipe.transformer.plan
        else:
            pipe = load_pipeline(model, torch_dtype(dtype), torch_device(device))
            warn(measured_elsewhere(known_calibration, pipe, torch_device(device)) if known_calibration else ())
    if compiled is not None:
        load_compiled(compiled, pipe.transformer)
    if inputs.makes_video:
        check_size(*size[1:], size[0], pipe)
    request = EditRequest(
        video=frames,
        mask=pixels,
        prompt=prompt or "",
        negative_prompt=negative_prompt,
        num_inference_steps=len(known_plan.steps) if known_plan and steps is None else steps_of(inputs, steps),
        guidance_scale=inputs.default("guidance_scale") if guidance_scale is None else guidance_scale,
        seed=seed,
        still=image is not None,
        keep_masked=keep_masked,
        playback=playback,
        call=given,
    )
    run_edit(
        pipe, request, out, schedule, inner,
        baseline=baseline, eager=eager, plan=known_plan, calibration=known_calibration, memory=memory,
        **options_of(context, schedule, more, margin=margin, context_ratio=context_ratio, extrapolation=extrapolation),
    )  # fmt: skip


def run_edit(
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
    console.print(made.describe(), highlight=False)
    with progress_bars() as progress:
        if isinstance(pipe.transformer, Engine):
            cached = editing.run_planned(pipe, request, made, "hetcache", progress)
            uncached = editing.run_pipeline(pipe, request, "uncached", progress) if baseline else None
        else:
            cached = editing.run_hetcache(pipe, request, made, inner, progress)
            uncached = editing.run_compiled(pipe, request, inner, progress) if baseline else None
        uncompiled = editing.run_eager(pipe, request, progress) if eager else None
    assert cached.frames is not None
    request = request.like(cached.frames)
    report = make_report(request, made, cached, uncached, uncompiled, str(pipe.device))
    write_report(out, report, request, made, cached, uncached)
    table = Table(box=None, show_header=False)
    for row in table_rows(report):
        table.add_row(*row)
    Console().print(table)
    if (warning := busy_machine_warning(report)) is not None:
        warn([warning])
    print(f"wrote {out / 'report.html'}")
