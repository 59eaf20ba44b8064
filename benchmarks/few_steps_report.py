"""What `few_steps.py` shows: the plot, and the tables of docs/benchmarks.md. Needs no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from statistics import mean, median
from typing import Any

from front_report import JOINED, OURS, mask_size, upper_front

from hetcache_compile.bench.methods import FULL
from hetcache_compile.files import atomically
from hetcache_compile.reference import GUIDANCE_SCALE

Result = dict[str, Any]


def sizes(result: Result) -> list[str]:
    """The mask sizes measured, smallest first."""
    return sorted({mask_size(clip) for part in result["models"].values() for clip in part["masked"]}, key=int)


def cells_of(method: dict[str, Any], size: str | None = None) -> list[dict[str, Any]]:
    """Those that ran, of one mask size or of all."""
    return [
        cell
        for clip, cell in method["cells"].items()
        if "failed" not in cell and (size is None or mask_size(clip) == size)
    ]


def figure(cells: list[dict[str, Any]], what: str, region: str, metric: str) -> float | None:
    """The median over cells; None where there is none, or where it is identical to what it is compared with."""
    values = [cell[what][region][metric] for cell in cells if what in cell]
    middle = median([inf if value is None else value for value in values] or [inf])
    return None if middle == inf else middle


def points(part: dict[str, Any], size: str, what: str) -> Iterator[dict[str, Any]]:
    """A point for each method: PSNR inside the mask, to the uncached result or to the truth."""
    for name, method in part["methods"].items():
        cells = cells_of(method, size)
        psnr_db = figure(cells, what, "generative", "psnr_db")
        if psnr_db is not None:
            fewer = median(cell["fewer_flops"] for cell in cells)
            yield {"method": name, "family": method["family"], "speedup": fewer, "psnr_db": psnr_db}


def save_plot(path: Path, result: Result) -> None:
    """For each model and number of steps a row of panels: fidelity, then quality, by mask size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = list(result["models"])
    columns = [(what, size) for what in ("fidelity", "quality") for size in sizes(result)]
    panels = plt.subplots(
        len(rows), len(columns), figsize=(3.4 * len(columns), 3.2 * len(rows)), squeeze=False, layout="constrained"
    )
    figure_of_all, axes = panels
    found = {method["family"] for part in result["models"].values() for method in part["methods"].values()}
    families = [name for name in JOINED if name in found] + sorted(found - set(JOINED))
    for row, model in enumerate(rows):
        for column, (what, size) in enumerate(columns):
            axis, shown = axes[row][column], list(points(result["models"][model], size, what))
            for number, label in enumerate(families):
                of_family = [point for point in shown if point["family"] == label]
                joined = upper_front(of_family) if label in JOINED else []
                style = {"color": f"C{number % 10}", "zorder": 3 if label == OURS else 2}
                axis.plot([p["speedup"] for p in joined], [p["psnr_db"] for p in joined], **style)
                place = [p["speedup"] for p in of_family], [p["psnr_db"] for p in of_family]
                axis.scatter(*place, s=24, marker="oXs^vD<>Pph*"[number % 12], label=label, **style)
            to = "the uncached result" if what == "fidelity" else "the true video"
            name, _, steps = model.partition(":")
            axis.set_title(f"{name}, {steps} steps, masks of {size} %", fontsize=9)
            axis.set(xlabel="FLOPs of the uncached run / its own", ylabel=f"PSNR to {to} (dB)")
            axis.grid(alpha=0.2)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure_of_all.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8)
    atomically(path, lambda temporary: figure_of_all.savefig(temporary, dpi=100, format="png"))
    plt.close(figure_of_all)


def few_steps_table(result: Result) -> str:
    """For each model and number of steps: work and fidelity by mask size, then quality over all sizes."""
    lines = []
    for model, part in result["models"].items():
        lines += [*model_table(model, part, sizes(result)), ""]
    clips = {clip for part in result["models"].values() for clip in part["masked"]}
    timed = any("speedup" in cell for part in result["models"].values() for cell in _all_cells(part))
    shown = [f"{sum(mask_size(clip) == size for clip in clips)} of {size} %" for size in sizes(result)]
    lines += [
        f"{len(clips)} held-out clips at most ({', '.join(shown)}), medians over clips. By mask size: ratio of FLOPs "
        "to the uncached run's"
        f"{', of times in brackets' if timed else ''}; PSNR to the uncached result and to the true video inside the "
        "mask, in dB. On the right, means of the sizes: against the true video, inside the mask or in its band, "
        "8 pixels on both sides of its edge. `original` has a guidance of 2; the others none, and "
        f"evenly spaced steps. {machines(result)}: `python benchmarks/few_steps.py`.{failures(result)}",
        "",
        "![Fidelity and quality against work](benchmarks/results/few_steps.png)",
    ]
    return "\n".join(lines)


def failures(result: Result) -> str:
    """Which methods ran on no clip of a model, and why."""
    found: dict[str, list[str]] = {}
    for model, part in result["models"].items():
        for name, method in part["methods"].items():
            reason = next((cell["failed"] for cell in method["cells"].values() if "failed" in cell), None)
            if reason is not None and not cells_of(method):
                found.setdefault(f"`{name}` ({reason.strip().splitlines()[-1]})", []).append(model.replace(":", " in "))
    return "".join(f" Failed: {name}, {', '.join(models)} steps." for name, models in found.items())


WORTH_NAMING = 0.3
"""Decibels by which another method has to be ahead."""
AS_FAST = 0.985
"""What counts as no slower."""


def ahead_table(result: Result) -> str:
    """Where the fidelity of another method is higher than that of any plan measured that is as fast."""
    rows = head("model", "masks", "ahead", "best of ours at such a speed")
    for model, part in result["models"].items():
        for size in sizes(result):
            found = [
                (name, method["family"] == OURS or "+" in name, median(cell["fewer_flops"] for cell in cells), likeness)
                for name, method in part["methods"].items()
                if name != FULL and (cells := cells_of(method, size))
                for likeness in [figure(cells, "fidelity", "generative", "psnr_db") or inf]
            ]
            ours = [one for one in found if one[1]]
            others = [one for one in found if not one[1] and one[2] > 1.05]
            for name, _, speed, likeness in sorted(others, key=lambda one: one[2]):
                if any(one[2] >= speed and one[3] > likeness for one in others):
                    continue
                best = max((one for one in ours if one[2] >= AS_FAST * speed), key=lambda one: one[3], default=None)
                if best is None or best[3] < likeness - WORTH_NAMING:
                    shown = "none measured" if best is None else f"`{best[0]}`, {best[2]:.2f}x, {best[3]:.1f} dB"
                    named = f"{model.replace(':', ', ')} steps | {size} % | `{name}`, {speed:.2f}x, {likeness:.1f} dB"
                    rows.append(f"| {named} | {shown} |")
    rows += [
        "",
        "Medians of the tables above: ratio of FLOPs, PSNR to the uncached result inside the mask. Another method is "
        f"named where it is ahead by more than {WORTH_NAMING:g} dB, and no faster one of the others is better. A crop "
        "that is edited by a plan counts as ours.",
    ]
    return "\n".join(rows)


def machines(result: Result) -> str:
    """Which machines each model was measured on."""
    models: dict[str, list[str]] = {}
    for model, part in result["models"].items():
        found = " and ".join(sorted({method["machine"] for method in part["methods"].values()}))
        models.setdefault(found, []).append(model.replace(":", " in ") + " steps")
    return "; ".join(f"{', '.join(names)}: {machine}" for machine, names in models.items())


def _all_cells(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for method in part["methods"].values():
        yield from cells_of(method)


def model_table(model: str, part: dict[str, Any], columns: list[str]) -> list[str]:
    """A line for each method, the slowest first."""
    name, _, steps = model.partition(":")
    found = {name: method for name, method in part["methods"].items() if cells_of(method)}
    order = sorted(found, key=lambda name: (median(cell["fewer_flops"] for cell in cells_of(found[name])), name))
    judged_by = "PSNR in the band", "SSIM", "FLIP", "warping error"
    rows = head(f"{name}, {steps} steps", *by_mask(columns), *judged_by)
    for name in order:
        by_size = [cells_of(found[name], size) for size in columns]
        quality = [
            over_sizes(by_size, "band", "psnr_db", 1), over_sizes(by_size, "generative", "ssim", 3),
            over_sizes(by_size, "generative", "flip", 3), over_sizes(by_size, "generative", "warp_error", 1),
        ]  # fmt: skip
        rows.append(f"| `{name}` | " + " | ".join([*(of_size(cells) for cells in by_size), *quality]) + " |")
    return rows


def times_table(result: Result) -> str:
    """By mask size: how many times less time a method takes than plain calls beside it, and how many fewer FLOPs."""
    columns = sizes(result)
    rows = head("method", *by_mask(columns))
    for model, part in result["models"].items():
        for name, method in part["methods"].items():
            by_size = [[cell for cell in cells_of(method, size) if "speedup" in cell] for size in columns]
            if name != FULL and any(by_size):
                shown = [
                    f"{median(cell['speedup'] for cell in cells):.2f}x of "
                    f"{median(cell['fewer_flops'] for cell in cells):.2f}x" if cells else "-"
                    for cells in by_size
                ]  # fmt: skip
                rows.append(f"| `{name}`, {model.replace(':', ' in ')} steps | {' | '.join(shown)} |")
    clips = {clip for part in result["models"].values() for clip in part["masked"]}
    rows += [
        "",
        "Time of the model's calls, compiled, and what their FLOPs would give: ratios to plain compiled calls beside "
        f"them. {len(clips)} held-out clips. {machines(result)}: `{result['command']}`.",
    ]
    return "\n".join(rows)


STILL = "+context_motion=0"
"""What is added to a method's name for context that stays."""


def moving_table(result: Result) -> str:
    """Fidelity of methods whose context moves, beside the same where it stays."""

    def row(name: str, model: str) -> str:
        return f"`{name}`, {model.partition(':')[2]} steps"

    def shown(cells: list[dict[str, Any]]) -> str:
        return f"{figure(cells, 'fidelity', 'generative', 'psnr_db'):.1f} dB"

    return compared(result, "", STILL, row, shown, "and in brackets that of context that stays, at the same FLOPs")


SHARED = "+shared_context=1"
"""What is added to a method's name where the calls of a step share their context."""


def shared_table(result: Result) -> str:
    """Fidelity and work of methods whose calls share their context, beside the same where each has its own."""

    def row(name: str, model: str) -> str:
        named, _, steps = model.partition(":")
        return f"`{name}`, {steps} steps, guidance {named.partition('@')[2] or format(GUIDANCE_SCALE, 'g')}"

    def shown(cells: list[dict[str, Any]]) -> str:
        likeness, work = (
            figure(cells, "fidelity", "generative", "psnr_db"),
            median(cell["fewer_flops"] for cell in cells),
        )
        return f"{likeness:.1f} dB, {work:.2f}x"

    what = "with the ratio of the uncached run's FLOPs, and in brackets where each call has a context of its own"
    return compared(result, SHARED, "", row, shown, what)


def compared(
    result: Result,
    ours: str,
    other: str,
    row: Callable[[str, str], str],
    shown: Callable[[list[dict[str, Any]]], str],
    what: str,
) -> str:
    """Methods in two ways, the second in brackets.

    Args:
        result: measured.
        ours: what is added to a method's name in the first way.
        other: and in the second.
        row: begins a line, from the method and the model.
        shown: of the cells of a mask size.
        what: stands in the brackets, for the caption.
    """
    columns, gains = sizes(result), []
    lines = head("schedule", *by_mask(columns))
    for model, part in result["models"].items():
        methods, added = part["methods"], max(ours, other)
        for name in [name for name in methods if name + added in methods]:
            pair, line = (methods[name + ours], methods[name + other]), []
            for size in columns:
                first, second = (fidelity_db(method, size) for method in pair)
                gains += [first[clip] - second[clip] for clip in first.keys() & second.keys()]
                texts = [shown(cells_of(method, size)) for method in pair] if first and second else []
                line.append(f"{texts[0]} ({texts[1]})" if texts else "-")
            lines.append(f"| {row(name, model)} | {' | '.join(line)} |")
    clips = {clip for part in result["models"].values() for clip in part["masked"]}
    return "\n".join([
        *lines, "",
        f"PSNR to the uncached result inside the mask, {what}. Reference model, {len(clips)} held-out clips at most, "
        f"medians; on single clips the difference is {min(gains):+.1f} to {max(gains):+.1f} dB. {machines(result)}: "
        f"`{result['command']}`.",
    ])  # fmt: skip


def fidelity_db(method: dict[str, Any], size: str) -> dict[str, float]:
    """PSNR to the uncached result inside the mask, by clip of a mask size."""
    cells = {clip: cell for clip, cell in method["cells"].items() if mask_size(clip) == size and "failed" not in cell}
    return {clip: cell["fidelity"]["generative"]["psnr_db"] for clip, cell in cells.items()}


def head(*columns: str) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]


def by_mask(sizes: list[str]) -> list[str]:
    """What stands above the columns of mask sizes."""
    return [f"masks of {size} %" for size in sizes]


def of_size(cells: list[dict[str, Any]]) -> str:
    """Work, fidelity, quality."""
    if not cells:
        return "-"
    fidelity, quality = (figure(cells, what, "generative", "psnr_db") for what in ("fidelity", "quality"))
    speeds = [cell["speedup"] for cell in cells if "speedup" in cell]
    took = f"{median(cell['fewer_flops'] for cell in cells):.2f}x" + (f" ({median(speeds):.2f}x)" if speeds else "")
    same = "identical" if any("fidelity" in cell for cell in cells) else "-"
    shown = [f"{value:.1f}" if value is not None else same for value in (fidelity, quality)]
    return f"{took}; {shown[0]}; {shown[1]}"


def over_sizes(by_size: list[list[dict[str, Any]]], region: str, metric: str, digits: int) -> str:
    """The mean over mask sizes of the medians. Only where all sizes were measured, so that lines can be compared."""
    values = [figure(cells, "quality", region, metric) for cells in by_size]
    known = [value for value in values if value is not None]
    return f"{mean(known):.{digits}f}" if len(known) == len(values) else "-"
