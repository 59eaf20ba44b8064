"""The command line: `hetcache demo | plan | edit | explain`. Only this module prints and exits."""

from __future__ import annotations

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

from .errors import HetCacheError, PlanError

app = typer.Typer(
    help="Token-partitioned caching for diffusion transformers, as a compiler pass.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(stderr=True)

Schedule = Annotated[
    str,
    typer.Option(help="full, quality, balanced, fast, teacache:THRESHOLD, or a cycle of F, P and R such as FRRP."),
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
        baseline=baseline, eager=eager, plan=known_plan, margin=margin, context_ratio=context_ratio,
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
    pixels = read_mask(mask, num_frames, height, width)
    partition: dict[str, Any] = {"margin": margin, "context_ratio": context_ratio}
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
    print(f"wrote {out}" + (f" and {preview}" if preview else ""))


@app.command()
def explain(
    model: Annotated[
        str,
        typer.Argument(help="Local diffusers checkpoint, or package.module:function returning (model, kwargs, grid)."),
    ],
    height: Height = 480,
    width: Width = 832,
    num_frames: Frames = 81,
    active: Annotated[float, typer.Option(help="Share of tokens that are active.", min=0.0, max=1.0)] = 0.25,
    token_input: Annotated[
        list[str] | None,
        typer.Option(help="An input that holds packed tokens and their dim, such as hidden_states=1. Repeatable."),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it into this .svg or .html file.")] = None,
) -> None:
    """Show what the analysis finds in a model: where tokens are born and die, caches, FLOPs of each form."""
    import numpy as np

    from .calls import call_of_function, call_of_pipeline
    from .explain import explain as explain_forms
    from .explain import write_picture
    from .forms import rewrite
    from .plan import Plan

    if ":" in model and not Path(model).exists():
        call = call_of_function(model)
    else:
        _check_size(height, width, num_frames)
        call = call_of_pipeline(Path(model), height, width, num_frames)
    number = int(np.prod(call.grid))
    plan = Plan.from_token_mask(np.arange(number) < max(1, round(active * number)), call.grid)
    forms = rewrite(call.model, plan, call.args, call.kwargs, token_inputs=_token_inputs(token_input or []))
    explanation = explain_forms(forms)
    print(explanation)
    if picture is not None:
        write_picture(explanation, picture)
        print(f"wrote {picture}")


def _token_inputs(given: list[str]) -> dict[str, int] | None:
    parsed = {}
    for text in given:
        name, _, dim = text.partition("=")
        if not dim.lstrip("-").isdigit():
            raise PlanError(f"--token-input takes NAME=DIM, got {text}")
        parsed[name] = int(dim)
    return parsed or None


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
