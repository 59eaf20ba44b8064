"""Flux and the models that take packed latents as it does, with positions as inputs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
)

from .entry import IMAGE, Draw, Entry, coordinates, seeded, text_mask, tokens

N, TEXT = tokens(IMAGE), 11
CONFIG: dict[str, Any] = {
    "in_channels": 5,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 13,
    "axes_dims_rope": (2, 4, 6),
}
PACKED = {"hidden_states": 1, "img_ids": 0}


def packed(seed: int = 0, axes: int = 3) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw(1, N, 5),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "timestep": draw.sigma(),
        "img_ids": coordinates(IMAGE, axes),
        "txt_ids": torch.zeros(TEXT, axes),
        "return_dict": False,
    }


def flux(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 1)
    return {**packed(seed), "pooled_projections": draw(1, 17), "guidance": 3 * draw.sigma()}


def flux_controlled(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 2)
    return {
        **flux(seed),
        "controlnet_block_samples": [draw(1, N, 24)],
        "controlnet_single_block_samples": [draw(1, N, 24)],
    }


def flux2(seed: int = 0) -> dict[str, Any]:
    kwargs = packed(seed, axes=4)
    kwargs["txt_ids"][:, 3] = torch.arange(TEXT)
    return {**kwargs, "guidance": 3 * Draw(seed + 1).sigma()}


def chroma(seed: int = 0) -> dict[str, Any]:
    valid = torch.cat([text_mask(TEXT).bool(), torch.ones(1, N, dtype=torch.bool)], dim=1)
    return {**packed(seed), "attention_mask": valid}


def bria_fibo(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 1)
    return {**packed(seed), "timestep": draw.timestep(), "text_encoder_layers": [draw(1, TEXT, 17) for _ in range(2)]}


def build_flux() -> FluxTransformer2DModel:
    return seeded(lambda: FluxTransformer2DModel(**CONFIG, pooled_projection_dim=17, guidance_embeds=True))


def build_flux2() -> Flux2Transformer2DModel:
    config = {**CONFIG, "axes_dims_rope": (2, 2, 4, 4), "timestep_guidance_channels": 26}
    return seeded(lambda: Flux2Transformer2DModel(**config))


def build_chroma() -> ChromaTransformer2DModel:
    extra = {"approximator_num_channels": 64, "approximator_hidden_dim": 29, "approximator_layers": 2}
    return seeded(lambda: ChromaTransformer2DModel(**CONFIG, **extra))


def build_bria() -> BriaTransformer2DModel:
    return seeded(lambda: BriaTransformer2DModel(**CONFIG))


def build_bria_fibo() -> BriaFiboTransformer2DModel:
    return seeded(lambda: BriaFiboTransformer2DModel(**CONFIG, text_encoder_dim=17))


def build_ovis() -> OvisImageTransformer2DModel:
    return seeded(lambda: OvisImageTransformer2DModel(**CONFIG, out_channels=5))


def build_longcat() -> LongCatImageTransformer2DModel:
    return seeded(lambda: LongCatImageTransformer2DModel(**CONFIG))


JOINT = "text before image tokens along one axis; positions of both are inputs, joined before the rotary table"
ENTRIES = (
    Entry("FluxTransformer2DModel", build_flux, flux, IMAGE, PACKED, note=JOINT),
    Entry(
        "FluxTransformer2DModel (controlled)",
        build_flux,
        flux_controlled,
        IMAGE,
        {**PACKED, "controlnet_block_samples": 1, "controlnet_single_block_samples": 1},
        note=JOINT + "; lists of packed control samples are added",
    ),
    Entry(
        "Flux2Transformer2DModel",
        build_flux2,
        flux2,
        IMAGE,
        PACKED,
        note="text before image tokens along one axis; each has its own rotary table, joined afterwards",
    ),
    Entry("ChromaTransformer2DModel", build_chroma, packed, IMAGE, PACKED, note=JOINT),
    Entry(
        "ChromaTransformer2DModel (masked)",
        build_chroma,
        chroma,
        IMAGE,
        PACKED,
        note=JOINT + "; the mask, over both, becomes a square one: the outer product with itself",
    ),
    Entry("BriaTransformer2DModel", build_bria, packed, IMAGE, PACKED, note=JOINT),
    Entry(
        "BriaFiboTransformer2DModel",
        build_bria_fibo,
        bria_fibo,
        IMAGE,
        PACKED,
        note=JOINT + "; half of the text channels are replaced before each block",
    ),
    Entry("OvisImageTransformer2DModel", build_ovis, packed, IMAGE, PACKED, note=JOINT),
    Entry("LongCatImageTransformer2DModel", build_longcat, packed, IMAGE, PACKED, note=JOINT),
)
