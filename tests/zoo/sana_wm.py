"""SANA-WM and its refiner."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .entry import VIDEO, Draw, Entry, latents, newer, seeded, text_mask, tokens
from .video import rotary

SanaWMLTX2RefinerTransformer3DModel = newer("SanaWMLTX2RefinerTransformer3DModel")
SanaWMTransformer3DModel = newer("SanaWMTransformer3DModel")

TEXT, N = 11, tokens(VIDEO)


def world(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": latents(draw, 5, VIDEO),
        "timestep": draw.timestep(1, 1, VIDEO[0]),
        "encoder_hidden_states": draw(1, 1, TEXT, 13),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "chunk_plucker": latents(draw, 11, VIDEO),
        "return_dict": False,
    }


def refiner(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw(1, N, 5),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "timestep": draw.timestep(),
        "video_rotary_emb": rotary(draw, 1, N, 12),
        "encoder_attention_mask": text_mask(TEXT),
        "return_dict": False,
    }


def build_world() -> nn.Module:
    config = {
        "in_channels": 5,
        "num_layers": 2,
        "hidden_size": 24,
        "num_attention_heads": 2,
        "softmax_every_n": 2,
        "linear_head_dim": 12,
        "image_size": 14,
        "caption_channels": 13,
        "mlp_ratio": 2.0,
        "chunk_plucker_channels": 11,
        "chunk_plucker_post_attn_blocks": 2,
    }
    return seeded(lambda: SanaWMTransformer3DModel(**config))


def build_refiner() -> nn.Module:
    config = {
        "in_channels": 5,
        "out_channels": 5,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "audio_in_channels": 7,
        "audio_out_channels": 7,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 2,
        "caption_channels": 13,
    }
    return seeded(lambda: SanaWMLTX2RefinerTransformer3DModel(**config))


ENTRIES = (
    Entry(
        "SanaWMTransformer3DModel",
        build_world,
        world,
        VIDEO,
        note="linear attention with a gated state that is passed on from frame to frame, in both directions, and a "
        "short convolution over frames; every n-th block has softmax attention; the feed-forward part convolves in "
        "space and time; a timestep for each frame; without camera conditions here",
    ),
    Entry(
        "SanaWMLTX2RefinerTransformer3DModel",
        build_refiner,
        refiner,
        VIDEO,
        {"hidden_states": 1, "video_rotary_emb": 1},
        note="LTX-2 without its audio stream; the rotary table, a tuple of two, is an input",
    ),
)
