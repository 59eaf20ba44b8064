"""Video pipelines of one family each: CogVideoX, EasyAnimate, Mochi, Allegro, ConsisID, Latte."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLMagvit,
    CogVideoXDDIMScheduler,
    CogVideoXFunControlPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
    ConsisIDPipeline,
    ConsisIDTransformer3DModel,
    EasyAnimateControlPipeline,
    EasyAnimateInpaintPipeline,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    MochiPipeline,
    MochiTransformer3DModel,
)
from PIL import Image
from zoo.entry import seeded, text_mask

from .parts import TEXT, TEXT_WIDTH, flow
from .row import STEPS, Masking, embeds, mask_video, picture, row, video

CHANNELS = 2
SIZE = (5, 16, 24)
GRID = (2, 4, 6)


def call(size: tuple[int, int, int] = SIZE, **changes: Any) -> dict[str, Any]:
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


def without(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}


def cogvideox(in_channels: int = CHANNELS, **changes: Any) -> dict[str, Any]:
    """The VAE halves time, height and width."""
    autoencoder = {
        "block_out_channels": (4, 4),
        "down_block_types": ("CogVideoXDownBlock3D",) * 2,
        "up_block_types": ("CogVideoXUpBlock3D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": CHANNELS,
        "temporal_compression_ratio": 2,
    }
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": in_channels,
        "out_channels": CHANNELS,
        "time_embed_dim": 26,
        "text_embed_dim": TEXT_WIDTH,
        "num_layers": 1,
        "sample_width": 12,
        "sample_height": 8,
        "sample_frames": SIZE[0],
        "temporal_compression_ratio": 2,
        "max_text_seq_length": TEXT,
        **changes,
    }
    return {
        "tokenizer": None,
        "text_encoder": None,
        "vae": seeded(lambda: AutoencoderKLCogVideoX(**autoencoder)),
        "scheduler": CogVideoXDDIMScheduler(),
        "transformer": seeded(lambda: CogVideoXTransformer3DModel(**config)),
    }


COG = {"grid": (3, 4, 6), "shape": (1, 3, CHANNELS, 8, 12), "layout": "BTCHW"}
ROTARY = {"patch_size_t": 2, "use_rotary_positional_embeddings": True, "patch_bias": False}
"""CogVideoX 1.5: a patch is two frames deep, and the pipeline adds frames until they fill patches."""


def easyanimate(in_channels: int) -> dict[str, Any]:
    """The VAE halves time, and quarters height and width."""
    autoencoder = {
        "block_out_channels": (4, 4, 4),
        "down_block_types": ("SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D"),
        "up_block_types": ("SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D"),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": CHANNELS,
    }
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": in_channels,
        "out_channels": CHANNELS,
        "patch_size": 2,
        "num_layers": 1,
        "mmdit_layers": 1,
        "time_embed_dim": 23,
        "text_embed_dim": TEXT_WIDTH,
    }
    model = seeded(lambda: AutoencoderKLMagvit(**autoencoder))
    # The inpainting pipeline reads this from the config, though the VAE's class has no such argument.
    model.register_to_config(cache_mag_vae=True)
    return {
        "vae": model,
        "text_encoder": None,
        "tokenizer": None,
        "transformer": seeded(lambda: EasyAnimateTransformer3DModel(**config)),
        "scheduler": flow(),
    }


EASY = (5, 32, 48)
EASY_FACTS = {"size": EASY, "grid": (3, 4, 6), "shape": (1, CHANNELS, 3, 8, 12)}


def easy_call(**changes: Any) -> dict[str, Any]:
    masks = {f"{prefix}prompt_attention_mask": text_mask(TEXT, TEXT - 2) for prefix in ("", "negative_")}
    return call(EASY, **masks, **changes)


def as_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """`[1, C, T, H, W]` from 0 to 1."""
    frames = np.stack([np.atleast_3d(np.asarray(frame)) for frame in pictures])
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 255


def easy_inpaint() -> dict[str, Any]:
    return easy_call(video=as_tensor(video(EASY)), mask_video=as_tensor(mask_video(EASY, GRID)))


def mochi() -> dict[str, Any]:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "pooled_projection_dim": 17,
        "in_channels": CHANNELS,
        "text_embed_dim": 16,
        "time_embed_dim": 26,
    }
    return {
        "vae": None,  # it is only needed to decode
        "text_encoder": None,
        "tokenizer": None,
        "transformer": seeded(lambda: MochiTransformer3DModel(**config)),
        "scheduler": FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    }


MOCHI = (7, 64, 96)
"""The pipeline takes for granted that the VAE divides time by 6 and height and width by 8."""


def mochi_call() -> dict[str, Any]:
    text = {
        "prompt_embeds": embeds(TEXT, 16),
        "negative_prompt_embeds": embeds(TEXT, 16, seed=1),
        "prompt_attention_mask": text_mask(TEXT, TEXT - 2).bool(),
        "negative_prompt_attention_mask": text_mask(TEXT, TEXT - 2).bool(),
    }
    return call(MOCHI, **text)


def allegro() -> dict[str, Any]:
    """The VAE quarters time, and quarters height and width."""
    autoencoder = {
        "block_out_channels": (4, 4, 4),
        "down_block_types": ("AllegroDownBlock3D",) * 3,
        "up_block_types": ("AllegroUpBlock3D",) * 3,
        "temporal_downsample_blocks": (True, True, False),
        "temporal_upsample_blocks": (False, True, True),
        "latent_channels": CHANNELS,
        "layers_per_block": 1,
        "norm_num_groups": 2,
    }
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 1,
        "cross_attention_dim": 24,
        "sample_height": 8,
        "sample_width": 12,
        "sample_frames": 2,
        "caption_channels": TEXT_WIDTH,
    }
    return {
        "tokenizer": None,
        "text_encoder": None,
        "vae": seeded(lambda: AutoencoderKLAllegro(**autoencoder)),
        "transformer": seeded(lambda: AllegroTransformer3DModel(**config)),
        "scheduler": EulerAncestralDiscreteScheduler(),
    }


ALLEGRO = (8, 32, 48)
"""The pipeline rounds the number of latent frames up: 8 frames are 2."""


def allegro_call() -> dict[str, Any]:
    masks = {f"{prefix}prompt_attention_mask": text_mask(TEXT, TEXT - 2) for prefix in ("", "negative_")}
    return call(ALLEGRO, **masks, negative_prompt=None)


def consisid() -> dict[str, Any]:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 2 * CHANNELS,
        "out_channels": CHANNELS,
        "time_embed_dim": 23,
        "text_embed_dim": TEXT_WIDTH,
        "num_layers": 1,
        "sample_width": 12,
        "sample_height": 8,
        "sample_frames": SIZE[0],
        "temporal_compression_ratio": 2,
        "max_text_seq_length": TEXT,
        "use_rotary_positional_embeddings": True,
        "is_train_face": True,
        "cross_attn_interval": 1,
        "cross_attn_dim_head": 6,
        "cross_attn_num_heads": 2,
        "LFE_id_dim": FACE_WIDTH,
        "LFE_vit_dim": FACE_TOKEN_WIDTH,
        "LFE_depth": 2,
        "LFE_dim_head": 4,
        "LFE_num_heads": 2,
        "LFE_num_id_token": 3,
        "LFE_num_querie": 5,
        "LFE_output_dim": 21,
        "LFE_num_scale": 2,
    }
    return {**cogvideox(), "transformer": seeded(lambda: ConsisIDTransformer3DModel(**config))}


FACE_WIDTH, FACE_TOKEN_WIDTH = 17, 23


def consisid_call() -> dict[str, Any]:
    face = {"id_cond": embeds(FACE_WIDTH), "id_vit_hidden": [embeds(7, FACE_TOKEN_WIDTH, seed=s) for s in range(2)]}
    return call(image=picture(SIZE), **face)


video_row = partial(row, size=SIZE, grid=GRID, guided={"guidance_scale": 3.0}, guided_calls=1)
ROWS = (
    video_row(CogVideoXPipeline, cogvideox, call, **COG),
    video_row(
        CogVideoXPipeline, lambda: cogvideox(**ROTARY), call, "1.5", shape=(1, 4, CHANNELS, 8, 12), layout="BTCHW"
    ),
    video_row(CogVideoXImageToVideoPipeline, lambda: cogvideox(2 * CHANNELS), lambda: call(image=picture(SIZE)), **COG),
    video_row(
        CogVideoXVideoToVideoPipeline,
        cogvideox,
        lambda: without(call(video=video(SIZE), strength=0.7), "num_frames"),
        **COG,
        steps=2,
    ),
    video_row(
        CogVideoXFunControlPipeline,
        lambda: cogvideox(2 * CHANNELS),
        lambda: without(call(control_video=video(SIZE)), "num_frames"),
        **COG,
    ),
    video_row(EasyAnimatePipeline, lambda: easyanimate(CHANNELS), easy_call, **EASY_FACTS),
    video_row(
        EasyAnimateInpaintPipeline,
        lambda: easyanimate(2 * CHANNELS + 1),
        easy_inpaint,
        mask_argument="mask_video",
        source_argument="video",
        masking=Masking.HIDE,
        **EASY_FACTS,
    ),
    video_row(
        EasyAnimateInpaintPipeline,
        lambda: easyanimate(CHANNELS),
        easy_inpaint,
        "known latents put back",
        reason="diffusers 0.42.1 calls torch.tensor with two arguments where it puts known latents back",
        **EASY_FACTS,
    ),
    video_row(
        EasyAnimateControlPipeline,
        lambda: easyanimate(3 * CHANNELS),
        lambda: easy_call(control_video=as_tensor(video(EASY))),
        reason="diffusers 0.42.1 calls encode_prompt with an argument that it does not take",
        **EASY_FACTS,
    ),
    video_row(MochiPipeline, mochi, mochi_call, size=MOCHI, shape=(1, CHANNELS, 2, 8, 12)),
    video_row(AllegroPipeline, allegro, allegro_call, size=ALLEGRO, shape=(1, CHANNELS, 2, 8, 12)),
    video_row(ConsisIDPipeline, consisid, consisid_call, **COG),
)
