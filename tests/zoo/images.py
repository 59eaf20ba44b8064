"""Image models whose latents come as a grid: PixArt, DiT, Lumina, AuraFlow, CogView, Hunyuan-DiT and others."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    DiTTransformer2DModel,
    HunyuanDiT2DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    PixArtTransformer2DModel,
    PRXTransformer2DModel,
)

from .entry import IMAGE, Draw, Entry, image, seeded, text_mask, tokens
from .video import rotary

N, TEXT = tokens(IMAGE), 11
SQUARE = (1, 5, 5)
HEADS: dict[str, Any] = {"in_channels": 5, "num_attention_heads": 2, "attention_head_dim": 12}


def text_to_image(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": image(draw, 5, IMAGE, 2),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "return_dict": False,
    }


def masked(seed: int = 0) -> dict[str, Any]:
    return {**text_to_image(seed), "encoder_attention_mask": text_mask(TEXT)}


def class_to_image(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": image(draw, 5, SQUARE, 2),
        "timestep": draw.timestep().long(),
        "class_labels": torch.tensor([3]),
        "return_dict": False,
    }


def lumina2(seed: int = 0) -> dict[str, Any]:
    return {**text_to_image(seed), "timestep": Draw(seed + 1).sigma(), "encoder_attention_mask": text_mask(TEXT)}


def lumina_next(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 1)
    angles = 3 * draw(9, 11, 6)
    return {
        **text_to_image(seed),
        "timestep": draw.sigma(),
        "encoder_mask": text_mask(TEXT),
        "cross_attention_kwargs": {},
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
    }


def sized(seed: int = 0) -> dict[str, Any]:
    sizes = {
        "original_size": torch.tensor([[10.0, 14.0]]),
        "target_size": torch.tensor([[10.0, 14.0]]),
        "crop_coords": torch.zeros(1, 2),
    }
    return {**text_to_image(seed), **sizes}


def sized_masked(seed: int = 0) -> dict[str, Any]:
    return {**sized(seed), "attention_mask": text_mask(TEXT)}


def hunyuan_dit(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 1)
    return {
        **text_to_image(seed),
        "text_embedding_mask": text_mask(TEXT),
        "encoder_hidden_states_t5": draw(1, 17, 16),
        "text_embedding_mask_t5": text_mask(17),
        "image_meta_size": 100 * draw.sigma(1, 6),
        "style": torch.tensor([0]),
        "image_rotary_emb": rotary(draw, N, 6),
    }


def prx(seed: int = 0) -> dict[str, Any]:
    return {**text_to_image(seed), "timestep": Draw(seed + 1).sigma(), "attention_mask": text_mask(TEXT)}


def build_pixart() -> PixArtTransformer2DModel:
    config = {"out_channels": 10, "num_layers": 2, "cross_attention_dim": 24, "sample_size": 14, "caption_channels": 13}
    return seeded(lambda: PixArtTransformer2DModel(**HEADS, **config))


def build_dit() -> DiTTransformer2DModel:
    return seeded(lambda: DiTTransformer2DModel(**HEADS, num_layers=2, sample_size=10, num_embeds_ada_norm=29))


def build_lumina2() -> Lumina2Transformer2DModel:
    config = {
        "sample_size": 14,
        "in_channels": 5,
        "hidden_size": 48,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "multiple_of": 31,
        "axes_dim_rope": (4, 4, 4),
        "axes_lens": (37, 29, 31),
        "cap_feat_dim": 13,
    }
    return seeded(lambda: Lumina2Transformer2DModel(**config))


def build_lumina_next() -> LuminaNextDiT2DModel:
    config = {
        "sample_size": 14,
        "in_channels": 5,
        "hidden_size": 48,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "multiple_of": 31,
        "cross_attention_dim": 13,
    }
    return seeded(lambda: LuminaNextDiT2DModel(**config))


def build_auraflow() -> AuraFlowTransformer2DModel:
    config = {
        "sample_size": 14,
        "out_channels": 5,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "joint_attention_dim": 13,
        "caption_projection_dim": 24,
        "pos_embed_max_size": 81,
    }
    return seeded(lambda: AuraFlowTransformer2DModel(**HEADS, **config))


COGVIEW: dict[str, Any] = {
    **HEADS,
    "out_channels": 5,
    "num_layers": 2,
    "text_embed_dim": 13,
    "time_embed_dim": 23,
    "condition_dim": 26,
    "pos_embed_max_size": 9,
    "sample_size": 14,
}


def build_cogview3() -> CogView3PlusTransformer2DModel:
    return seeded(lambda: CogView3PlusTransformer2DModel(**COGVIEW))


def build_cogview4() -> CogView4Transformer2DModel:
    return seeded(lambda: CogView4Transformer2DModel(**COGVIEW, rope_axes_dim=(41, 43)))


def build_hunyuan_dit() -> HunyuanDiT2DModel:
    config = {
        "patch_size": 2,
        "sample_size": 14,
        "hidden_size": 24,
        "num_layers": 4,
        "cross_attention_dim": 13,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 29,
        "text_len": TEXT,
        "text_len_t5": 17,
    }
    return seeded(lambda: HunyuanDiT2DModel(**HEADS, **config))


def build_prx() -> PRXTransformer2DModel:
    config = {"context_in_dim": 13, "hidden_size": 24, "num_heads": 2, "depth": 2, "axes_dim": [6, 6]}
    return seeded(lambda: PRXTransformer2DModel(in_channels=5, **config))


ENTRIES = (
    Entry("PixArtTransformer2DModel", build_pixart, masked, IMAGE),
    Entry("DiTTransformer2DModel", build_dit, class_to_image, SQUARE, note="takes square images only; no text"),
    Entry(
        "Lumina2Transformer2DModel",
        build_lumina2,
        lumina2,
        IMAGE,
        note="text, cut to its valid length (read from the mask by tolist), before image tokens in an empty tensor; "
        "grouped-query attention; complex rotary table, gathered by positions",
    ),
    Entry(
        "LuminaNextDiT2DModel",
        build_lumina_next,
        lumina_next,
        IMAGE,
        note="self-attention has a key mask over image tokens, all ones, made inside; grouped-query attention; the "
        "complex rotary input is a grid [H, W, C], larger than the image and cropped inside",
    ),
    Entry(
        "AuraFlowTransformer2DModel",
        build_auraflow,
        text_to_image,
        IMAGE,
        note="8 learned register tokens, then text, before image tokens; tokens are born by a reshape into patches; "
        "the positional table is indexed by a computed grid",
    ),
    Entry("CogView3PlusTransformer2DModel", build_cogview3, sized, IMAGE, note="text before image tokens"),
    Entry(
        "CogView4Transformer2DModel",
        build_cogview4,
        sized,
        IMAGE,
        note="text before image tokens; rotary values are written in place over the slice of the image tokens",
    ),
    Entry(
        "CogView4Transformer2DModel (masked)",
        build_cogview4,
        sized_masked,
        IMAGE,
        note="as above; a square float mask of zeros and ones, added to the scores: the outer product of a mask over "
        "text and image tokens with itself",
    ),
    Entry(
        "HunyuanDiT2DModel",
        build_hunyuan_dit,
        hunyuan_dit,
        IMAGE,
        note="skips over blocks, joined along channels; the rotary table is an input",
    ),
    Entry(
        "PRXTransformer2DModel",
        build_prx,
        prx,
        IMAGE,
        note="queries are image tokens only, keys are text, then image tokens; a key mask over both; tokens are born "
        "and die by unfold-like reshapes",
    ),
)
