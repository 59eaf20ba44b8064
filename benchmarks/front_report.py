"""What `front.py` shows: points, fronts, the plot, the tables of docs/benchmarks.md. Needs no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from hetcache_compile.files import atomically

OURS, THE_PAPER, FEWER_STEPS = "hetcache_compile", "the paper's method", "fewer steps"
ADDED = "additions to the paper's method"
CROPPED = "crop and stitch"
JOINED = (OURS, THE_PAPER, ADDED, FEWER_STEPS, CROPPED)
LIBRARIES = ("diffusers", "cache-dit")
SPEEDS = {50: (2.5, 4.0, 6.0), 20: (1.6, 2.5, 3.5)}
"""The table's rows: number of steps -> the least speed-up."""
RIVALS_TIMED_ON = "20"
"""The mask size of the clip that other libraries' caches are timed on."""
WRONG = 1e-3
"""A relative error on inputs that stay the same above which a cache is called wrong: rounding is far below."""

Result = dict[str, Any]
Point = dict[str, Any]


def mask_size(clip: str) -> str:
    """The nominal mask size in percent, which ends the clip's name."""
    return clip.rsplit("-", 1)[-1]


def sizes(result: Result) -> list[str]:
    """The mask sizes measured, smallest first."""
    return sorted({mask_size(clip) for part in result["steps"].values() for clip in part["masked"]}, key=int)


def points(result: Result, steps: str, size: str) -> Iterator[Point]:
    """A point for each method that was timed at this mask size: medians over clips.

    Other libraries' caches take no notice of the mask: a time of any size holds. A method that gave the uncached result
    itself has no finite PSNR, and no point.
    """
    for name, method in result["steps"][steps]["methods"].items():
        done = {clip: cell for clip, cell in method["cells"].items() if "failed" not in cell}
        cells = [cell for clip, cell in done.items() if mask_size(clip) == size]
        timed = cells if method["family"] in JOINED else done.values()
        speeds = [cell["speedup"] for cell in timed if "speedup" in cell]
        figures = [cell["psnr_db"]["generative"] for cell in cells]
        if speeds and figures and None not in figures:
            place = {"speedup": median(speeds), "psnr_db": median(figures)}
            yield {"method": name, "family": method["family"], **place}


def upper_front(found: Sequence[Point]) -> list[Point]:
    """The points than which none is both faster and better, slowest first."""
    front: list[Point] = []
    for point in sorted(found, key=lambda point: (-point["speedup"], -point["psnr_db"])):
        if not front or point["psnr_db"] > front[-1]["psnr_db"]:
            front.append(point)
    return front[::-1]


def families(result: Result) -> list[str]:
    """Ours first, then the paper's and fewer steps, then other libraries'."""
    found = [method["family"] for part in result["steps"].values() for method in part["methods"].values()]
    return list(dict.fromkeys([*JOINED, *found]))


def save_plot(path: Path, result: Result) -> None:
    """A panel for each mask size and number of steps; fronts are joined, but for those of other libraries."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, columns = list(result["steps"]), sizes(result)
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(4.6 * len(columns), 3.9 * len(rows)), squeeze=False, layout="constrained"
    )
    for row, steps in enumerate(rows):
        for column, size in enumerate(columns):
            draw_panel(axes[row][column], list(points(result, steps, size)), families(result))
            axes[row][column].set_title(f"{steps} steps, masks of {size} %")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8)
    atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    plt.close(figure)


def draw_panel(axis: Any, found: Sequence[Point], labels: Sequence[str]) -> None:
    for number, label in enumerate(labels):
        of_family = [point for point in found if point["family"] == label]
        joined = upper_front(of_family) if label in JOINED else []
        style = {"color": f"C{number % 10}", "zorder": 3 if label == OURS else 2}
        axis.plot([p["speedup"] for p in joined], [p["psnr_db"] for p in joined], **style)
        place = [p["speedup"] for p in of_family], [p["psnr_db"] for p in of_family]
        axis.scatter(*place, s=26, marker="oXs^vD<>Pph*"[number % 12], label=label, **style)
    axis.set(xlabel="speed-up over the compiled model", ylabel="PSNR to the uncached result,\ninside the mask (dB)")
    axis.grid(alpha=0.2)


def front_table(result: Result) -> str:
    """The best point of each family that is fast enough, by mask size."""
    columns = sizes(result)
    rows = ["| | " + " | ".join(f"masks of {size} %" for size in columns) + " |", "| --- |" + " --- |" * len(columns)]
    for steps, speeds in SPEEDS.items():
        if str(steps) in result["steps"]:
            for speed in speeds:
                rows.append(f"| **{steps} steps, at least {speed:g}x** |" + " |" * len(columns))
                rows += [family_row(result, str(steps), speed, who, columns) for who in compared(result, str(steps))]
    caption_and_plot = [
        f"{caption(result)} In the first table a line shows the best method that is fast enough.",
        "",
        "![Fidelity against speed-up](benchmarks/results/front.png)",
    ]
    tables = [methods_table(result, steps, columns) for steps in result["steps"]]
    tables += [additions_table(result, steps, columns) for steps in result["steps"]]
    return "\n".join([*rows, "", *(line for table in tables if table for line in [*table, ""]), *caption_and_plot])


def compared(result: Result, steps: str) -> list[str]:
    """The families that were measured: ours, the paper's, fewer steps, and other libraries' caches by library."""
    found = [method["family"] for method in result["steps"][steps]["methods"].values()]
    return [who for who in (*JOINED, *LIBRARIES) if any(name.startswith(who) for name in found)]


def family_row(result: Result, steps: str, speed: float, who: str, columns: Sequence[str]) -> str:
    cells = []
    for size in columns:
        measured = [point for point in points(result, steps, size) if point["family"].startswith(who)]
        fast = [point for point in measured if point["speedup"] >= speed]
        best = max(fast, key=lambda point: point["psnr_db"], default=None)
        none = "none is as fast" if measured else "not measured"
        cells.append(f"{best['psnr_db']:.1f} dB, {best['speedup']:.1f}x: `{best['method']}`" if best else none)
    return f"| {who} | " + " | ".join(cells) + " |"


def methods_table(result: Result, steps: str, columns: Sequence[str]) -> list[str]:
    """Every method without options of its own, the slowest first."""
    return table_of(result, steps, columns, lambda name: "+" not in name)


def additions_table(result: Result, steps: str, columns: Sequence[str]) -> list[str]:
    """Each schedule that was measured with options, with each of them: what moves the front, and what does not.

    On the clips of a size that all have which were timed there, so that lines can be compared. Empty where none are.
    """
    methods = result["steps"][steps]["methods"]
    with_options = {name for name in methods if "+" in name}
    compared = with_options | {name.partition("+")[0] for name in with_options} & set(methods)
    reduced: dict[str, Any] = {name: {**methods[name], "cells": {}} for name in compared}
    for size in columns:
        timed = compared & {point["method"] for point in points(result, steps, size)}
        of_size = [{clip for clip in methods[name]["cells"] if mask_size(clip) == size} for name in timed]
        for clip in set.intersection(*of_size) if of_size else ():
            for name in timed:
                reduced[name]["cells"][clip] = methods[name]["cells"][clip]
    result = {"steps": {steps: {"methods": reduced}}}
    shown = [size for size in columns if with_options & {point["method"] for point in points(result, steps, size)}]
    return table_of(result, steps, shown, lambda _: True) if shown else []


def table_of(result: Result, steps: str, columns: Sequence[str], wanted: Callable[[str], bool]) -> list[str]:
    """A line for each method that is wanted, the slowest first, and a column for each mask size."""
    found = {size: {p["method"]: p for p in points(result, steps, size) if wanted(p["method"])} for size in columns}
    names = {name for of_size in found.values() for name in of_size}
    speeds = {name: median(p[name]["speedup"] for p in found.values() if name in p) for name in names}
    rows = [f"| {steps} steps | " + " | ".join(f"masks of {size} %" for size in columns) + " |"]
    rows.append("| --- |" + " --- |" * len(columns))
    for name in sorted(names, key=lambda name: (speeds[name], name)):
        rows.append(f"| `{name}` | " + " | ".join(figures(found[size].get(name)) for size in columns) + " |")
    return rows


def figures(point: Point | None) -> str:
    return f"{point['psnr_db']:.1f} dB, {point['speedup']:.2f}x" if point else "-"


def caption(result: Result) -> str:
    masked = {clip: share for part in result["steps"].values() for clip, share in part["masked"].items()}
    text = (
        f"Reference model, {len(masked)} held-out clips, guidance {result['guidance_scale']:g}. PSNR to the uncached "
        "result inside the mask, median over the clips of a size; speed-up in transformer time over the same model "
        f"compiled without us, from the median call of each kind within a run{ratios(result)}. All calls of other "
        "libraries' caches count, against plain calls right before them, on one clip of "
        f"{RIVALS_TIMED_ON} % for all sizes. {result['processor']}, {result['threads']} threads, torch "
        f"{result['versions']['torch']}: `python benchmarks/front.py`."
    )
    return " ".join([text, *troubles(result)])


def ratios(result: Result) -> str:
    """What FULL steps take of a plain call."""
    found = [f"{ratio:.2f} {what}" for what, ratio in result.get("full_over_plain", {}).items()]
    return f" (a FULL step takes, of a plain call: {', '.join(found)})" if found else ""


def troubles(result: Result) -> list[str]:
    """What other libraries' caches got wrong: those that could not run, and those that err on unchanging inputs."""
    failed: dict[str, str] = {}
    wrong: dict[str, float] = {}
    for part in result["steps"].values():
        for name, method in part["methods"].items():
            for cell in method["cells"].values():
                if "failed" in cell:
                    failed[f"{method['family']} (`{name}`)"] = cell["failed"]
                elif cell.get("frozen_input_error", 0) > WRONG:
                    wrong[method["family"]] = max(wrong.get(method["family"], 0), cell["frozen_input_error"])
    found = [f"{name} cannot run: {reason}." for name, reason in failed.items()]
    if wrong:
        listed = ", ".join(f"{name} ({error:.2f})" for name, error in wrong.items())
        found.append(f"Wrong even where inputs stay the same, by their relative error: {listed}.")
    return found
