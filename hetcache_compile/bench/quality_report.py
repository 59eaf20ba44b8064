"""What `hetcache bench quality` shows: a table, a plot, and the methods side by side on each clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..edit.media import Clip, stack_side_by_side, tint, write_video
from ..edit.metrics import METRICS, REGIONS, Comparison
from ..files import atomically
from .methods import FULL, Method
from .quality import file_name, frames_file, load_frames, save_result

HEADER = (
    "method", "speed-up", "PSNR", "worst", "SSIM", "FLIP", "flicker", "PSNR band", "PSNR context",
    "PSNR to truth", "FLIP to truth",
)  # fmt: skip


def write_report(
    out: Path, result: dict[str, Any], clips: Sequence[Clip], methods: Sequence[Method]
) -> list[tuple[str, ...]]:
    """Write `quality.json` with its summary, `quality.md`, `quality.png` and a video for each clip.

    Returns the rows of the table, for the terminal.
    """
    cells = {name: [result["cells"][clip.name][name] for clip in clips] for name in (m.name for m in methods)}
    result["summary"] = {name: summarise(of_method) for name, of_method in cells.items()}
    save_result(out, result)
    rows = [table_row(name, summary) for name, summary in result["summary"].items()]
    page = markdown(rows, result, len(clips))
    atomically(out / "quality.md", lambda temporary: Path(temporary).write_text(page))
    save_plot(out / "quality.png", cells, result["summary"])
    for clip in clips:
        save_side_by_side(out, clip, {name: result["cells"][clip.name][name] for name in cells})
    return rows


def summarise(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the clips, and the lowest PSNR to the uncached result inside the mask."""
    fidelity = [cell["fidelity"] for cell in cells if cell["fidelity"]]
    speedups = [cell["speedup"] for cell in cells if cell["speedup"] is not None]
    quality = [cell["quality"] for cell in cells if cell["quality"]]
    worst = min((_psnr(comparison["generative"]) for comparison in fidelity), default=math.inf)
    return {
        "clips": len(cells),
        "speedup": median(speedups) if speedups else None,
        "fidelity": typical(fidelity) if fidelity else None,
        "worst_psnr_db": _finite(worst),
        "quality": typical(quality) if quality else None,
    }


def busiest(result: dict[str, Any], clips: Sequence[Clip], methods: Sequence[Method]) -> dict[str, Any] | None:
    """The cell whose FULL calls were least like the plain calls beside it (see `report.busy_machine_warning`)."""
    cells = [result["cells"][clip.name][method.name] for clip in clips for method in methods]
    timed = [cell for cell in cells if cell["full_over_compiled"] is not None]
    return max(timed, key=lambda cell: abs(math.log(cell["full_over_compiled"])), default=None)


def typical(comparisons: Sequence[Comparison]) -> Comparison:
    """The median of each figure. Identical videos have infinite PSNR: None, if they are the median."""
    result: Comparison = {}
    for region in REGIONS:
        measured = [comparison[region] for comparison in comparisons if comparison[region]["ssim"] is not None]
        result[region] = {}
        for metric in METRICS:
            values = [_psnr(figures) if metric == "psnr_db" else figures[metric] for figures in measured]
            known = [value for value in values if value is not None]
            result[region][metric] = _finite(median(known)) if known else None
    return result


def _psnr(figures: dict[str, float | None]) -> float:
    value = figures["psnr_db"]
    return math.inf if value is None else value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def table_row(name: str, summary: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table; see `HEADER`."""
    fidelity, quality = summary["fidelity"], summary["quality"]

    def figure(comparison: Comparison | None, region: str, metric: str, digits: int) -> str:
        if comparison is None:
            return "-"
        value, measured = comparison[region][metric], comparison[region]["ssim"] is not None
        if value is None:
            return "identical" if metric == "psnr_db" and measured else "-"
        return f"{value:.{digits}f}"

    worst = summary["worst_psnr_db"]
    return (
        name,
        "-" if summary["speedup"] is None else f"{summary['speedup']:.2f}x",
        figure(fidelity, "generative", "psnr_db", 1),
        "-" if fidelity is None else "identical" if worst is None else f"{worst:.1f}",
        figure(fidelity, "generative", "ssim", 4),
        figure(fidelity, "generative", "flip", 4),
        figure(fidelity, "generative", "flicker", 2),
        figure(fidelity, "band", "psnr_db", 1),
        figure(fidelity, "context", "psnr_db", 1),
        figure(quality, "generative", "psnr_db", 2),
        figure(quality, "generative", "flip", 4),
    )


def markdown(rows: Sequence[tuple[str, ...]], result: dict[str, Any], num_clips: int) -> str:
    """The table as a page, with what it was measured on."""
    settings = result["settings"]
    lines = [HEADER, ("---",) * len(HEADER), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{table}\n\n"
        f"Medians of {num_clips} clips, {settings['num_inference_steps']} steps, model {settings['model']}; "
        f"{result['processor']}, {result['threads']} threads, torch {result['versions']['torch']}. PSNR (dB), SSIM, "
        "FLIP and flicker (8-bit levels) compare with the uncached result, inside the mask unless named otherwise; "
        "`worst` is the lowest PSNR of a clip. Speed-up is in transformer time.\n\n"
        f"`{result['command']}`\n"
    )


def save_plot(path: Path, cells: dict[str, list[dict[str, Any]]], summary: dict[str, Any]) -> None:
    """Fidelity inside the mask against speed-up: a small mark for each clip, a large one for the medians.

    Nothing is drawn where nothing was timed.
    """
    if any(of_method["speedup"] is None for of_method in summary.values()):
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in (name for name in cells if name != FULL):
        points = [(cell["speedup"], cell["fidelity"]["generative"]["psnr_db"]) for cell in cells[name]]
        seen = [point for point in points if point[1] is not None]
        small = axis.scatter(*zip(*seen, strict=True), s=14, alpha=0.4) if seen else None
        typical_psnr = summary[name]["fidelity"]["generative"]["psnr_db"]
        if small is not None and typical_psnr is not None:
            place = (summary[name]["speedup"], typical_psnr)
            axis.scatter(*place, s=70, color=small.get_facecolor()[0], alpha=1, label=name)
            axis.annotate(name, place, xytext=(6, 6), textcoords="offset points", fontsize=8)
    axis.axvline(1, color="#999999", linewidth=0.8, linestyle=":")
    axis.set(
        xlabel="speed-up over the uncached model", ylabel="PSNR to the uncached result, inside the mask (dB)"
    )  # fmt: skip
    axis.grid(alpha=0.2)
    atomically(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    plt.close(figure)


def save_side_by_side(out: Path, clip: Clip, cells: dict[str, dict[str, Any]]) -> None:
    """The input, ground truth where there is one, and every method's result."""
    videos, titles = [tint(clip.video, clip.mask)], ["input, mask in red"]
    if clip.truth is not None:
        videos.append(clip.truth)
        titles.append("ground truth")
    for name, cell in cells.items():
        videos.append(load_frames(frames_file(out, clip.name, name)))
        speed = "" if cell["speedup"] is None else f", {cell['speedup']:.2f}x"
        titles.append("uncached" if name == FULL else f"{name}{speed}")
    write_video(out / f"{file_name(clip.name)}.mp4", stack_side_by_side(videos, titles))
