"""Transformers that stand inside a UNet; they denoise nothing alone, but they are exported like the others."""

from __future__ import annotations

from typing import Any

from diffusers import Transformer2DModel, TransformerTemporalModel
from diffusers.models.transformers import DreamLiteTransformer2DModel, DualTransformer2DModel

from .entry import IMAGE, VIDEO, Draw, Entry, image, seeded, text_mask

TEXT = 11
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1}
CONTINUOUS: dict[str, Any] = {**HEADS, "in_channels": 10, "norm_num_groups": 5, "cross_attention_dim": 13}
PATCHED: dict[str, Any] = {
    **HEADS,
    "in_channels": 5,
    "cross_attention_dim": 24,
    "sample_size": 14,
    "patch_size": 2,
    "num_embeds_ada_norm": 29,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "caption_channels": 13,
}


def continuous(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": image(draw, 10, IMAGE),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "return_dict": False,
    }


def patched(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": image(draw, 5, IMAGE, 2),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "encoder_attention_mask": text_mask(TEXT),
        "timestep": draw.timestep(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def dual(seed: int = 0) -> dict[str, Any]:
    return {**continuous(seed), "encoder_hidden_states": Draw(seed + 1)(1, 77 + 257, 13)}


def temporal(seed: int = 0) -> dict[str, Any]:
    t, h, w = VIDEO
    return {"hidden_states": Draw(seed)(t, 10, h, w), "num_frames": t, "return_dict": False}


GROUPS = "group norm takes its statistics over all tokens"
ENTRIES = (
    Entry(
        "Transformer2DModel",
        lambda: seeded(lambda: Transformer2DModel(**CONTINUOUS)),
        continuous,
        IMAGE,
        note=GROUPS,
    ),
    Entry(
        "Transformer2DModel (patches)",
        lambda: seeded(lambda: Transformer2DModel(**PATCHED)),
        patched,
        IMAGE,
    ),
    Entry(
        "DualTransformer2DModel",
        lambda: seeded(lambda: DualTransformer2DModel(**CONTINUOUS)),
        dual,
        IMAGE,
        note=GROUPS,
    ),
    Entry(
        "DreamLiteTransformer2DModel",
        lambda: seeded(lambda: DreamLiteTransformer2DModel(**CONTINUOUS)),
        continuous,
        IMAGE,
        note=GROUPS,
    ),
    Entry(
        "TransformerTemporalModel",
        lambda: seeded(lambda: TransformerTemporalModel(**{**CONTINUOUS, "cross_attention_dim": None})),
        temporal,
        VIDEO,
        note=GROUPS + "; each place attends over time alone: places are folded into the batch",
    ),
)
