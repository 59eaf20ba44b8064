"""The picture at the top of the README: a frame of the demo edit, its tokens, and the result uncached and cached.

python benchmarks/readme_picture.py     # about 6 minutes on two CPU cores; then: python benchmarks/tables.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from hetcache_compile import Calibration, Plan, reference
from hetcache_compile.edit.editing import EditRequest, make_plan, run_compiled, run_hetcache
from hetcache_compile.edit.media import Frames, tint
from hetcache_compile.edit.metrics import psnr
from hetcache_compile.files import atomically
from hetcache_compile.plan.preview import token_colours
from hetcache_compile.provenance import provenance

ROOT = Path(__file__).parent.parent
SCALE, GAP, BAR = 2, 8, 22


def frame_of_tokens(plan: Plan, video: Frames, frame: int) -> Frames:
    """A frame `[H, W, 3]` tinted by the kind of each token."""
    shown = round(frame * (plan.grid[0] - 1) / (len(video) - 1))
    colours = token_colours(plan)[shown] * 255
    height, width = video.shape[1:3]
    blocks = np.kron(colours, np.ones((height // plan.grid[1], width // plan.grid[2], 1)))
    return np.asarray(0.45 * video[frame] + 0.55 * blocks).round().astype(np.uint8)


def save_panels(path: Path, panels: dict[str, Frames]) -> None:
    """Pictures of one size beside each other, each with its title above."""
    height, width = (SCALE * size for size in next(iter(panels.values())).shape[:2])
    canvas = Image.new("RGB", ((width + GAP) * len(panels) - GAP, height + BAR), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (title, panel) in enumerate(panels.items()):
        left = number * (width + GAP)
        draw.text((left, 2), title, fill="black", font_size=15)
        canvas.paste(Image.fromarray(panel).resize((width, height), Image.Resampling.LANCZOS), (left, BAR))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomically(path, lambda temporary: canvas.save(temporary, format="png", optimize=True))


def result_of(plan: Plan, cached: Any, uncached: Any, mask: Any, edit: str, frame: int) -> dict[str, Any]:
    """What the caption says."""
    return {
        **provenance("cpu"),
        "edit": edit,
        "frame": frame,
        "num_tokens": plan.num_tokens,
        "schedule": plan.schedule,
        "steps": cached.stats.steps,
        "uncached_calls": len(uncached.seconds),
        "psnr_generative_db": psnr(cached.frames, uncached.frames, mask),
        "psnr_overall_db": psnr(cached.frames, uncached.frames),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edit", default="remove", choices=("remove", "replace"))
    parser.add_argument("--frame", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "edit.png")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "picture.json")
    options = parser.parse_args()
    clip, pipe = reference.demo_clip(options.edit), reference.load()
    assert clip.truth is not None
    request = EditRequest(
        clip.truth, clip.mask, clip.prompt,
        guidance_scale=reference.GUIDANCE_SCALE, max_sequence_length=reference.MAX_TEXT_LENGTH,
    )  # fmt: skip
    plan = make_plan(pipe, request, None, calibration=Calibration.load(reference.CALIBRATION))
    print(plan.describe())

    def progress(stage: str, step: int, steps: int) -> None:
        print(f"\r{stage}: {step} of {steps} steps", end="" if step < steps else "\n", flush=True)

    cached = run_hetcache(pipe, request, plan, "inductor", progress)
    uncached = run_compiled(pipe, request, "inductor", progress)
    assert cached.frames is not None
    assert uncached.frames is not None
    panels = {
        "input, mask in red": tint(clip.truth, clip.mask)[options.frame],
        "the plan's tokens": frame_of_tokens(plan, clip.truth, options.frame),
        "result, uncached": uncached.frames[options.frame],
        "result, cached": cached.frames[options.frame],
    }
    save_panels(options.out, panels)
    result = result_of(plan, cached, uncached, clip.mask, options.edit, options.frame)
    text = json.dumps(result, indent=1) + "\n"
    atomically(options.result, lambda temporary: Path(temporary).write_text(text))
    print(text)


if __name__ == "__main__":
    main()
