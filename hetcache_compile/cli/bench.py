"""`hetcache bench`: measurements that anyone can repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..console import console, progress_bars
from ..errors import InputFileError
from ..files import check_writable
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

bench = typer.Typer(help="Measure on this machine.", no_args_is_help=True, rich_markup_mode=None)


@bench.command("quality")
def bench_quality_command(
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated: schedules such as balanced, FRRP, teacache:0.1 or optimal:3x, with options of the "
            "plan such as balanced+o0+margin=1; steps:N (uncached); crop:0.5 and crop:0.5+balanced (the mask's "
            "surroundings alone); ahead:0.45+FFP* (one more step, at a later time)."
        ),
    ] = "quality,balanced,fast,steps:20",
    clips: Annotated[int, typer.Option(help="How many of the held-out clips.", min=1)] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the results; a run cut short goes on there.")] = Path(
        "out/bench/quality"
    ),
    model: Annotated[Path | None, typer.Option(help="A local checkpoint, in place of the reference model.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video to edit, in place of the held-out clips.")] = None,
    mask: Annotated[Path | None, typer.Option(help="The mask of --video.")] = None,
    threshold: Threshold = None,
    invert: Invert = False,
    labels: Labels = None,
    truth: Annotated[Path | None, typer.Option(help="What the edit of --video should look like.")] = None,
    prompt: Annotated[str, typer.Option(help="What to generate inside the mask of --video.")] = "",
    height: Height = 480,
    width: Width = 832,
    num_frames: NumFrames = 81,
    steps: Steps = 50,
    guidance_scale: GuidanceScale = None,
    max_sequence_length: TextTokens = None,
    seed: Seed = 0,
    margin: Margin = None,
    context_ratio: ContextRatio = 0.05,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="For optimal schedules: a file of `hetcache calibrate`. [default: the reference model's own]"
        ),
    ] = None,
    fidelity_only: Annotated[
        bool, typer.Option("--fidelity-only", help="Take no times: a busy machine does not change what is left.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    inner: Inner = "inductor",
    device: Device = "auto",
) -> None:
    """Measure speed, fidelity to the uncached result and quality against ground truth, method by method.

    Writes OUT/quality.json, quality.md, quality.png and a side-by-side video of each clip.
    """
    from .. import reference
    from ..bench.methods import parse_methods
    from ..bench.quality import RESULT, Settings, bench_quality, file_digest
    from ..bench.quality_report import HEADER, busiest, write_report
    from ..calibration.calibration import Calibration
    from ..edit.editing import check_edits_video, load_pipeline
    from ..edit.report import busy_machine_warning

    check_writable(out / RESULT)
    reading = mask_options(threshold, invert, labels, has_mask=mask is not None)
    known = parse_methods(methods)
    recorded = None if model and not calibration else calibration or reference.CALIBRATION
    measured = Calibration.load(recorded) if recorded else None
    if video is None and mask is None:
        edits = reference.held_out(clips)
    else:
        edits = [clip_of_files(video, mask, truth, prompt, (num_frames, height, width), reading)]
    folder = model or reference.FOLDER
    check_edits_video(folder)
    with console.status(f"loading {model or 'the reference model'}"):
        pipe = load_pipeline(folder, torch_dtype(dtype), torch_device(device))
    if video is not None:
        check_size(height, width, num_frames, pipe)
    usual_guidance, usual_length = (5.0, 512) if model else (reference.GUIDANCE_SCALE, reference.MAX_TEXT_LENGTH)
    settings = Settings(
        model=str(model or "reference"), num_inference_steps=steps,
        guidance_scale=usual_guidance if guidance_scale is None else guidance_scale,
        max_sequence_length=max_sequence_length or usual_length, seed=seed, inner=inner, margin=margin,
        context_ratio=context_ratio, timed=not fidelity_only, calibration=file_digest(recorded),
    )  # fmt: skip
    with progress_bars() as progress:
        result = bench_quality(pipe, edits, known, settings, out, progress, measured)
    table = Table(*HEADER, box=None)
    for row in write_report(out, result, edits, known):
        table.add_row(*row)
    # A figure cut off is worse than a line that a narrow terminal wraps.
    Console(width=max(140, console.width)).print(table)
    worst = busiest(result, edits, known)
    if worst is not None and (warning := busy_machine_warning(worst)) is not None:
        console.print(f"warning: {warning}", style="yellow")
    print(f"wrote {out / 'quality.json'}")


def clip_of_files(
    video: Path | None, mask: Path | None, truth: Path | None, prompt: str, size: tuple[int, int, int],
    reading: dict[str, Any],
) -> Any:  # fmt: skip
    """A clip of files, of so many frames, height and width; its mask is read as `reading` says."""
    from ..edit.media import Clip, read_mask, read_video

    if video is None or mask is None:
        raise InputFileError("--video and --mask go together: give both, or neither for the held-out clips")
    expected = read_video(truth, *size) if truth else None
    return Clip(video.stem, read_video(video, *size), read_mask(mask, *size, video=video, **reading), prompt, expected)


@bench.command("engine")
def bench_engine(
    folder: Annotated[Path, typer.Argument(help="What hetcache-export wrote.")],
    provider: Annotated[str, typer.Option(help="ort-cpu, ort-cuda, tensorrt or tensorrt-rtx.")] = "ort-cpu",
    rounds: Annotated[int, typer.Option(help="How often each form is timed.", min=1)] = 20,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("out/bench"),
) -> None:
    """Time the forms of an exported engine, and predict what its plan gains over the unmodified model.

    Prints the same measurement as trtexec and polygraphy commands for a machine of your own.
    """
    from ..engine.manifest import Manifest
    from ..export.check import latency

    check_writable(out / "bench.json")
    manifest = Manifest.load(folder)
    with progress_bars() as progress:
        result = latency.bench_engine(folder, provider, rounds, progress)
    latency.write_bench(out, result)
    header, *rows = latency.table_rows(result)
    table = Table(*header, box=None)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    for line in (*latency.conclusions(result), *latency.equivalent_commands(folder, manifest)):
        print(line)
    print(f"wrote {out / 'bench.json'} and {out / 'bench.png'}")
