"""`plan.png`: the partition over the frames, and the step kinds over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import atomically
from .partition import TokenKind
from .plan import Plan
from .schedule import StepKind

TOKEN_COLOURS = {
    TokenKind.GENERATIVE: "#d1495b",
    TokenKind.MARGIN: "#edae49",
    TokenKind.CONTEXT: "#c8d5dc",
}
ACTIVE_CONTEXT = "#30638e"
STEP_COLOURS = {StepKind.FULL: "#003d5b", StepKind.PARTIAL: "#30638e", StepKind.REUSE: "#c8d5dc"}
MOST_FRAMES = 9
LEAST_WIDTH = 6.4
"""Of the figure, in inches: the legends take it."""
DPI = 130


def save_preview(plan: Plan, path: Path) -> None:
    """Draw the plan into a PNG, atomically."""
    figure = draw(plan)
    atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def preview_pixels(plan: Plan) -> NDArray[np.uint8]:
    """The same picture as uint8 `[H, W, 3]`."""
    canvas = draw(plan).canvas
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def draw(plan: Plan) -> Any:
    """The plan as a figure of matplotlib, on a canvas that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    frames = np.unique(np.linspace(0, plan.grid[0] - 1, MOST_FRAMES).round().astype(int))
    above = 2.5 if len(frames) > 1 else 4.5  # a picture alone has room
    size = max(LEAST_WIDTH, 1.35 * len(frames) + 1.2), above + 1.9
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=[above, 2])
    top, bottom = parts
    axes = np.atleast_1d(top.subplots(1, len(frames)))
    colours = token_colours(plan)
    for axis, frame in zip(axes, frames, strict=True):
        axis.imshow(colours[frame], interpolation="nearest")
        axis.set(xticks=[], yticks=[], title=f"t' = {frame}")
        axis.title.set_fontsize(8)
    patches = [Patch(color=colour, label=kind.name.lower()) for kind, colour in TOKEN_COLOURS.items()]
    patches.append(Patch(color=ACTIVE_CONTEXT, label="context, active"))
    top.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    top.suptitle(
        f"{plan.num_tokens} tokens, M = {plan.num_active} active "
        f"({plan.num_active / plan.num_tokens:.0%}), C = {plan.num_context} cached",
        fontsize=10,
    )
    _draw_steps(plan, bottom.subplots())
    return figure


def token_colours(plan: Plan) -> np.ndarray[Any, np.dtype[np.float64]]:
    """RGB `[T', H', W', 3]`: the kind of each token; active context in a colour of its own."""
    from matplotlib.colors import to_rgb

    colours = np.array([to_rgb(TOKEN_COLOURS[kind]) for kind in TokenKind])[plan.token_kind]
    active = np.zeros(plan.num_tokens, dtype=bool)
    active[plan.active_index] = True
    colours[active & (plan.token_kind == TokenKind.CONTEXT)] = to_rgb(ACTIVE_CONTEXT)
    return np.asarray(colours.reshape(*plan.grid, 3))


def _draw_steps(plan: Plan, axis: Any) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    heights = {StepKind.FULL: 1.0, StepKind.PARTIAL: 0.6, StepKind.REUSE: 0.25}
    for step, kind in enumerate(plan.steps):
        axis.bar(step, heights[kind], width=0.9, color=STEP_COLOURS[kind])
    counts = {kind: plan.steps.count(kind) for kind in StepKind}
    handles = [Patch(color=STEP_COLOURS[k], label=f"{k.name} x {n}") for k, n in counts.items()]
    if plan.distances.any():
        right = axis.twinx()
        handles += right.plot(plan.distances, ".-", color="#d1495b", label="change of the time embedding")
        right.set_ylim(bottom=0)
    axis.set(xlabel="step", yticks=[], xlim=(-0.6, len(plan.steps) - 0.4), ylim=(0, 1.1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(handles=handles, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8, frameon=False)
