"""The forms of a model as plain functions: no session, no backend, the cache in your own hands.

On the inputs of the full step that made the cache, a partial and a reuse step give what the full step gave. Where
the inputs have changed inside the mask, a partial step follows: it computes the mask and its margin, and reads the
keys and values of all other tokens from the cache. A reuse step repeats what was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import WanTransformer3DModel

import hetcache_compile as hetcache

GRID = (3, 8, 8)
"""Tokens: this model makes one of a frame of 2 x 2 latents."""


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Print how far each form is from the plain model; relative errors by name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--change", type=float, default=0.5, help="how much the second latents differ, inside the mask")
    change = parser.parse_args(arguments).change

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=48, num_layers=2,
    ).eval()  # fmt: skip
    first = {
        "hidden_states": torch.randn(1, 4, 3, 16, 16),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 11, 16),
        "return_dict": False,
    }
    tokens = np.zeros(GRID, dtype=bool)
    tokens[:, 2:6, 1:5] = True
    plan = hetcache.Plan.from_mask(tokens, GRID, margin=1.0, multiple=1)
    mask = torch.from_numpy(tokens.repeat(2, axis=1).repeat(2, axis=2))
    latents = first["hidden_states"]
    second = {**first, "hidden_states": latents + change * mask * torch.randn_like(latents)}

    forms = hetcache.rewrite(model, plan, kwargs=first)

    full, cache = forms.full(**first)
    outputs = {
        "full": (full, model(**first)),
        "partial, same inputs": (forms.partial(cache, **first)[0], model(**first)),
        "reuse, same inputs": (forms.reuse(cache, **first)[0], model(**first)),
        "partial, new inputs": (forms.partial(cache, **second)[0], model(**second)),
        "reuse, new inputs": (forms.reuse(cache, **second)[0], model(**second)),
    }
    errors = {name: float((a - b).abs().max() / b.abs().max()) for name, ((a,), (b,)) in outputs.items()}

    print(plan.describe().splitlines()[0])
    print(f"cache: {', '.join(cache)}; {forms.cache_bytes} bytes")
    for name, error in errors.items():
        print(f"{name:22} relative error {error:.1e}")
    return errors


if __name__ == "__main__":
    main()
