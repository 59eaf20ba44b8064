"""Models with packed latents that are not built like Flux: Flux 3, Krea 2, Ideogram 4, Nucleus."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    Ideogram4Transformer2DModel,
    Krea2Transformer2DModel,
    NucleusMoEImageTransformer2DModel,
)
from torch import nn

from .entry import IMAGE, Draw, Entry, coordinates, newer, seeded, text_mask, tokens

Flux3Transformer2DModel = newer("Flux3Transformer2DModel")

N, TEXT = tokens(IMAGE), 11
REFERENCE = (1, 3, 4)
SEQUENCE = (1, 1, TEXT + N)
TEXT_ROLE, IMAGE_ROLE = 3, 2  # Ideogram 4's indicators


def flux3(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw(1, N, 5),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "timestep": draw.sigma(),
        "img_ids": coordinates(IMAGE, 4),
        "txt_ids": torch.zeros(TEXT, 4),
        "image_cond_hidden_states": draw(1, tokens(REFERENCE), 7),
        "image_cond_ids": coordinates(REFERENCE, 4) + 1,
        "return_dict": False,
    }


def krea2(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw(1, N, 5),
        "encoder_hidden_states": draw(1, TEXT, 3, 16),
        "timestep": draw.sigma(),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), coordinates(IMAGE)]),
        "encoder_attention_mask": text_mask(TEXT).bool(),
        "return_dict": False,
    }


def ideogram4(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    is_text = torch.arange(TEXT + N) < TEXT
    text_positions = torch.arange(TEXT).float()[:, None].expand(-1, 3)
    return {
        "hidden_states": draw(1, TEXT + N, 5),
        "timestep": draw.sigma(),
        "encoder_hidden_states": draw(1, TEXT + N, 13),
        "position_ids": torch.cat([text_positions, coordinates(IMAGE)])[None].long(),
        "segment_ids": torch.ones(1, TEXT + N, dtype=torch.long),
        "indicator": torch.where(is_text, TEXT_ROLE, IMAGE_ROLE)[None],
        "return_dict": False,
    }


def nucleus(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw(1, N, 5),
        "img_shapes": [IMAGE],
        "encoder_hidden_states": draw(1, TEXT, 13),
        "encoder_hidden_states_mask": text_mask(TEXT).bool(),
        "timestep": draw.sigma(),
        "return_dict": False,
    }


def build_flux3() -> nn.Module:
    config = {
        "in_channels": 5,
        "cond_in_channels": 7,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "joint_attention_dim": 13,
        "timestep_channels": 26,
        "axes_dims_rope": (2, 2, 4, 4),
    }
    return seeded(lambda: Flux3Transformer2DModel(**config))


def build_krea2() -> Krea2Transformer2DModel:
    config = {
        "in_channels": 5,
        "num_layers": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 53,
        "timestep_embed_dim": 26,
        "text_hidden_dim": 16,
        "num_text_layers": 3,
        "text_num_attention_heads": 4,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 29,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (2, 4, 6),
    }
    return seeded(lambda: Krea2Transformer2DModel(**config))


def build_ideogram4() -> Ideogram4Transformer2DModel:
    config = {
        "in_channels": 5,
        "num_layers": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "intermediate_size": 53,
        "adaln_dim": 17,
        "llm_features_dim": 13,
        "mrope_section": (2, 2, 2),
    }
    return seeded(lambda: Ideogram4Transformer2DModel(**config))


def build_nucleus(**variant: Any) -> NucleusMoEImageTransformer2DModel:
    config = {
        "patch_size": 1,
        "in_channels": 5,
        "out_channels": 5,
        "num_layers": 3,
        "attention_head_dim": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "joint_attention_dim": 13,
        "axes_dims_rope": (2, 4, 6),
    }
    return seeded(lambda: NucleusMoEImageTransformer2DModel(**config, **variant))


EXPERTS = {
    "dense_moe_strategy": "leave_first_block_dense",
    "num_experts": 5,
    "moe_intermediate_dim": 19,
    "capacity_factors": 2.0,
}
ENTRIES = (
    Entry(
        "Flux3Transformer2DModel",
        build_flux3,
        flux3,
        IMAGE,
        {"hidden_states": 1, "img_ids": 0},
        note="text, then image, then reference tokens along one axis: the image tokens stand in the middle; before "
        "that each stream attends to itself; modulation is expanded to tokens",
    ),
    Entry(
        "Krea2Transformer2DModel",
        build_krea2,
        krea2,
        IMAGE,
        {"hidden_states": 1},
        note="text before image tokens along one axis of an input too: position_ids [text + N, 3]; a key mask over "
        "both; grouped-query attention",
    ),
    Entry(
        "Ideogram4Transformer2DModel",
        build_ideogram4,
        ideogram4,
        SEQUENCE,
        dict.fromkeys(("hidden_states", "encoder_hidden_states", "position_ids", "segment_ids", "indicator"), 1),
        note="the grid here is the whole sequence: text and image tokens come in one packed input and an indicator "
        "tells them apart; a square mask of equal segments; the rotary table is written by index_put",
    ),
    Entry(
        "NucleusMoEImageTransformer2DModel",
        lambda: build_nucleus(**EXPERTS),
        nucleus,
        IMAGE,
        {"hidden_states": 1},
        note="queries are image tokens only, keys are image, then text; each expert takes its best tokens (top-k over "
        "the token axis), so a token's output depends on all tokens",
    ),
    Entry(
        "NucleusMoEImageTransformer2DModel (no experts)",
        lambda: build_nucleus(moe_enabled=False),
        nucleus,
        IMAGE,
        {"hidden_states": 1},
        note="queries are image tokens only, keys are image, then text; a key mask over both",
    ),
)
