"""How well the reference model inpaints clips that it never saw: the table of its model card.

    python benchmarks/reference/evaluate.py            # writes benchmarks/results/reference.json, goes on if cut short
    python benchmarks/tables.py                        # puts the figures into the model card

PSNR inside the mask against the true video, of the uncached sampler, of a fill with the mean colour of the known
pixels, and of OpenCV's Telea inpainting frame by frame.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from hetcache_compile import reference
from hetcache_compile.edit.editing import EditRequest, compiled, run_pipeline
from hetcache_compile.edit.media import Clip, Frames, stack_side_by_side, write_video
from hetcache_compile.edit.metrics import psnr
from hetcache_compile.files import atomically
from hetcache_compile.provenance import provenance

RESULT = Path(__file__).parents[1] / "results" / "reference.json"


def mean_fill(clip: Clip) -> Frames:
    """The mean colour of the known pixels of the whole clip."""
    colour = clip.video[~clip.mask].mean(axis=0).round().astype(np.uint8)
    return np.where(clip.mask[..., None], colour, clip.video)


def telea(clip: Clip) -> Frames:
    """Telea (2004) in each frame, radius 3."""
    pairs = zip(clip.video, clip.mask, strict=True)
    return np.stack([cv2.inpaint(frame, mask.astype(np.uint8), 3, cv2.INPAINT_TELEA) for frame, mask in pairs])


BASELINES: dict[str, Callable[[Clip], Frames]] = {"mean_fill": mean_fill, "telea": telea}


def evaluate(pipe: Any, clip: Clip, settings: dict[str, Any], videos: Path | None) -> dict[str, Any]:
    """PSNR in dB inside the mask, by method."""
    request = EditRequest(
        video=clip.video, mask=clip.mask, prompt=clip.prompt, max_sequence_length=reference.MAX_TEXT_LENGTH, **settings
    )
    frames = run_pipeline(pipe, request, clip.name, lambda *_: None).frames
    assert frames is not None
    assert clip.truth is not None
    results = {"sampler": frames, **{name: fill(clip) for name, fill in BASELINES.items()}}
    if videos:
        panels = [clip.video, *results.values(), clip.truth]
        write_video(videos / f"{clip.name}.mp4", stack_side_by_side(panels, ["input", *results, "truth"]))
    return {
        "caption": clip.prompt,
        "masked": float(clip.mask.mean()),
        "psnr_db": {name: psnr(result, clip.truth, clip.mask) for name, result in results.items()},
        "psnr_context_db": psnr(frames, clip.truth, ~clip.mask),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=12, help="held-out procedural clips, beside the real one")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--inner", default="inductor", help="torch.compile backend of the plain model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--videos", type=Path, help="folder for side-by-side videos")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    settings = {"num_inference_steps": options.steps, "guidance_scale": options.guidance, "seed": 0}
    belongs = {"settings": {**settings, "dtype": options.dtype}}
    result = {**provenance(options.device), **belongs, "clips": {}}
    if options.out.exists() and (before := json.loads(options.out.read_text()))["settings"] == belongs["settings"]:
        result = before
    pipe = reference.load(getattr(torch, options.dtype), options.device)
    with compiled(pipe, backend=options.inner):
        for clip in [*reference.held_out(options.clips), reference.real_clip()]:
            if clip.name not in result["clips"]:
                result["clips"][clip.name] = evaluate(pipe, clip, settings, options.videos)
                text = json.dumps(result, indent=2) + "\n"
                atomically(options.out, lambda temporary, text=text: Path(temporary).write_text(text))
            print(clip.name, json.dumps(result["clips"][clip.name]["psnr_db"]), flush=True)


if __name__ == "__main__":
    main()
