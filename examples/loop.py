"""A sampling loop of your own, with guidance in two calls a step.

Each of the two needs a cache of its own, so each has a name: `session.branch("cond")` and `session.branch("uncond")`.
diffusers' pipelines name their calls themselves. The model has random weights: what counts is the difference between
the two runs.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

import hetcache_compile as hetcache

GRID, GUIDANCE = (3, 8, 8), 3.0
"""Tokens: this model makes one of a frame of 2 x 2 latents."""


@torch.no_grad()
def sample(model: Any, video: torch.Tensor, mask: torch.Tensor, steps: int, branch: Any) -> torch.Tensor:
    """Denoise what is masked; the rest is the known video, at the noise level of each step."""
    generator = torch.Generator().manual_seed(1)
    text = {name: torch.randn(1, 11, 16, generator=generator) for name in ("cond", "uncond")}
    noise = torch.randn(video.shape, generator=generator)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    latents, outputs = noise, {}
    for time in scheduler.timesteps:
        latents = torch.where(mask, latents, scheduler.scale_noise(video, time[None], noise))
        for name, tokens in text.items():
            with branch(name):
                outputs[name] = model(latents, timestep=time[None], encoder_hidden_states=tokens).sample
        guided = outputs["uncond"] + GUIDANCE * (outputs["cond"] - outputs["uncond"])
        latents = scheduler.step(guided, time, latents).prev_sample
    return torch.where(mask, latents, video)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print what the session ran and how far its result is from the plain one; the same as a dict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args(arguments).steps

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=48, num_layers=2,
    ).eval()  # fmt: skip
    video = torch.randn(1, 4, 3, 16, 16)
    tokens = np.zeros(GRID, dtype=bool)
    tokens[:, 2:6, 1:5] = True
    mask = torch.from_numpy(tokens.repeat(2, axis=1).repeat(2, axis=2))

    plain = sample(model, video, mask, steps, lambda name: contextlib.nullcontext())
    # Leave `options` out where speed counts: then Inductor compiles the forms.
    compiled = torch.compile(model, backend=hetcache.hetcache_backend, options={"inner": "eager"})
    plan = hetcache.Plan.from_mask(
        tokens, GRID, num_inference_steps=steps, schedule="FRPR", margin=1.0, extrapolation=1
    )
    with hetcache.session(plan) as session:
        cached = sample(compiled, video, mask, steps, session.branch)

    error = float((cached - plain).norm() / plain.norm())
    print(plan.describe())
    print(f"model calls by kind: {session.stats.steps}; caches of both branches: {session.stats.cache_bytes} bytes")
    print(f"relative difference to the plain loop: {error:.1e}")
    return {"steps": session.stats.steps, "cache_bytes": session.stats.cache_bytes, "error": error}


if __name__ == "__main__":
    main()
