"""The command line: `hetcache demo | plan | edit | bench`. Only this module prints and exits."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .errors import HetCacheError, InputFileError, PlanError

app = typer.Typer(
    help="Token-partitioned caching for diffusion transformers, as a compiler pass.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench = typer.Typer(help="Measure on this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")
console = Console(stderr=True)

Schedule = Annotated[
    str,
    typer.Option(
        help="full, quality, balanced, fast, teacache:THRESHOLD, optimal:BUDGET (with --calibration), "
        "or a cycle of F, P and R such as FRRP."
    ),
]
CalibrationFile = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="For optimal schedules: a file of `hetcache calibrate`, or `reference` for the one shipped.",
    ),
]
Margin = Annotated[float, typer.Option(help="Reach of the margin around the mask, in tokens.")]
ContextRatio = Annotated[
    float, typer.Option(help="Share of context tokens that PARTIAL steps compute.", min=0.0, max=1.0)
]
Steps = Annotated[int, typer.Option(help="Denoising steps.", min=1)]
Frames = Annotated[int, typer.Option(help="Frames to edit: one more than a multiple of 4.", min=1)]
Height = Annotated[int, typer.Option(help="Height in pixels.", min=1)]
Width = Annotated[int, typer.Option(help="Width in pixels.", min=1)]
Inner = Annotated[str, typer.Option(help="The torch.compile backend that compiles each form.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/demo"),
    steps: Steps = 20,
    num_frames: Frames = 33,
    size: Annotated[int, typer.Option(help="Height and width in pixels.", min=16)] = 256,
    schedule: Schedule = "balanced",
    margin: Margin = 1.0,
    inner: Inner = "inductor",
    device: Device = "auto",
    eager: Annotated[bool, typer.Option(help="Time the uncompiled model too.")] = True,
) -> None:
    """Edit a real clip with a small WanVACE made on the spot, uncached and cached, and compare.

    The weights are random: the pictures mean nothing, the times do. Writes OUT/report.html, report.json,
    side_by_side.mp4, edit.mp4, plan.png, edit.hetplan, and the checkpoint in OUT/model.
    """
    from .demo import PROMPT, START, demo_clip, moving_mask, save_random_checkpoint
    from .editing import EditRequest, load_pipeline
    from .media import read_video

    with console.status("making a small WanVACE checkpoint"):
        _check_size(size, size, num_frames)
        video = read_video(demo_clip(), num_frames, size, size, START)
        save_random_checkpoint(out / "model")
        pipe = load_pipeline(out / "model", _dtype("float32"), _device(device))
    request = EditRequest(
        video=video,
        mask=moving_mask(num_frames, size, size),
        prompt=PROMPT,
        num_inference_steps=steps,
        max_sequence_length=64,
    )
    _edit(pipe, request, out, schedule, inner, baseline=True, eager=eager, margin=margin)


@app.command()
def edit(
    model: Annotated[Path, typer.Option(help="Local diffusers checkpoint, such as Wan2.1-VACE-1.3B-diffusers.")],
    video: Annotated[Path, typer.Option(help="Video file, or folder of pictures.")],
    mask: Annotated[Path, typer.Option(help="White where to generate: video, folder, picture or .npy.")],
    prompt: Annotated[str, typer.Option(help="What to generate inside the mask.")],
    negative_prompt: Annotated[str, typer.Option(help="What to keep away from.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/edit"),
    height: Height = 480,
    width: Width = 832,
    num_frames: Frames = 81,
    start_frame: Annotated[int, typer.Option(help="First frame of the video to edit.", min=0)] = 0,
    steps: Steps = 50,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 turns it off.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    plan: Annotated[Path | None, typer.Option(help="A plan from `hetcache plan`, in place of the options.")] = None,
    schedule: Schedule = "balanced",
    calibration: CalibrationFile = None,
    margin: Margin = 2.0,
    context_ratio: ContextRatio = 0.05,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    inner: Inner = "inductor",
    device: Device = "auto",
    baseline: Annotated[bool, typer.Option(help="Run the plain compiled model too, and compare.")] = True,
    eager: Annotated[bool, typer.Option(help="Time the uncompiled model too.")] = False,
) -> None:
    """Edit a video with any local diffusers checkpoint that takes a video and a mask."""
    from .editing import EditRequest, load_pipeline
    from .media import read_mask, read_video
    from .plan import Plan

    _check_size(height, width, num_frames)
    known_plan = Plan.load(plan) if plan else None
    known_calibration = _load_calibration(calibration)
    frames = read_video(video, num_frames, height, width, start_frame)
    pixels = read_mask(mask, num_frames, height, width)
    with console.status(f"loading {model}"):
        pipe = load_pipeline(model, _dtype(dtype), _device(device))
    request = EditRequest(
        video=frames,
        mask=pixels,
        prompt=prompt,
        negative_prompt=negative_prompt,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
    )
    _edit(
        pipe, request, out, schedule, inner,
        baseline=baseline, eager=eager, plan=known_plan, calibration=known_calibration, margin=margin,
        context_ratio=context_ratio,
    )  # fmt: skip


@app.command("plan")
def make_plan(
    mask: Annotated[Path, typer.Option(help="White where to generate: video, folder, picture or .npy.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan file to write.")] = Path("edit.hetplan"),
    preview: Annotated[Path | None, typer.Option(help="Draw the plan into this PNG.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint to read patch size, VAE factors, scheduler and time embedding of."),
    ] = None,
    height: Height = 480,
    width: Width = 832,
    num_frames: Frames = 81,
    steps: Steps = 50,
    reference_images: Annotated[int, typer.Option(help="How many reference images the edit has.", min=0)] = 0,
    schedule: Schedule = "balanced",
    budget: Annotated[
        str | None, typer.Option(help="The best schedule under 3x, a time factor, or 2%, an error bound.")
    ] = None,
    calibration: CalibrationFile = None,
    margin: Margin = 2.0,
    context_ratio: ContextRatio = 0.05,
) -> None:
    """Partition the tokens of an edit and schedule its steps.

    Without --model the layout is Wan's: patches of 1x2x2 latents, 8 pixels and 4 frames to a latent.
    """
    from .editing import load_pipeline
    from .media import read_mask
    from .plan import Plan, plan_for
    from .preview import save_preview

    _check_size(height, width, num_frames)
    if budget is not None:
        schedule = f"optimal:{budget}"
    known = _load_calibration(calibration)
    pixels = read_mask(mask, num_frames, height, width)
    partition: dict[str, Any] = {"margin": margin, "context_ratio": context_ratio, "calibration": known}
    if model is not None:
        with console.status(f"loading {model}"):
            pipe = load_pipeline(model, _dtype("float32"), "cpu")
        made = plan_for(
            pipe, mask=pixels, height=height, width=width, num_frames=num_frames, num_inference_steps=steps,
            num_reference_images=reference_images, schedule=schedule, **partition,
        )  # fmt: skip
    else:
        made = Plan.from_mask(
            pixels, (reference_images + (num_frames - 1) // 4 + 1, height // 16, width // 16),
            num_inference_steps=steps, schedule=schedule, reference_frames=reference_images, **partition,
        )  # fmt: skip
    made.save(out)
    if preview is not None:
        save_preview(made, preview)
    print(made.describe())
    if known is not None:
        print(_expectation(known, made))
    print(f"wrote {out}" + (f" and {preview}" if preview else ""))


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(help="A local checkpoint, or `reference` for the one shipped.")] = "reference",
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write; a run cut short goes on there.")] = Path(
        "model.hetcal"
    ),
    clips: Annotated[int, typer.Option(help="How many procedural clips to edit.", min=1)] = 6,
    video: Annotated[Path | None, typer.Option(help="A video to edit, in place of procedural clips.")] = None,
    mask: Annotated[Path | None, typer.Option(help="The mask of --video.")] = None,
    prompt: Annotated[str, typer.Option(help="What to generate inside the mask of --video.")] = "",
    height: Height = 128,
    width: Width = 128,
    num_frames: Frames = 17,
    steps: Steps = 50,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 turns it off.")] = 5.0,
    max_sequence_length: Annotated[int, typer.Option(help="Text tokens.", min=1)] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    margin: Margin = 2.0,
    context_ratio: ContextRatio = 0.05,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    inner: Inner = "inductor",
    device: Device = "auto",
) -> None:
    """Measure what PARTIAL and REUSE steps cost and save, for `hetcache plan --budget`.

    Runs the uncached model on a few clips, and times each kind of step on this machine. Procedural clips are square:
    of --height.
    """
    from .bench_quality import weights_digest
    from .calibrate import calibrate as measure
    from .editing import load_pipeline
    from .report import processor_name

    _check_size(height, width, num_frames)
    edits = (
        _reference().calibration_clips(clips, num_frames, height)
        if video is None and mask is None
        else [_clip(video, mask, None, prompt, num_frames, height, width)]
    )
    with console.status(f"loading {model}"):
        folder = _reference().FOLDER if model == "reference" else Path(model)
        pipe = load_pipeline(folder, _dtype(dtype), _device(device))
    settings = {
        "model": model, "weights": weights_digest(pipe), "dtype": dtype, "processor": processor_name(_device(device)),
    }  # fmt: skip
    with _progress() as progress:
        measured = measure(
            pipe, edits, out, progress, num_inference_steps=steps, guidance_scale=guidance_scale,
            max_sequence_length=max_sequence_length, seed=seed, inner=inner, settings=settings, margin=margin,
            context_ratio=context_ratio,
        )  # fmt: skip
    print(measured.describe())
    print(f"wrote {out}")


@bench.command("quality")
def bench_quality_command(
    methods: Annotated[
        str,
        typer.Option(help="Comma-separated: schedules such as balanced, FRRP or teacache:0.1, and steps:N (uncached)."),
    ] = "quality,balanced,fast,steps:20",
    clips: Annotated[int, typer.Option(help="How many of the held-out clips.", min=1)] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the results; a run cut short goes on there.")] = Path(
        "out/bench/quality"
    ),
    model: Annotated[Path | None, typer.Option(help="A local checkpoint, in place of the reference model.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video to edit, in place of the held-out clips.")] = None,
    mask: Annotated[Path | None, typer.Option(help="The mask of --video.")] = None,
    truth: Annotated[Path | None, typer.Option(help="What the edit of --video should look like.")] = None,
    prompt: Annotated[str, typer.Option(help="What to generate inside the mask of --video.")] = "",
    height: Height = 480,
    width: Width = 832,
    num_frames: Frames = 81,
    steps: Steps = 50,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 turns it off.")] = 5.0,
    max_sequence_length: Annotated[int, typer.Option(help="Text tokens.", min=1)] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    margin: Margin = 2.0,
    context_ratio: ContextRatio = 0.05,
    dtype: Annotated[str, typer.Option(help="Of --model: float32, bfloat16 or float16.")] = "bfloat16",
    inner: Inner = "inductor",
    device: Device = "auto",
) -> None:
    """Measure speed, fidelity to the uncached result and quality against ground truth, method by method.

    Writes OUT/quality.json, quality.md, quality.png and a side-by-side video of each clip.
    """
    from .bench_quality import Settings, bench_quality, parse_methods
    from .editing import load_pipeline
    from .quality_report import HEADER, busiest, write_report
    from .report import busy_machine_warning

    known = parse_methods(methods)
    if video is None and mask is None:
        edits = _reference().held_out(clips)
    else:
        _check_size(height, width, num_frames)
        edits = [_clip(video, mask, truth, prompt, num_frames, height, width)]
    with console.status(f"loading {model or 'the reference model'}"):
        pipe = load_pipeline(model, _dtype(dtype), _device(device)) if model else _reference().load()
    settings = Settings(
        model=str(model or "reference"), num_inference_steps=steps, guidance_scale=guidance_scale,
        max_sequence_length=max_sequence_length, seed=seed, inner=inner, margin=margin, context_ratio=context_ratio,
    )  # fmt: skip
    with _progress() as progress:
        result = bench_quality(pipe.to(_device(device)), edits, known, settings, out, progress)
    table = Table(*HEADER, box=None)
    for row in write_report(out, result, edits, known):
        table.add_row(*row)
    # A figure cut off is worse than a line that a narrow terminal wraps.
    Console(width=max(140, console.width)).print(table)
    if (warning := busy_machine_warning(busiest(result, edits, known))) is not None:
        console.print(f"warning: {warning}", style="yellow")
    print(f"wrote {out / 'quality.json'}")


def _clip(
    video: Path | None, mask: Path | None, truth: Path | None, prompt: str, num_frames: int, height: int, width: int
) -> Any:
    """A clip of files."""
    from .media import Clip, read_mask, read_video

    if video is None or mask is None:
        raise InputFileError("--video and --mask go together: give both, or neither for the held-out clips")
    size = (num_frames, height, width)
    expected = read_video(truth, *size) if truth else None
    return Clip(video.stem, read_video(video, *size), read_mask(mask, *size), prompt, expected)


def _load_calibration(name: str | None) -> Any:
    """The calibration file of this name, or the one that is shipped with the reference model."""
    from .calibration import Calibration

    if name is None:
        return None
    return Calibration.load(_reference().CALIBRATION if name == "reference" else name)


def _expectation(calibration: Any, plan: Any) -> str:
    """What the calibration expects of a plan, and of the presets beside it."""
    from .optimal import expect
    from .schedule import PRESETS, make_schedule

    timesteps = plan.timesteps if plan.timesteps.size else calibration.timesteps_for(len(plan.steps))
    named = {plan.schedule: plan.steps} | {name: make_schedule(name, len(plan.steps)) for name in PRESETS}
    share = plan.num_active / plan.num_tokens
    width = max(map(len, named))
    return "\n".join(
        f"{name:{width}}  {expect(calibration, steps, timesteps, share).describe()}" for name, steps in named.items()
    )


def _reference() -> Any:
    """The reference model and its clips, which only some commands need."""
    try:
        return importlib.import_module("hetcache_compile.reference")
    except ModuleNotFoundError as error:
        raise InputFileError(
            "this installation has no reference model: give --model, --video and --mask of your own"
        ) from error


def _edit(
    pipe: Any, request: Any, out: Path, schedule: str, inner: str, *, baseline: bool, eager: bool,
    plan: Any = None, **partition: Any,
) -> None:  # fmt: skip
    """Plan, run each way, compare, write and print."""
    from . import editing
    from .report import busy_machine_warning, make_report, table_rows, write_report

    made = plan or editing.make_plan(pipe, request, schedule, **partition)
    if plan is not None:
        request = replace(request, num_inference_steps=len(plan.steps))
    console.print(made.describe(), highlight=False)
    with _progress() as progress:
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
        console.print(f"warning: {warning}", style="yellow")
    print(f"wrote {out / 'report.html'}")


@contextmanager
def _progress() -> Iterator[Any]:
    """A progress bar for each stage."""
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, step: int, steps: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=steps)
            bars.update(tasks[stage], completed=step)

        yield update


def _check_size(height: int, width: int, num_frames: int) -> None:
    for name, value in (("height", height), ("width", width)):
        if value % 16:
            raise PlanError(f"{name} must be a multiple of 16, got {value}")
    if num_frames % 4 != 1:
        raise PlanError(f"the number of frames must be one more than a multiple of 4, got {num_frames}")


def _dtype(name: str) -> Any:
    import torch

    if name not in ("float32", "bfloat16", "float16"):
        raise PlanError(f"dtype must be float32, bfloat16 or float16, got {name}")
    return getattr(torch, name)


def _device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


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
