"""An unmodified diffusers pipeline: compile its model, make a plan for the call, run the call in a session.

The pipeline is diffusers' `WanVACEPipeline` with the small trained model that comes with this package, on a clip that
the model has never seen. It fills what the mask hides.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import hetcache_compile as hetcache
from hetcache_compile import reference
from hetcache_compile.edit.media import to_pictures
from hetcache_compile.edit.metrics import psnr


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the times of each kind of step and how far the result is from the plain one; the same as a dict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--frames", type=int, default=9, help="1 and a multiple of 4, at most 17")
    parser.add_argument("--inner", default="eager", help="compiler of the forms; inductor is faster, but takes longer")
    given = parser.parse_args(arguments)

    pipe, clip = reference.load(), reference.procedural_clip(1)
    video, mask, truth = clip.video[: given.frames], clip.mask[: given.frames], clip.truth[: given.frames]
    size = {"height": reference.SIZE, "width": reference.SIZE, "num_frames": given.frames}

    def edit() -> np.ndarray:
        frames = pipe(
            prompt=clip.prompt, video=to_pictures(video), mask=to_pictures(mask), num_inference_steps=given.steps,
            guidance_scale=1.0, max_sequence_length=reference.MAX_TEXT_LENGTH, output_type="np",
            generator=torch.Generator().manual_seed(0), **size,
        ).frames[0]  # fmt: skip
        return (frames * 255).round().astype(np.uint8)

    plain = edit()
    plan = hetcache.plan_for(pipe, mask=mask, num_inference_steps=given.steps, schedule="FRPR", **size)
    pipe.transformer = torch.compile(
        pipe.transformer, backend=hetcache.hetcache_backend, options={"inner": given.inner}
    )
    with hetcache.session(plan) as session:
        cached = edit()

    stats = session.stats
    print(plan.describe())
    for kind, seconds in stats.seconds.items():
        print(f"{stats.steps[kind]} x {kind:8} {1000 * seconds:7.1f} ms")
    print(f"cache: {stats.cache_bytes / 2**20:.1f} MiB")
    fidelity = psnr(cached, plain)
    quality = {"plain": psnr(plain, truth, mask), "cached": psnr(cached, truth, mask)}
    print(f"PSNR of the cached result to the plain one: {fidelity:.1f} dB")
    print(f"PSNR to the truth inside the mask: plain {quality['plain']:.1f} dB, cached {quality['cached']:.1f} dB")
    return {"steps": stats.steps, "seconds": stats.seconds, "fidelity": fidelity, **quality}


if __name__ == "__main__":
    main()
