"""LTX and LTX-2: latents are packed into tokens; the patch is one latent. LTX-2 denoises audio too."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    LTX2ConditionPipeline,
    LTX2ImageToVideoPipeline,
    LTX2InContextPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition
from zoo.entry import seeded, text_mask

from .parts import TEXT, TEXT_WIDTH, flow
from .row import STEPS, embeds, picture, row, video

SIZE = (9, 64, 96)
"""A call for 3 x 4 x 6 tokens: the VAEs quarter time, and divide height and width by 16."""
GRID = (3, 4, 6)
CHANNELS = 4
PACKED = (1, 72, CHANNELS)
UNPACKED = (1, CHANNELS, *GRID)


def vae() -> AutoencoderKLLTXVideo:
    config = {
        "latent_channels": CHANNELS,
        "block_out_channels": (4, 4),
        "down_block_types": ("LTXVideoDownBlock3D",) * 2,
        "decoder_block_out_channels": (4, 4),
        "layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1),
        "spatio_temporal_scaling": (True, True),
        "decoder_spatio_temporal_scaling": (True, True),
        "decoder_inject_noise": (False,) * 3,
        "upsample_residual": (False, False),
        "upsample_factor": (1, 1),
        "patch_size": 4,
    }
    return seeded(lambda: AutoencoderKLLTXVideo(**config))


def parts() -> dict[str, Any]:
    config = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "num_layers": 1,
        "caption_channels": TEXT_WIDTH,
    }
    return {
        "scheduler": flow(),
        "vae": vae(),
        "text_encoder": None,
        "tokenizer": None,
        "transformer": seeded(lambda: LTXVideoTransformer3DModel(**config)),
    }


def call(width: int = TEXT_WIDTH, **changes: Any) -> dict[str, Any]:
    frames, height, image_width = SIZE
    return {
        "prompt_embeds": embeds(TEXT, width),
        "prompt_attention_mask": text_mask(TEXT, TEXT - 2),
        "negative_prompt_embeds": embeds(TEXT, width, seed=1),
        "negative_prompt_attention_mask": text_mask(TEXT, TEXT - 2),
        "num_frames": frames,
        "height": height,
        "width": image_width,
        "num_inference_steps": STEPS,
        "guidance_scale": 1.0,
        **changes,
    }


def conditions() -> dict[str, Any]:
    """The first frame stands in the latents; what belongs to a later frame stands in front of them."""
    later = LTXVideoCondition(video=video((5, *SIZE[1:]), seed=1), frame_index=4)
    first = LTXVideoCondition(image=picture(SIZE), frame_index=0)
    return call(conditions=[first, later], image_cond_noise_scale=0.0)


AUDIO_WIDTH = 4
CAPTION_WIDTH, CAPTION_LAYERS = 16, 2


def parts2() -> dict[str, Any]:
    """LTX-2: an audio VAE, and connectors between the text encoder's layers and the two streams."""
    autoencoder = {
        "latent_channels": CHANNELS,
        "block_out_channels": (8, 8),
        "down_block_types": ("LTX2VideoDownBlock3D",) * 2,
        "decoder_block_out_channels": (4, 4),
        "layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1),
        "spatio_temporal_scaling": (True, True),
        "decoder_spatio_temporal_scaling": (True, True),
        "decoder_inject_noise": (False,) * 3,
        "downsample_type": ("spatiotemporal",) * 2,
        "upsample_type": ("spatiotemporal",) * 2,
        "upsample_residual": (False, False),
        "upsample_factor": (1, 1),
        "patch_size": 4,
    }
    audio = {"base_channels": AUDIO_WIDTH, "ch_mult": (1,), "num_res_blocks": 1, "latent_channels": 2, "mel_bins": 8}
    connectors = {
        "caption_channels": CAPTION_WIDTH,
        "text_proj_in_factor": CAPTION_LAYERS,
        **{
            f"{stream}_connector_{name}": value
            for stream in ("video", "audio")
            for name, value in {
                "num_attention_heads": 2,
                "attention_head_dim": CAPTION_WIDTH // 2,
                "num_layers": 1,
                "num_learnable_registers": TEXT,
            }.items()
        },
    }
    config = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "audio_in_channels": AUDIO_WIDTH,
        "audio_out_channels": AUDIO_WIDTH,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 1,
        "caption_channels": CAPTION_WIDTH,
    }
    return {
        "scheduler": flow(),
        "vae": seeded(lambda: AutoencoderKLLTX2Video(**autoencoder)),
        "audio_vae": seeded(lambda: AutoencoderKLLTX2Audio(**audio)),
        "text_encoder": None,
        "tokenizer": None,
        "connectors": seeded(lambda: LTX2TextConnectors(**connectors)),
        "transformer": seeded(lambda: LTX2VideoTransformer3DModel(**config)),
        "vocoder": None,
    }


UNGUIDED = {
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_guidance_scale": 1.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
}


def call2(**changes: Any) -> dict[str, Any]:
    return call(CAPTION_WIDTH * CAPTION_LAYERS, **{**UNGUIDED, **changes})


def all_guidance() -> dict[str, Any]:
    """Without the attention of one block, and without the other stream, the model is called once more each."""
    return call2(guidance_scale=3.0, stg_scale=1.0, spatio_temporal_guidance_blocks=[0], modality_scale=3.0)


def conditions2() -> dict[str, Any]:
    first = LTX2VideoCondition(frames=picture(SIZE), index=0, crf=0)
    return call2(conditions=[first, LTX2VideoCondition(frames=video((5, *SIZE[1:]), seed=1), index=1)])


def in_context(**changes: Any) -> dict[str, Any]:
    """The tokens of the reference stand behind those of the video."""
    return call2(reference_conditions=[LTX2ReferenceCondition(frames=video(SIZE, seed=1))], **changes)


packed_row = partial(
    row, size=SIZE, grid=GRID, layout="BNC", shape=UNPACKED, guided={"guidance_scale": 3.0}, guided_calls=1
)
ROWS = (
    packed_row(LTXPipeline, parts, call, shape=PACKED),
    packed_row(LTXImageToVideoPipeline, parts, lambda: call(image=picture(SIZE)), shape=PACKED),
    packed_row(
        LTXConditionPipeline,
        lambda: {**parts(), "scheduler": flow(use_dynamic_shifting=False)},
        conditions,
        references_first=True,
        reference_tokens=48,
    ),
    packed_row(LTX2Pipeline, parts2, call2),
    packed_row(LTX2Pipeline, parts2, all_guidance, "all guidance", guided={}, calls=3),
    packed_row(LTX2ImageToVideoPipeline, parts2, lambda: call2(image=picture(SIZE))),
    packed_row(LTX2ConditionPipeline, parts2, conditions2, reference_tokens=48),
    packed_row(LTX2InContextPipeline, parts2, in_context, reference_tokens=72),
    packed_row(
        LTX2InContextPipeline,
        parts2,
        lambda: in_context(conditioning_attention_strength=0.5),
        "weaker reference",
        reference_tokens=72,
    ),
)
