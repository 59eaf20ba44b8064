"""One edit on several devices: every process runs the same script.

    torchrun --nproc-per-node 2 examples/ranks.py                     # shares the tokens of every step
    torchrun --nproc-per-node 2 examples/ranks.py --guidance 2        # one call of guidance on each
    torchrun --nproc-per-node 4 examples/ranks.py --guidance 2        # both

It runs on GPUs with NCCL where there are as many as processes, else on CPUs with gloo. All random numbers come from
generators on the CPU: every process has to draw the same noise. The model has random weights: what counts is the
difference between the two runs.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch.distributed.device_mesh import init_device_mesh

import hetcache_compile as hetcache

GRID, SCALE, STEPS = (3, 8, 8), 3.0, 8


@torch.no_grad()
def sample(model: Any, device: str) -> torch.Tensor:
    """Denoise with guidance, in two calls a step."""
    generator = torch.Generator().manual_seed(1)
    cond, uncond = (torch.randn(1, 11, 16, generator=generator).to(device) for _ in range(2))
    latents = torch.randn(1, 4, 3, 16, 16, generator=generator).to(device)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    for time in scheduler.timesteps:
        with_text = model(latents, timestep=time[None].to(device), encoder_hidden_states=cond).sample
        without = model(latents, timestep=time[None].to(device), encoder_hidden_states=uncond).sample
        latents = scheduler.step(without + SCALE * (with_text - without), time, latents).prev_sample
    return latents


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print how far all processes together are from one alone; the same as a dict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidance", type=int, default=1, help="groups of processes that guidance is split over")
    guidance = parser.parse_args(arguments).guidance

    # A process that is lost ends the others within this time.
    dist.init_process_group(timeout=datetime.timedelta(minutes=5))
    rank, count = dist.get_rank(), dist.get_world_size()
    device = "cpu"
    if torch.cuda.device_count() >= count:
        torch.cuda.set_device(rank)
        device = "cuda"
    mesh = init_device_mesh(device, (guidance, count // guidance), mesh_dim_names=("guidance", "rows"))

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=48, num_layers=2,
    ).to(device).eval()  # fmt: skip
    tokens = np.zeros(GRID, dtype=bool)
    tokens[:, 2:6, 1:5] = True
    plan = hetcache.Plan.from_mask(tokens, GRID, num_inference_steps=STEPS, schedule="FRPR", extrapolation=1)

    # Leave `options` out where speed counts: then Inductor compiles the forms.
    compiled = torch.compile(model, backend=hetcache.hetcache_backend, options={"inner": "eager"})
    with hetcache.session(plan):
        alone = sample(compiled, device)
    with hetcache.parallel(mesh), hetcache.session(plan) as session:
        together = sample(compiled, device)

    error = float((together - alone).norm() / alone.norm())
    if rank == 0:
        print(f"{count} processes; model calls by kind: {session.stats.steps}")
        print(f"cache of this process: {session.stats.cache_bytes} bytes")
        print(f"relative difference to one process: {error:.1e}")
    dist.destroy_process_group()
    return {"steps": session.stats.steps, "error": error}


if __name__ == "__main__":
    main()
