"""HunyuanVideo, its relatives, and the image models of the same house."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    HunyuanImageTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
)
from diffusers.models.transformers import MotifVideoTransformer3DModel

from .entry import IMAGE, VIDEO, Draw, Entry, image, latents, seeded, text_mask

PATCH = (1, 2, 2)
TEXT = 11
CONFIG: dict[str, Any] = {
    "in_channels": 5,
    "out_channels": 5,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": 13,
    "pooled_projection_dim": 17,
    "rope_axes_dim": (2, 4, 6),
}


def hunyuan_video(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": latents(draw, 5, VIDEO, PATCH),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "encoder_attention_mask": text_mask(TEXT),
        "pooled_projections": draw(1, 17),
        "guidance": 1000 * draw.sigma(),
        "return_dict": False,
    }


def without_guidance(seed: int = 0) -> dict[str, Any]:
    return {**hunyuan_video(seed), "guidance": None}


def framepack(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 1)
    history = {
        name: latents(draw, 5, (frames, *VIDEO[1:]), PATCH)
        for name, frames in (("latents_clean", 2), ("latents_history_2x", 2), ("latents_history_4x", 4))
    }
    return {
        **hunyuan_video(seed),
        **history,
        "image_embeds": draw(1, 19, 23),
        "indices_latents": torch.arange(9, 9 + VIDEO[0]),
        "indices_latents_clean": torch.tensor([0, 8]),
        "indices_latents_history_2x": torch.arange(6, 8),
        "indices_latents_history_4x": torch.arange(2, 6),
    }


def hunyuan_video15(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": latents(draw, 5, VIDEO),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "encoder_attention_mask": text_mask(TEXT),
        "encoder_hidden_states_2": draw(1, 17, 19),
        "encoder_attention_mask_2": text_mask(17),
        "image_embeds": draw(1, 3, 23),
        "return_dict": False,
    }


def hunyuan_image(seed: int = 0) -> dict[str, Any]:
    draw, kwargs = Draw(seed + 1), without_guidance(seed)
    del kwargs["pooled_projections"]
    return {**kwargs, "hidden_states": image(draw, 5, IMAGE)}


def hunyuan_image_glyphs(seed: int = 0) -> dict[str, Any]:
    glyphs = {"encoder_hidden_states_2": Draw(seed + 2)(1, 17, 19), "encoder_attention_mask_2": text_mask(17)}
    return {**hunyuan_image(seed), **glyphs}


def motif(seed: int = 0) -> dict[str, Any]:
    draw, kwargs = Draw(seed + 1), without_guidance(seed)
    del kwargs["guidance"], kwargs["pooled_projections"]
    return {**kwargs, "image_embeds": draw(1, 7, 23)}


def build_video(**variant: Any) -> HunyuanVideoTransformer3DModel:
    return seeded(lambda: HunyuanVideoTransformer3DModel(**{**CONFIG, **variant}))


def build_framepack() -> HunyuanVideoFramepackTransformer3DModel:
    extra = {"has_image_proj": True, "image_proj_dim": 23, "has_clean_x_embedder": True}
    return seeded(lambda: HunyuanVideoFramepackTransformer3DModel(**CONFIG, **extra))


def build_video15() -> HunyuanVideo15Transformer3DModel:
    dropped = ("num_single_layers", "pooled_projection_dim", "patch_size")
    config = {name: value for name, value in CONFIG.items() if name not in dropped}
    extra = {"patch_size": 1, "text_embed_2_dim": 19, "image_embed_dim": 23}
    return seeded(lambda: HunyuanVideo15Transformer3DModel(**config, **extra))


def build_image(**variant: Any) -> HunyuanImageTransformer2DModel:
    dropped = ("patch_size_t", "pooled_projection_dim", "patch_size", "rope_axes_dim")
    config = {name: value for name, value in CONFIG.items() if name not in dropped}
    return seeded(lambda: HunyuanImageTransformer2DModel(**config, rope_axes_dim=(6, 6), **variant))


def build_motif() -> MotifVideoTransformer3DModel:
    dropped = ("num_refiner_layers", "pooled_projection_dim", "num_single_layers")
    config = {name: value for name, value in CONFIG.items() if name not in dropped}
    extra = {
        "num_single_layers": 2,
        "num_decoder_layers": 1,
        "image_embed_dim": 23,
        "enable_text_cross_attention_dual": True,
        "enable_text_cross_attention_single": True,
    }
    return seeded(lambda: MotifVideoTransformer3DModel(**config, **extra))


JOINT = "text after video tokens along one axis; a key mask over both"
ENTRIES = (
    Entry("HunyuanVideoTransformer3DModel", build_video, hunyuan_video, VIDEO, note=JOINT),
    Entry(
        "HunyuanVideoTransformer3DModel (token replace)",
        lambda: build_video(image_condition_type="token_replace", guidance_embeds=False),
        without_guidance,
        VIDEO,
        note=JOINT + "; the first frame's tokens are cut off, modulated differently and joined again",
    ),
    Entry(
        "HunyuanVideoFramepackTransformer3DModel",
        build_framepack,
        framepack,
        VIDEO,
        note="tokens of older frames, at three resolutions, stand before the video tokens and text after them; "
        "the text is cut to its valid length, which is data",
    ),
    Entry(
        "HunyuanVideo15Transformer3DModel",
        build_video15,
        hunyuan_video15,
        VIDEO,
        note=JOINT + "; a branch on whether the image is all zero, and text reordered by boolean masks, are data",
    ),
    Entry("HunyuanImageTransformer2DModel", build_image, hunyuan_image, IMAGE, note=JOINT),
    Entry(
        "HunyuanImageTransformer2DModel (glyphs)",
        lambda: build_image(text_embed_2_dim=19),
        hunyuan_image_glyphs,
        IMAGE,
        note=JOINT + "; text is reordered by boolean masks, which are data",
    ),
    Entry(
        "MotifVideoTransformer3DModel",
        build_motif,
        motif,
        VIDEO,
        note=JOINT + "; the video tokens also attend to the text alone; in the last blocks the embedded latents and "
        "the encoded tokens, two token axes of one length, are joined along one axis",
    ),
)
