"""Put benchmarks/results/drift.json into docs/: the plots, and the figures of docs/drift.md between their markers.

python benchmarks/drift_page.py           # rewrites docs/drift*.png and docs/drift.md
python benchmarks/drift_page.py --check   # exits 1 if docs/drift.md is out of date
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from drift_measures import ORDERS
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray
from scipy.stats import spearmanr

from hetcache_compile import Calibration, reference
from hetcache_compile.files import atomically
from hetcache_compile.plan.partition import TokenKind

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MARKER = re.compile(r"(<!-- v:(\w+) -->).*?(<!-- / -->)", re.DOTALL)
MIDDLE = slice(10, 40)
"""Steps 11 to 40 of 50: neither the first nor the last ones, which are unlike all others."""
ENDING = 10
COLOURS = {"generative": "#D55E00", "margin": "#E69F00", "context": "#0072B2"}
LINES = ("-", "--", ":", "-.")
GREEN, GREY = "#009E73", "#666666"


class Study:
    """The result with its arrays as arrays, and their axes by name."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result, self.axes = result, result["axes"]
        self.mean = {name: np.array(values, dtype=float) for name, values in result["mean"].items()}
        self.sigmas = np.array(result["sigmas"])
        self.distances = np.array(result["distances"])
        self.steps = np.arange(1, len(self.sigmas) + 1)

    def change(self, quantity: str, lag: int) -> NDArray[np.float64]:
        """`[blocks, S, kinds]`."""
        return self.mean["change"][self.axes["quantities"].index(quantity), :, self.axes["lags"].index(lag)]

    def line(self, quantity: str, gap: int) -> NDArray[np.float64]:
        """`[blocks, S, kinds]`."""
        return self.mean["line"][self.axes["predicted"].index(quantity), :, self.axes["gaps"].index(gap)]

    def prediction(self, gap: int, order: int, time: int = 0) -> NDArray[np.float64]:
        """`[S, kinds]`."""
        return self.mean["prediction"][time, self.axes["lags"].index(gap), order]

    def latent_error(self, gap: int, order: int) -> NDArray[np.float64]:
        """`[S, kinds]`."""
        return self.mean["latent_error"][self.axes["lags"].index(gap), order]

    def share(self, curve: NDArray[np.float64], x: float) -> NDArray[np.float64]:
        """Where a curve over `shares` is at x."""
        return curve[..., self.axes["shares"].index(x)]


def figures(study: Study) -> dict[str, str]:
    """Every figure that docs/drift.md shows, by its marker's name."""
    about_study = {**setting(study), **about_steps(study), **about_caches(study), **about_attention(study)}
    return {**about_study, **outputs(study), **about_amplification(Calibration.load(reference.CALIBRATION))}


def setting(study: Study) -> dict[str, str]:
    result = study.result
    masked = [clip["masked"] for clip in result["clips"].values()]
    return {
        "clips": str(len(masked)),
        "smallest_mask": percent(min(masked)),
        "largest_mask": percent(max(masked)),
        "steps": str(len(study.steps)),
        "command": f"`python benchmarks/{result['command']}`",
        "machine": f"{result['processor']}, torch {result['versions']['torch']}, weights {result['weights']}",
    }


def about_steps(study: Study) -> dict[str, str]:
    """How change and error are spread over the run."""
    change = study.prediction(1, 0)[:, TokenKind.GENERATIVE]
    error = study.latent_error(4, 0)[:, TokenKind.GENERATIVE]
    values = study.change("value", 1)[..., TokenKind.CONTEXT].mean(axis=0)
    known = np.nan_to_num(error)
    lengths = -np.diff(study.sigmas, append=0.0)
    return {
        "output_second": percent(change[1]),
        "output_middle": percent(np.median(change[MIDDLE])),
        "output_last": percent(change[-1]),
        "output_before_last": percent(change[-2]),
        "latent_middle": f"{np.median(error[MIDDLE]):.4f}",
        "latent_worst": f"{error.max(where=~np.isnan(error), initial=0):.4f}",
        "latent_worst_step": str(int(known.argmax()) + 1),
        "teacache_rank": f"{spearmanr(study.distances[1:], change[1:]).statistic:.2f}",
        "teacache_values_rank": f"{spearmanr(study.distances[1:], values[1:]).statistic:.2f}",
        "teacache_ending": percent(study.distances[-ENDING:].sum() / study.distances.sum()),
        "ending": str(ENDING),
        "latent_ending": percent(known[-ENDING:].sum() / known.sum()),
        "last_sigma": f"{study.sigmas[-1]:.3f}",
        "last_length": f"{lengths[-1]:.3f}",
        "longest_length": f"{lengths.max():.3f}",
    }


def about_caches(study: Study) -> dict[str, str]:
    """How fast keys and values age."""
    values = {}
    for quantity in study.axes["quantities"]:
        for kind in TokenKind:
            values[f"{quantity}_{kind.name.lower()}_1"] = percent(middle(study.change(quantity, 1))[:, kind].mean())
    for quantity in study.axes["predicted"]:
        for age in (2, 4, 8):
            values[f"{quantity}_context_{age}"] = percent(
                middle(study.change(quantity, age))[:, TokenKind.CONTEXT].mean()
            )
        held = middle(study.change(quantity, 4))[:, TokenKind.CONTEXT]
        drawn = middle(study.line(quantity, 4))[:, TokenKind.CONTEXT]
        values[f"{quantity}_line_4"] = percent(drawn.mean())
        values[f"{quantity}_line_gain"] = f"{held.mean() / drawn.mean():.1f}"
        ending = [
            array[:, -5:, TokenKind.CONTEXT].mean() for array in (study.change(quantity, 4), study.line(quantity, 4))
        ]
        values[f"{quantity}_ending_hold"], values[f"{quantity}_ending_line"] = (percent(x) for x in ending)
        slowest, fastest = held.argmin(), held.argmax()
        values[f"{quantity}_slowest"] = f"{study.axes['blocks'][slowest]} ({percent(held[slowest])})"
        values[f"{quantity}_fastest"] = f"{study.axes['blocks'][fastest]} ({percent(held[fastest])})"
    return values


def about_attention(study: Study) -> dict[str, str]:
    """Where the mass is, and how many context tokens hold it."""
    clips = study.result["clips"].values()
    tokens = np.array([np.array(clip["tokens"]) / sum(clip["tokens"]) for clip in clips]).mean(axis=0)
    mass = study.mean["mass"].mean(axis=(0, 1))
    by_clip = [clip["mass"][TokenKind.CONTEXT] for clip in clips]
    values = {"mass_context_min": percent(min(by_clip)), "mass_context_max": percent(max(by_clip))}
    for kind in TokenKind:
        values[f"mass_{kind.name.lower()}"] = percent(mass[kind])
        values[f"tokens_{kind.name.lower()}"] = percent(tokens[kind])
    for x in (0.1, 0.2, 0.5, 0.7):
        values[f"shared_{x:.0%}"[:-1]] = percent(study.share(study.mean["shared_curve"], x).mean())
        values[f"nearest_{x:.0%}"[:-1]] = percent(study.share(study.mean["nearest_curve"], x).mean())
        values[f"own_{x:.0%}"[:-1]] = percent(study.share(study.mean["curve"], x).mean())
    context = study.mean["mass"][:, :, TokenKind.CONTEXT].mean(axis=0)
    for x in (0.1, 0.5):
        held = study.share(study.mean["shared_curve"], x).mean()
        values[f"lost_{x:.0%}"[:-1]] = percent((1 - held) * context.mean())
    values["mass_context_least"] = f"{study.axes['blocks'][context.argmin()]} ({percent(context.min())})"
    values["mass_context_most"] = f"{study.axes['blocks'][context.argmax()]} ({percent(context.max())})"
    best = study.share(study.mean["shared_curve"], study.axes["top"])
    for i, lag in enumerate(study.axes["lags"]):
        values[f"fresh_{lag}"] = percent(best[lag:].mean(), 1)
        values[f"overlap_{lag}"] = percent(np.nanmean(study.mean["overlap"][1, i]))
        values[f"stale_{lag}"] = percent(np.nanmean(study.mean["stale"][i]), 1)
    return values


def about_amplification(calibration: Calibration) -> dict[str, str]:
    """What later steps make of an error, from the calibration that is shipped."""
    amplification = calibration.amplification_at(calibration.timesteps)
    values = {"amplified_clips": str(len(calibration.clips)), "amplified_steps": str(calibration.num_steps)}
    for name, share in (("early", 0.04), ("third", 0.36), ("late", 0.85)):
        step = int(min(calibration.probes, key=lambda probe: abs(probe - share * calibration.num_steps)))
        values[f"amplified_step_{name}"] = str(step)
        for kind in (TokenKind.GENERATIVE, TokenKind.CONTEXT):
            values[f"amplified_{kind.name.lower()}_{name}"] = f"{amplification[kind, step]:.2g}"
    return values


def outputs(study: Study) -> dict[str, str]:
    """What predicting the output costs in the middle of the run, where every order is known."""
    values = {}
    for gap in study.axes["lags"]:
        known = slice(max(MIDDLE.start, (max(ORDERS) + 1) * gap), MIDDLE.stop)
        for kind in (TokenKind.GENERATIVE, TokenKind.CONTEXT):
            for order in ORDERS:
                for time, suffix in enumerate(("", "_step")):
                    error = np.median(study.prediction(gap, order, time)[known, kind])
                    values[f"{kind.name.lower()}_{gap}_o{order}{suffix}"] = percent(error, 2)
    return values


def middle(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[blocks, S, kinds]` as `[blocks, kinds]`: medians over the middle of the run."""
    return np.asarray(np.nanmedian(array[:, MIDDLE], axis=1))


def percent(value: float, digits: int | None = None) -> str:
    """A share; below 10 % with a digit more, if not told."""
    if digits is None:
        digits = 0 if value >= 0.1 else 1
    return f"{value:.{digits}%}".replace("%", " %")


def plot_steps(study: Study, axes: Any) -> None:
    """Change since the last step, over the run."""
    panels = {
        "keys, mean over blocks": study.change("key", 1).mean(axis=0),
        "values, mean over blocks": study.change("value", 1).mean(axis=0),
        "the model's output": study.prediction(1, 0),
    }
    for axis, (title, change) in zip(axes, panels.items(), strict=True):
        for (kind, colour), style in zip(COLOURS.items(), LINES, strict=False):
            axis.plot(study.steps, 100 * change[:, TokenKind[kind.upper()]], style, color=colour, label=kind)
        axis.set(title=title, xlabel="step")
        log_scale(axis)
    axes[2].plot(
        study.steps, 100 * np.where(study.distances, study.distances, np.nan), color=GREEN, label="time embedding"
    )
    axes[2].legend(frameon=False)
    axes[0].set_ylabel("change since the last step (%)")
    axes[0].legend(frameon=False)


def log_scale(axis: Any) -> None:
    """A logarithmic axis that is labelled in plain numbers."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def plot_blocks(study: Study, axes: Any) -> None:
    """How wrong keys and values of context tokens are that are four steps old, by block."""
    names = study.axes["blocks"]
    at = np.arange(len(names))
    for axis, quantity in zip(axes, study.axes["predicted"], strict=True):
        bars = {
            "generative, as they were": (study.change(quantity, 4), TokenKind.GENERATIVE, COLOURS["generative"]),
            "context, as they were": (study.change(quantity, 4), TokenKind.CONTEXT, COLOURS["context"]),
            "context, on the straight line": (study.line(quantity, 4), TokenKind.CONTEXT, GREEN),
        }
        for i, (label, (array, kind, colour)) in enumerate(bars.items()):
            axis.bar(at + 0.27 * (i - 1), 100 * middle(array)[:, kind], 0.25, color=colour, label=label)
        axis.set_xticks(at, names, rotation=40, ha="right", rotation_mode="anchor")
        axis.set_title(f"{quantity}s, four steps old")
    axes[0].set_ylabel("error, steps 11 to 40 (%)")
    axes[0].legend(frameon=False)


def plot_attention(study: Study, axes: Any) -> None:
    """Mass by kind and block; how few context tokens hold how much; how long the best ones stay the best."""
    names, mass = study.axes["blocks"], study.mean["mass"].mean(axis=0)
    bottom = np.zeros(len(names))
    for kind, colour in COLOURS.items():
        part = 100 * mass[:, TokenKind[kind.upper()]]
        axes[0].bar(names, part, bottom=bottom, color=colour, label=kind)
        bottom += part
    axes[0].set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes[0].set(title="generative queries' attention", ylabel="mass (%)", ylim=(0, 118), yticks=range(0, 101, 20))
    axes[0].legend(frameon=False, loc="upper center", ncols=3, columnspacing=1, handlelength=1)
    shares = 100 * np.array(study.axes["shares"])
    for own in study.mean["curve"]:
        axes[1].plot(shares, 100 * own, color=GREY, alpha=0.4, linewidth=0.8)
    axes[1].plot([], [], color=GREY, alpha=0.6, label="a block's own best")
    axes[1].plot(
        shares,
        100 * study.mean["shared_curve"].mean(axis=0),
        "-o",
        color=COLOURS["context"],
        label="best for all blocks",
    )
    axes[1].plot(
        shares,
        100 * study.mean["nearest_curve"].mean(axis=0),
        "--s",
        color=COLOURS["generative"],
        label="nearest to the mask",
    )
    axes[1].plot([0, 100], [0, 100], ":", color="black", label="at random")
    axes[1].set(title="context tokens", xlabel="tokens kept (%)", ylabel="context mass held (%)")
    axes[1].legend(frameon=False, loc="lower right")
    for i, (lag, style) in enumerate(zip(study.axes["lags"], LINES, strict=True)):
        axes[2].plot(
            study.steps, 100 * study.mean["overlap"][1, i], style, color=COLOURS["context"], label=f"{lag} ago"
        )
    axes[2].set(
        title=f"best {study.axes['top']:.0%} of the context", xlabel="step", ylabel="still the best (%)", ylim=(0, 101)
    )
    axes[2].legend(frameon=False, title="chosen so many steps", loc="lower left")


def plot_prediction(study: Study, axes: Any) -> None:
    """Predicted outputs of context tokens, and what repeating costs in the latents."""
    for axis, gap in zip(axes, (1, 4), strict=False):
        for order, style in zip(ORDERS, LINES, strict=False):
            colour = (GREY, COLOURS["context"], COLOURS["generative"])[order]
            error = study.prediction(gap, order)[:, TokenKind.CONTEXT]
            axis.plot(study.steps, 100 * error, style, color=colour, label=f"order {order}")
        axis.set(title=f"context output, computed steps {gap} apart", xlabel="step")
        log_scale(axis)
    axes[0].set_ylabel("error (%)")
    axes[0].legend(frameon=False)
    for kind in ("generative", "context"):
        for order, style in zip((0, 1), LINES, strict=False):
            error = study.latent_error(4, order)[:, TokenKind[kind.upper()]]
            axes[2].plot(study.steps, error, style, color=COLOURS[kind], label=f"{kind}, order {order}")
    axes[2].set(
        title="one step, 4 steps after the last", xlabel="step", ylabel="added to the latents (RMS)", yscale="log"
    )
    axes[2].legend(frameon=False)


PLOTS = {
    "drift-steps": (plot_steps, 3),
    "drift-caches": (plot_blocks, 2),
    "drift-attention": (plot_attention, 3),
    "drift-prediction": (plot_prediction, 3),
}


def draw(study: Study) -> None:
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    for name, (plot, panels) in PLOTS.items():
        figure, axes = plt.subplots(1, panels, figsize=(11, 3.4), layout="constrained")
        plot(study, axes)
        for axis in axes:
            axis.grid(alpha=0.2)
        path = DOCS / f"{name}.png"
        atomically(
            path, lambda temporary, f=figure: f.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
        )
        plt.close(figure)


def fill(page: str, values: dict[str, str]) -> str:
    """The page with the figures between its markers; a marker without a figure is an error."""
    unknown = {match[2] for match in MARKER.finditer(page)} - values.keys()
    assert not unknown, f"docs/drift.md has markers for figures that do not exist: {', '.join(sorted(unknown))}"
    return MARKER.sub(lambda match: match[1] + values[match[2]] + match[3], page)


def main() -> None:
    study = Study(json.loads((ROOT / "benchmarks" / "results" / "drift.json").read_text()))
    path = DOCS / "drift.md"
    page = path.read_text()
    filled = fill(page, figures(study))
    if "--check" in sys.argv:
        sys.exit(filled != page)
    draw(study)
    atomically(path, lambda temporary: Path(temporary).write_text(filled))


if __name__ == "__main__":
    main()
