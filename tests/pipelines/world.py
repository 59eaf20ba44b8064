"""Cosmos, Kandinsky 5 and Sana-Video."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCosmos,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    CosmosVideoToWorldPipeline,
    EDMEulerScheduler,
    Kandinsky5I2IPipeline,
    Kandinsky5I2VPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)
from torch import nn
from zoo.entry import Grid, seeded, text_mask

from . import wan
from .hunyuan import vae as hunyuan_vae
from .parts import EIGHTH, EIGHTH_VAE, POOLED, TEXT, TEXT_WIDTH, flow, vae
from .row import STEPS, embeds, picture, row, video

CHANNELS = 5
SIZE, GRID, SHAPE = wan.SIZE, wan.GRID, wan.SHAPE
"""Cosmos 2 and Sana-Video take Wan's VAE."""
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12}


class SafetyChecker(nn.Module):
    """Stands for the checker that Cosmos insists on; it is asked about prompts and decoded videos only."""

    device, dtype = torch.device("cpu"), torch.float32


def cosmos_model(in_channels: int = CHANNELS, **changes: Any) -> CosmosTransformer3DModel:
    config = {
        **HEADS,
        "in_channels": in_channels,
        "out_channels": CHANNELS,
        "num_layers": 1,
        "mlp_ratio": 2,
        "text_embed_dim": TEXT_WIDTH,
        "adaln_lora_dim": 11,
        "max_size": (5, 22, 26),
        "concat_padding_mask": False,  # it needs torchvision
        "extra_pos_embed_type": None,
    }
    return seeded(lambda: CosmosTransformer3DModel(**{**config, **changes}))


def cosmos(in_channels: int = CHANNELS, **changes: Any) -> dict[str, Any]:
    plain = {"text_encoder": None, "tokenizer": None, "vae": wan.vae(), "safety_checker": SafetyChecker()}
    scheduler = flow(use_dynamic_shifting=False, shift=1.0, use_karras_sigmas=True)
    return {**plain, "transformer": cosmos_model(in_channels), "scheduler": scheduler, **changes}


def cosmos1(in_channels: int = CHANNELS) -> dict[str, Any]:
    """Cosmos 1: its VAE quarters time, height and width; the scheduler is EDM's."""
    autoencoder = {
        "latent_channels": CHANNELS,
        "encoder_block_out_channels": (4, 4, 4),
        "decode_block_out_channels": (4, 4, 4),
        "attention_resolutions": (8,),
        "resolution": 32,
        "num_layers": 1,
        "patch_size": 2,
        "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 4,
        "latents_mean": None,
        "latents_std": None,
    }
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras")
    positions = {"extra_pos_embed_type": "learnable"}
    model = cosmos_model(in_channels, **positions)
    return cosmos(vae=seeded(lambda: AutoencoderKLCosmos(**autoencoder)), scheduler=scheduler, transformer=model)


def call(size: Grid = SIZE, **changes: Any) -> dict[str, Any]:
    frames, height, width = size
    return {
        "prompt_embeds": embeds(TEXT, TEXT_WIDTH),
        "negative_prompt_embeds": embeds(TEXT, TEXT_WIDTH, seed=1),
        "num_frames": frames,
        "height": height,
        "width": width,
        "num_inference_steps": STEPS,
        "guidance_scale": 1.0,
        **changes,
    }


def without_frames(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "num_frames"}


def kandinsky(**changes: Any) -> dict[str, Any]:
    """HunyuanVideo's VAE, and latents with channels last."""
    config = {
        "in_visual_dim": CHANNELS,
        "in_text_dim": TEXT_WIDTH,
        "in_text_dim2": POOLED,
        "time_dim": 19,
        "out_visual_dim": CHANNELS,
        "model_dim": 24,
        "ff_dim": 53,
        "num_text_blocks": 1,
        "num_visual_blocks": 1,
        "axes_dims": (2, 4, 6),
        **changes,
    }
    return {
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
        "vae": hunyuan_vae(latent_channels=CHANNELS),
        "scheduler": flow(use_dynamic_shifting=False),
        "transformer": seeded(lambda: Kandinsky5Transformer3DModel(**config)),
    }


def kandinsky_text() -> dict[str, Any]:
    text: dict[str, Any] = {}
    for seed, prefix in enumerate(("", "negative_")):
        text[f"{prefix}prompt_embeds_qwen"] = embeds(TEXT, TEXT_WIDTH, seed=seed)
        text[f"{prefix}prompt_embeds_clip"] = embeds(POOLED, seed=seed)
        text[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, TEXT], dtype=torch.int32)
    return text


def kandinsky_call(size: Grid = SIZE, **changes: Any) -> dict[str, Any]:
    arguments = {name: value for name, value in call(size).items() if "embeds" not in name}
    return {**arguments, **kandinsky_text(), **changes}


def kandinsky_image(**changes: Any) -> dict[str, Any]:
    return {**kandinsky(**changes), "vae": vae(latent_channels=CHANNELS, **EIGHTH_VAE)}


RESOLUTIONS = {"resolutions": [EIGHTH[:0:-1]]}
"""The image pipelines round every call to one of these sizes; their own are of a megapixel."""


LONG = (17, *SIZE[1:])
"""The image pipeline scales the first four latent frames like those behind them: it needs a fifth."""
SANA = (5, 64, 96)
"""A call for 3 x 4 x 6 tokens where the VAE divides height and width by 8."""


def sana_video() -> dict[str, Any]:
    config = {
        **HEADS,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 1,
        "num_cross_attention_heads": 3,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 24,
        "caption_channels": TEXT_WIDTH,
        "sample_size": 6,
        "rope_max_seq_len": 37,
    }
    model = seeded(lambda: SanaVideoTransformer3DModel(**config))
    eighth = {"dim_mult": [1] * 4, "temperal_downsample": [True, False, False], "scale_factor_spatial": 8}
    plain = {"tokenizer": None, "text_encoder": None, "scheduler": wan.scheduler()}
    return {**plain, "vae": wan.vae(**eighth), "transformer": model}


def sana_video_call() -> dict[str, Any]:
    masks = {f"{prefix}prompt_attention_mask": text_mask(TEXT, TEXT - 2) for prefix in ("", "negative_")}
    _, height, width = SANA
    return {
        **without_frames(call()),
        **masks,
        "frames": SANA[0],
        "height": height,
        "width": width,
        "negative_prompt": None,
        "use_resolution_binning": False,
    }


KANDINSKY = {"layout": "BTHWC", "grid": (2, 4, 6), "shape": (1, 2, 8, 12, CHANNELS)}
KANDINSKY_LONG = {"layout": "BTHWC", "size": LONG, "grid": (5, 4, 6), "shape": (1, 5, 8, 12, CHANNELS)}
KANDINSKY_IMAGE = {
    "attributes": RESOLUTIONS,
    "layout": "BTHWC",
    "size": EIGHTH,
    "grid": (1, 4, 6),
    "shape": (1, 1, 8, 12, CHANNELS),
}
COSMOS1 = {"grid": (2, 4, 6), "shape": (1, CHANNELS, 2, 8, 12)}
STILL = {"size": (1, *SIZE[1:]), "grid": (1, 4, 6), "shape": (1, CHANNELS, 8, 12)}
video_row = partial(row, size=SIZE, grid=GRID, shape=SHAPE, guided={"guidance_scale": 3.0})
ROWS = (
    video_row(CosmosTextToWorldPipeline, cosmos1, call, **COSMOS1),
    video_row(CosmosVideoToWorldPipeline, lambda: cosmos1(CHANNELS + 1), lambda: call(image=picture(SIZE)), **COSMOS1),
    video_row(Cosmos2TextToImagePipeline, cosmos, lambda: without_frames(call()), **STILL),
    video_row(Cosmos2VideoToWorldPipeline, lambda: cosmos(CHANNELS + 1), lambda: call(image=picture(SIZE))),
    video_row(
        Cosmos2_5_PredictBasePipeline,
        lambda: cosmos(CHANNELS + 1, scheduler=wan.scheduler()),
        lambda: call(video=video(SIZE), num_latent_conditional_frames=1),
    ),
    video_row(Kandinsky5T2VPipeline, kandinsky, kandinsky_call, **KANDINSKY),
    video_row(
        Kandinsky5I2VPipeline,
        lambda: kandinsky(visual_cond=True),
        lambda: kandinsky_call(LONG, image=picture(LONG)),
        **KANDINSKY_LONG,
    ),
    video_row(SanaVideoPipeline, sana_video, sana_video_call, size=SANA, guided_calls=1),
    video_row(
        Kandinsky5T2IPipeline, kandinsky_image, lambda: without_frames(kandinsky_call(EIGHTH)), **KANDINSKY_IMAGE
    ),
    video_row(
        Kandinsky5I2IPipeline,
        lambda: kandinsky_image(visual_cond=True),
        lambda: without_frames(kandinsky_call(EIGHTH, image=picture(EIGHTH))),
        **KANDINSKY_IMAGE,
    ),
)
