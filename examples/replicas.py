"""Many edits on several devices: a process with a replica of the model for each, which edits one batch after the other.

    python examples/replicas.py --devices cuda:0 cuda:1
    python examples/replicas.py                               # two replicas on the CPU

An edit is a plan and what it is an edit of. Edits whose plans have equal budgets and steps share a batch: a session
takes one plan for each of its samples. A server would put `edits_of` behind its queue; nothing else here would change.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

import hetcache_compile as hetcache

GRID, STEPS = (3, 10, 10), 4
"""Tokens: this model makes one of a frame of 2 x 2 latents."""


@dataclass(frozen=True)
class Edit:
    """What a client asks for; here noise and text come from a seed."""

    plan: hetcache.Plan
    seed: int


DEVICE: list[str] = []
"""That of this process, once `start` has taken one."""


def start(devices: Any) -> None:
    """Begin a process: take one of the devices that wait in a queue."""
    DEVICE.append(devices.get())
    torch.set_num_threads(1)


@functools.cache
def model_on(device: str) -> Any:
    """The replica of this process, compiled."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=48, num_layers=2,
    ).to(device).eval()  # fmt: skip
    # Leave `options` out where speed counts: then Inductor compiles the forms.
    return torch.compile(model, backend=hetcache.hetcache_backend, options={"inner": "eager"})


@torch.no_grad()
def edits_of(edits: Sequence[Edit], device: str | None = None) -> tuple[str, np.ndarray]:
    """Edit a batch on a device, by default that of this process; returns who did it, and the latents."""
    device = device or DEVICE[0]
    generators = [torch.Generator().manual_seed(edit.seed) for edit in edits]
    latents = torch.stack([torch.randn(4, 3, 20, 20, generator=one) for one in generators]).to(device)
    text = torch.stack([torch.randn(11, 16, generator=one) for one in generators]).to(device)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    with hetcache.session([edit.plan for edit in edits]):
        for time in scheduler.timesteps:
            times = time.expand(len(latents)).to(device)
            output = model_on(device)(latents, timestep=times, encoder_hidden_states=text).sample
            latents = scheduler.step(output, time, latents).prev_sample
    return f"process {os.getpid()} on {device}", latents.cpu().numpy()


def batches_of(edits: Sequence[Edit], size: int) -> Iterator[list[Edit]]:
    """Batches of at most `size` edits whose plans can share a session."""
    alike: defaultdict[Any, list[Edit]] = defaultdict(list)
    for edit in edits:
        alike[edit.plan.batch_key].append(edit)
    for several in alike.values():
        yield from (several[start : start + size] for start in range(0, len(several), size))


def plan_of(row: int, column: int, size: int) -> hetcache.Plan:
    """A plan for a square mask, by its first corner, in tokens."""
    mask = np.zeros(GRID, dtype=bool)
    mask[:, row : row + size, column : column + size] = True
    return hetcache.Plan.from_mask(mask, GRID, num_inference_steps=STEPS, schedule="FRPR", margin=1.0, multiple=64)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print which replica ran which edits, and how far they are from an edit alone; the same as a dict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=["cpu", "cpu"])
    devices = parser.parse_args(arguments).devices

    squares = [(0, 0, 4), (3, 4, 4), (0, 0, 7), (2, 2, 7), (5, 5, 4), (1, 5, 4)]
    edits = [Edit(plan_of(*square), seed) for seed, square in enumerate(squares)]
    batches = list(batches_of(edits, size=2))
    context = multiprocessing.get_context("spawn")
    waiting = context.Queue()
    for device in devices:
        waiting.put(device)
    ran = []
    with ProcessPoolExecutor(len(devices), context, start, (waiting,)) as replicas:
        for batch, (replica, latents) in zip(batches, replicas.map(edits_of, batches), strict=True):
            alone = [edits_of([edit], devices[0])[1][0] for edit in batch]
            error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(latents, alone, strict=True))
            numbers, budget = [edit.seed for edit in batch], batch[0].plan.num_active
            print(f"{replica}: edits {numbers}, M = {budget}; difference to each alone: {error:.1e}")
            ran.append({"replica": replica, "edits": numbers, "error": error})
    return {"batches": ran}


if __name__ == "__main__":
    main()
