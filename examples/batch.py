"""A batch in which each sample has a mask of its own: a session takes one plan for each.

Both masks need equal budgets, since a batch has one graph: `multiple` rounds the number of active tokens up.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

import hetcache_compile as hetcache

GRID = (3, 10, 10)
"""Tokens: this model makes one of a frame of 2 x 2 latents."""


def plan_of(row: int, column: int, size: int, steps: int) -> hetcache.Plan:
    """A plan for a square mask, by its first corner, in tokens."""
    mask = np.zeros(GRID, dtype=bool)
    mask[:, row : row + size, column : column + size] = True
    return hetcache.Plan.from_mask(mask, GRID, num_inference_steps=steps, schedule="FRPR", margin=1.0, multiple=64)


@torch.no_grad()
def sample(model: Any, noise: torch.Tensor, text: torch.Tensor, steps: int) -> torch.Tensor:
    """Denoise a batch."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    latents = noise
    for time in scheduler.timesteps:
        output = model(latents, timestep=time.expand(len(latents)), encoder_hidden_states=text).sample
        latents = scheduler.step(output, time, latents).prev_sample
    return latents


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print how far each sample of the batch is from the run of it alone; the same as a dict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    steps = parser.parse_args(arguments).steps

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=48, num_layers=2,
    ).eval()  # fmt: skip
    noise, text = torch.randn(2, 4, 3, 20, 20), torch.randn(2, 11, 16)
    plans = [plan_of(0, 0, 4, steps), plan_of(3, 4, 4, steps)]
    # Leave `options` out where speed counts: then Inductor compiles the forms.
    compiled = torch.compile(model, backend=hetcache.hetcache_backend, options={"inner": "eager"})

    with hetcache.session(plans) as session:
        together = sample(compiled, noise, text, steps)
    errors = []
    for number, plan in enumerate(plans):
        print(f"sample {number}: {plan.describe().splitlines()[0]}")
        with hetcache.session(plan):
            alone = sample(compiled, noise[number : number + 1], text[number : number + 1], steps)
        errors.append(float((together[number] - alone[0]).abs().max() / alone.abs().max()))
    plain = sample(model, noise, text, steps)
    moved = float((together - plain).norm() / plain.norm())
    print(f"model calls by kind: {session.stats.steps}")
    print(f"relative difference of each sample to the run of it alone: {errors[0]:.1e}, {errors[1]:.1e}")
    print(f"relative difference to the plain model: {moved:.1e}")
    return {"steps": session.stats.steps, "errors": errors, "moved": moved}


if __name__ == "__main__":
    main()
