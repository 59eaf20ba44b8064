"""Qwen-Image: latents are packed into tokens, 2 x 2 each, and references of fixed areas stand behind them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    QwenImageControlNetInpaintPipeline,
    QwenImageControlNetModel,
    QwenImageEditInpaintPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from zoo.entry import Grid, newer, seeded

from .parts import CHANNELS, IMAGE, IMAGE_GRID, TEXT, TEXT_WIDTH, flow, packed_row
from .row import STEPS, Masking, embeds, mask_picture, picture

Krea2Pipeline = newer("Krea2Pipeline")
Krea2Transformer2DModel = newer("Krea2Transformer2DModel")
PACKED = 4 * CHANNELS
SHAPE = (1, 24, PACKED)
BLOCK: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": PACKED,
    "out_channels": CHANNELS,
    "num_layers": 1,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (2, 4, 6),
}

AREA = (1, 1024, 1024)
"""The edit pipelines scale every picture to this area. A VAE that divides by 64 leaves 8 x 8 tokens, or 6 x 9."""
AREA_GRID = (1, 8, 8)
LARGE = (1, 512, 768)
"""A call for 4 x 6 tokens with that VAE."""


def vae(halvings: int) -> AutoencoderKLQwenImage:
    config = {
        "base_dim": 2,
        "z_dim": CHANNELS,
        "dim_mult": [1] * (halvings + 1),
        "num_res_blocks": 0,
        "temperal_downsample": [False] * halvings,
        "latents_mean": [0.1] * CHANNELS,
        "latents_std": [1.5] * CHANNELS,
    }
    return seeded(lambda: AutoencoderKLQwenImage(**config))


def parts(halvings: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "text_encoder": None,
        "tokenizer": None,
        "vae": vae(halvings),
        "scheduler": flow(),
        "transformer": seeded(lambda: QwenImageTransformer2DModel(**BLOCK)),
        **changes,
    }


def edit_parts() -> dict[str, Any]:
    return parts(halvings=6, processor=None)


def call(size: Grid = IMAGE, **changes: Any) -> dict[str, Any]:
    _, height, width = size
    return {
        "prompt_embeds": embeds(TEXT, TEXT_WIDTH),
        "negative_prompt_embeds": embeds(TEXT, TEXT_WIDTH, seed=1),
        "true_cfg_scale": 1.0,
        "height": height,
        "width": width,
        "num_inference_steps": STEPS,
        **changes,
    }


def with_controlnet() -> dict[str, Any]:
    """The mask joins the control image, and is packed: it fills four channels."""
    return parts(controlnet=seeded(lambda: QwenImageControlNetModel(**BLOCK, extra_condition_channels=4)))


def img2img(**changes: Any) -> dict[str, Any]:
    return call(image=picture(IMAGE), strength=0.6, **changes)


def edit_inpaint() -> dict[str, Any]:
    return call(AREA, image=picture(AREA), mask_image=mask_picture(AREA, AREA_GRID), strength=0.6)


def krea2_parts() -> dict[str, Any]:
    """Text comes as the states of several layers of its encoder."""
    config = {
        "in_channels": PACKED,
        "num_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 53,
        "timestep_embed_dim": 26,
        "text_hidden_dim": TEXT_WIDTH - 1,
        "num_text_layers": 3,
        "text_num_attention_heads": 4,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 29,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (2, 4, 6),
    }
    return parts(transformer=seeded(lambda: Krea2Transformer2DModel(**config)))


def krea2_call() -> dict[str, Any]:
    """Without guidance; the last words of both texts are padding."""
    texts = {f"{prefix}prompt_embeds": embeds(TEXT, 3, TEXT_WIDTH - 1, seed=s) for s, prefix in enumerate(PREFIXES)}
    masks = {f"{prefix}prompt_embeds_mask": torch.arange(TEXT)[None] < TEXT - 2 for prefix in PREFIXES}
    return {**texts, **masks, "guidance_scale": 0.0, "height": 16, "width": 24, "num_inference_steps": STEPS}


PREFIXES = ("", "negative_")
MASKED = {"mask_argument": "mask_image", "source_argument": "image", "masking": Masking.BLEND}
qwen_row = partial(packed_row, shape=SHAPE, guided={"true_cfg_scale": 3.0})
ROWS = (
    qwen_row(QwenImagePipeline, parts, call),
    qwen_row(QwenImageImg2ImgPipeline, parts, img2img, steps=2),
    qwen_row(
        QwenImageInpaintPipeline, parts, lambda: img2img(mask_image=mask_picture(IMAGE, IMAGE_GRID)), steps=2, **MASKED
    ),
    qwen_row(
        QwenImageEditPipeline, edit_parts, lambda: call(LARGE, image=picture(IMAGE)), size=LARGE, reference_tokens=54
    ),
    qwen_row(
        QwenImageEditInpaintPipeline,
        edit_parts,
        edit_inpaint,
        size=AREA,
        grid=AREA_GRID,
        shape=(1, 64, PACKED),
        steps=2,
        reference_tokens=64,
        **MASKED,
    ),
    qwen_row(
        QwenImageEditPlusPipeline,
        edit_parts,
        lambda: call(LARGE, image=[picture(IMAGE), picture(IMAGE, seed=1)]),
        size=LARGE,
        reference_tokens=108,
    ),
    qwen_row(
        QwenImageControlNetInpaintPipeline,
        with_controlnet,
        lambda: call(control_image=picture(IMAGE), control_mask=mask_picture(IMAGE, IMAGE_GRID)),
        mask_argument="control_mask",
        source_argument="control_image",
        masking=Masking.HIDE,
    ),
    packed_row(Krea2Pipeline, krea2_parts, krea2_call, shape=SHAPE, guided={"guidance_scale": 3.0}),
)
