"""HunyuanVideo and HunyuanVideo 1.5. The first VAE quarters time, height and width, and a patch is 2 x 2."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel
from zoo.entry import seeded, text_mask
from zoo.hunyuan import CONFIG

from .parts import POOLED, TEXT, TEXT_WIDTH, flow
from .row import STEPS, embeds, picture, row

SIZE = (5, 32, 48)
GRID = (2, 4, 6)
CHANNELS = 2
SHAPE = (1, CHANNELS, 2, 8, 12)
SMALL = (5, 16, 24)
"""The size of HunyuanVideo 1.5, whose patch is one latent."""
TEXT_2, TEXT_2_WIDTH, IMAGE_WIDTH = 5, 19, 16


def vae(**changes: Any) -> AutoencoderKLHunyuanVideo:
    config = {
        "block_out_channels": (4, 4, 4),
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 3,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": CHANNELS,
        "spatial_compression_ratio": 4,
    }
    return seeded(lambda: AutoencoderKLHunyuanVideo(**{**config, **changes}))


def model_config(**changes: Any) -> dict[str, Any]:
    return {**CONFIG, "in_channels": CHANNELS, "out_channels": CHANNELS, **changes}


def transformer(**changes: Any) -> HunyuanVideoTransformer3DModel:
    return seeded(lambda: HunyuanVideoTransformer3DModel(**model_config(**changes)))


def image_encoder() -> dict[str, Any]:
    """SigLIP's image encoder: 16 tokens."""
    config = SiglipVisionConfig(
        hidden_size=IMAGE_WIDTH, intermediate_size=29, num_hidden_layers=1, num_attention_heads=2, image_size=8,
        patch_size=2,
    )  # fmt: skip
    processor = SiglipImageProcessor(size={"height": 8, "width": 8})
    return {"image_encoder": seeded(lambda: SiglipVisionModel(config)), "feature_extractor": processor}


def parts(model: torch.nn.Module, **changes: Any) -> dict[str, Any]:
    text = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return {**text, "vae": vae(), "scheduler": flow(use_dynamic_shifting=False), "transformer": model, **changes}


def call(**changes: Any) -> dict[str, Any]:
    frames, height, width = SIZE
    return {
        "prompt_embeds": embeds(TEXT, TEXT_WIDTH),
        "prompt_attention_mask": text_mask(TEXT, TEXT - 2),
        "pooled_prompt_embeds": embeds(POOLED, seed=2),
        "num_frames": frames,
        "height": height,
        "width": width,
        "num_inference_steps": STEPS,
        "true_cfg_scale": 1.0,
        **changes,
    }


GUIDED = {
    "true_cfg_scale": 3.0,
    "negative_prompt_embeds": embeds(TEXT, TEXT_WIDTH, seed=1),
    "negative_prompt_attention_mask": text_mask(TEXT, TEXT - 2),
    "negative_pooled_prompt_embeds": embeds(POOLED, seed=3),
}


def first_frame(**changes: Any) -> dict[str, Any]:
    return call(image=picture(SIZE), **changes)


def concatenated() -> dict[str, Any]:
    """The first frame joins the latents along channels."""
    model = transformer(in_channels=2 * CHANNELS + 1, guidance_embeds=False, image_condition_type="latent_concat")
    return parts(model, image_processor=None)


def replaced() -> dict[str, Any]:
    """The first frame stands in the latents, and is modulated as at time 0."""
    model = transformer(guidance_embeds=True, image_condition_type="token_replace")
    return parts(model, image_processor=None)


def framepack() -> dict[str, Any]:
    extra = {"has_image_proj": True, "image_proj_dim": IMAGE_WIDTH, "has_clean_x_embedder": True}
    model = seeded(lambda: HunyuanVideoFramepackTransformer3DModel(**model_config(**extra)))
    return parts(model, scheduler=flow(), **image_encoder())


def parts_15(guidance: float) -> dict[str, Any]:
    autoencoder = {
        "block_out_channels": (8, 8, 8),
        "layers_per_block": 1,
        "latent_channels": CHANNELS,
        "spatial_compression_ratio": 4,
    }
    changes = {"in_channels": 2 * CHANNELS + 1, "patch_size": 1, "text_embed_2_dim": TEXT_2_WIDTH}
    config = model_config(**changes, image_embed_dim=IMAGE_WIDTH, target_size=SMALL[1] + 4)
    del config["num_single_layers"], config["pooled_projection_dim"]
    model = seeded(lambda: HunyuanVideo15Transformer3DModel(**config))
    guider = ClassifierFreeGuidance(guidance_scale=guidance)
    return parts(model, vae=seeded(lambda: AutoencoderKLHunyuanVideo15(**autoencoder)), guider=guider)


def call_15(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"num_frames": SMALL[0], "num_inference_steps": STEPS}
    for seed, prefix in enumerate(("", "negative_")):
        arguments |= {
            f"{prefix}prompt_embeds": embeds(TEXT, TEXT_WIDTH, seed=seed),
            f"{prefix}prompt_embeds_mask": text_mask(TEXT, TEXT - 2),
            f"{prefix}prompt_embeds_2": embeds(TEXT_2, TEXT_2_WIDTH, seed=seed),
            f"{prefix}prompt_embeds_mask_2": text_mask(TEXT_2, TEXT_2 - 1),
        }
    return {**arguments, **changes}


FACTS_15: dict[str, Any] = {"size": SMALL, "shape": (1, CHANNELS, *GRID), "guided": {}}
video_row = partial(row, size=SIZE, grid=GRID, shape=SHAPE, guided=GUIDED)
ROWS = (
    video_row(HunyuanVideoPipeline, lambda: parts(transformer(guidance_embeds=True)), call),
    video_row(HunyuanVideoImageToVideoPipeline, concatenated, first_frame, shape=(1, CHANNELS, 1, 8, 12)),
    video_row(HunyuanVideoImageToVideoPipeline, replaced, first_frame, "token replace"),
    video_row(
        HunyuanSkyreelsImageToVideoPipeline,
        lambda: parts(transformer(in_channels=2 * CHANNELS, guidance_embeds=True)),
        first_frame,
    ),
    video_row(
        HunyuanVideoFramepackPipeline,
        framepack,
        lambda: first_frame(latent_window_size=2),
        shape=(1, CHANNELS, 3, 8, 12),
    ),
    video_row(
        HunyuanVideo15Pipeline, lambda: parts_15(1.0), lambda: call_15(height=SMALL[1], width=SMALL[2]), **FACTS_15
    ),
    video_row(
        HunyuanVideo15Pipeline,
        lambda: parts_15(3.0),
        lambda: call_15(height=SMALL[1], width=SMALL[2]),
        "guided",
        calls=2,
        **FACTS_15,
    ),
    video_row(
        HunyuanVideo15ImageToVideoPipeline,
        lambda: {**parts_15(3.0), **image_encoder()},
        lambda: call_15(image=picture(SMALL)),
        calls=2,
        **FACTS_15,
    ),
)
