"""An exported engine in place of a model: export, load, run inside a session. It needs the extra `ort`.

This is `hetcache-export` on a folder with a tiny model, and onnxruntime on the CPU. The result equals that of the
compiled model. In a pipeline, `pipe.transformer = engine.load(...)` is all there is to do.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

import hetcache_compile as hetcache
from hetcache_compile import engine

GRID, TEXT_TOKENS = (2, 6, 6), 11
"""Tokens: this model makes one of a frame of 2 x 2 latents."""


@torch.no_grad()
def sample(model: Any, plan: hetcache.Plan) -> tuple[torch.Tensor, dict[str, int]]:
    """The denoised latents, and the model calls by kind."""
    scheduler, generator = FlowMatchEulerDiscreteScheduler(shift=3.0), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(len(plan.steps))
    latents = torch.randn(1, 4, 2, 12, 12, generator=generator)
    text = torch.randn(1, TEXT_TOKENS, 16, generator=generator)
    with hetcache.session(plan) as session:
        for time in scheduler.timesteps:
            output = model(hidden_states=latents, timestep=time[None], encoder_hidden_states=text).sample
            latents = scheduler.step(output, time, latents).prev_sample
    return latents, session.stats.steps


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print what was exported and how far the engine is from the compiled model; the same as a dict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    steps = parser.parse_args(arguments).steps

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=48, num_layers=1,
    ).eval()  # fmt: skip
    mask = np.zeros(GRID, dtype=bool)
    mask[:, 1:4, 1:4] = True
    plan = hetcache.Plan.from_mask(mask, GRID, num_inference_steps=steps, schedule="FRPR", margin=1.0, multiple=1)

    with tempfile.TemporaryDirectory() as folder:
        checkpoint, plan_file, out = (Path(folder) / name for name in ("model", "edit.hetplan", "engine"))
        model.save_pretrained(checkpoint)
        plan.save(plan_file)
        # hetcache-export MODEL --plan PLAN --out ENGINE --text-tokens 11 --no-baseline
        command = [sys.executable, "-m", "hetcache_compile.export.cli", checkpoint, "--plan", plan_file, "--out", out]
        subprocess.run([*command, "--text-tokens", str(TEXT_TOKENS), "--no-baseline"], check=True)
        actual, kinds = sample(engine.load(out, provider="ort-cpu"), plan)
    compiled = torch.compile(model, backend=hetcache.hetcache_backend, options={"inner": "eager"})
    expected, _ = sample(compiled, plan)
    error = float((actual - expected).abs().max() / expected.abs().max())
    print(plan.describe())
    print(f"model calls by kind: {kinds}")
    print(f"relative difference of the engine to the compiled model: {error:.1e}")
    return {"steps": kinds, "error": error}


if __name__ == "__main__":
    main()
