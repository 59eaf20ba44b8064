"""Image pipelines of one family each: Stable Diffusion 3, Z-Image, Sana, PixArt, AuraFlow and others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from zoo.entry import seeded, text_mask

from .parts import CHANNELS, EIGHTH, EIGHTH_VAE, IMAGE, IMAGE_GRID, POOLED, TEXT, TEXT_WIDTH, flow, image_row, vae
from .row import STEPS, Masking, embeds, mask_picture, picture

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12}
SHAPE = (1, CHANNELS, 8, 12)
GUIDED = {"guidance_scale": 3.0}


def call(size: tuple[int, int, int] = IMAGE, masked: bool = False, **changes: Any) -> dict[str, Any]:
    """Arguments of a call; with masks of the text where the pipeline takes them."""
    _, height, width = size
    arguments: dict[str, Any] = {"height": height, "width": width, "num_inference_steps": STEPS, "guidance_scale": 1.0}
    for seed, prefix in enumerate(("", "negative_")):
        arguments[f"{prefix}prompt_embeds"] = embeds(TEXT, TEXT_WIDTH, seed=seed)
        if masked:
            arguments[f"{prefix}prompt_attention_mask"] = text_mask(TEXT, TEXT - 2)
    return {**arguments, **changes}


def inpaint(arguments: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**arguments, "image": picture(IMAGE), "mask_image": mask_picture(IMAGE, IMAGE_GRID), **changes}


SD3_CHANNELS = 16
"""The inpainting pipeline puts known latents back only if there are 16 channels."""
SD3_SHAPE = (1, SD3_CHANNELS, 8, 12)
SD3_CONFIG: dict[str, Any] = {
    **HEADS,
    "sample_size": 12,
    "in_channels": SD3_CHANNELS,
    "out_channels": SD3_CHANNELS,
    "num_layers": 1,
    "joint_attention_dim": TEXT_WIDTH,
    "caption_projection_dim": 24,
    "pooled_projection_dim": POOLED,
    "pos_embed_max_size": 9,
}


def sd3(**changes: Any) -> dict[str, Any]:
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    return {
        **dict.fromkeys(names),
        "vae": vae(latent_channels=SD3_CHANNELS),
        "scheduler": flow(use_dynamic_shifting=False),
        "transformer": seeded(lambda: SD3Transformer2DModel(**{**SD3_CONFIG, **changes})),
    }


def sd3_controlnet() -> dict[str, Any]:
    """Two blocks: what the controlnet gives to the last one is not added."""
    controlnet = seeded(lambda: SD3ControlNetModel(**SD3_CONFIG, extra_conditioning_channels=1))
    return {**sd3(num_layers=2), "controlnet": controlnet}


def sd3_call(**changes: Any) -> dict[str, Any]:
    pooled = {"pooled_prompt_embeds": embeds(POOLED), "negative_pooled_prompt_embeds": embeds(POOLED, seed=1)}
    return call(**pooled, **changes)


def z_image() -> dict[str, Any]:
    config = {
        "in_channels": CHANNELS,
        "dim": 24,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": TEXT_WIDTH,
        "axes_dims": (2, 4, 6),
        "axes_lens": (97, 29, 31),
    }
    return {
        "scheduler": flow(),
        "vae": vae(),
        "text_encoder": None,
        "tokenizer": None,
        "transformer": seeded(lambda: ZImageTransformer2DModel(**config)),
    }


def z_call(**changes: Any) -> dict[str, Any]:
    text = {
        f"{prefix}prompt_embeds": [embeds(TEXT, TEXT_WIDTH, seed=s)[0]] for s, prefix in enumerate(("", "negative_"))
    }
    return call(**{**text, "guidance_scale": 0.0, **changes})


def parts(model: Callable[[], torch.nn.Module], **changes: Any) -> dict[str, Any]:
    plain = {"tokenizer": None, "text_encoder": None, "vae": vae(), "scheduler": flow(use_dynamic_shifting=False)}
    return {**plain, "transformer": seeded(model), **changes}


def hidream() -> dict[str, Any]:
    config = {
        **HEADS,
        "patch_size": 2,
        "in_channels": CHANNELS,
        "num_layers": 1,
        "num_single_layers": 1,
        "caption_channels": [TEXT_WIDTH, 19],
        "text_emb_dim": POOLED,
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "axes_dims_rope": (4, 4, 4),
        "max_resolution": (12, 12),
        "llama_layers": [0, 1],
    }
    names = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "text_encoder_4", "tokenizer_4")
    return parts(lambda: HiDreamImageTransformer2DModel(**config), **dict.fromkeys(names))


HIDREAM_SIZE = {"default_sample_size": 10}
"""The pipeline scales every call to an area of so many latents squared."""


def hidream_call() -> dict[str, Any]:
    _, height, width = IMAGE
    arguments: dict[str, Any] = {"height": height, "width": width, "num_inference_steps": STEPS, "guidance_scale": 1.0}
    for seed, prefix in enumerate(("", "negative_")):
        arguments |= {
            f"{prefix}prompt_embeds_t5": embeds(TEXT, TEXT_WIDTH, seed=seed),
            f"{prefix}prompt_embeds_llama3": embeds(5, 19, seed=seed)[None].repeat(2, 1, 1, 1),
            f"{prefix}pooled_prompt_embeds": embeds(POOLED, seed=seed),
        }
    return arguments


def lumina2() -> dict[str, Any]:
    config = {
        "sample_size": 12,
        "in_channels": CHANNELS,
        "hidden_size": 48,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "multiple_of": 31,
        "axes_dim_rope": (4, 4, 4),
        "axes_lens": (37, 29, 31),
        "cap_feat_dim": TEXT_WIDTH,
    }
    return parts(lambda: Lumina2Transformer2DModel(**config), vae=vae(**EIGHTH_VAE))


def sana_parts(**changes: Any) -> dict[str, Any]:
    """A patch is one latent; the VAE divides height and width by 16."""
    widths = (4,) * 5
    autoencoder = {
        "latent_channels": CHANNELS,
        "attention_head_dim": 2,
        **{f"{part}_block_out_channels": widths for part in ("encoder", "decoder")},
        **{f"{part}_layers_per_block": (1,) * 5 for part in ("encoder", "decoder")},
        **{f"{part}_qkv_multiscales": ((),) * 5 for part in ("encoder", "decoder")},
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "encoder_out_shortcut": False,
        "decoder_in_shortcut": False,
    }
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
        **changes,
    }
    model = seeded(lambda: AutoencoderDC(**autoencoder))
    return parts(lambda: SanaTransformer2DModel(**config), vae=model)


def pixart() -> dict[str, Any]:
    config = {
        **HEADS,
        "in_channels": CHANNELS,
        "out_channels": 2 * CHANNELS,
        "num_layers": 1,
        "cross_attention_dim": 24,
        "sample_size": 12,
        "caption_channels": TEXT_WIDTH,
    }
    return parts(lambda: PixArtTransformer2DModel(**config), scheduler=DPMSolverMultistepScheduler())


def auraflow() -> dict[str, Any]:
    config = {
        **HEADS,
        "sample_size": 12,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "joint_attention_dim": TEXT_WIDTH,
        "caption_projection_dim": 24,
        "pos_embed_max_size": 81,
    }
    return parts(lambda: AuraFlowTransformer2DModel(**config))


TEXT_2, TEXT_2_WIDTH = 5, 16


def hunyuan_dit() -> dict[str, Any]:
    config = {
        **HEADS,
        "in_channels": CHANNELS,
        "patch_size": 2,
        "sample_size": 12,
        "hidden_size": 24,
        "num_layers": 2,
        "cross_attention_dim": TEXT_WIDTH,
        "cross_attention_dim_t5": TEXT_2_WIDTH,
        "pooled_projection_dim": 29,
        "text_len": TEXT,
        "text_len_t5": TEXT_2,
    }
    changes = {"vae": vae(**EIGHTH_VAE), "scheduler": DDPMScheduler(prediction_type="v_prediction")}
    checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return parts(lambda: HunyuanDiT2DModel(**config), **changes, **checker)


def hunyuan_dit_call() -> dict[str, Any]:
    text = {}
    for seed, prefix in enumerate(("", "negative_")):
        text[f"{prefix}prompt_embeds_2"] = embeds(TEXT_2, TEXT_2_WIDTH, seed=seed)
        text[f"{prefix}prompt_attention_mask_2"] = text_mask(TEXT_2, TEXT_2 - 1)
    return call(EIGHTH, masked=True, use_resolution_binning=False, **text)


def cogview4() -> dict[str, Any]:
    config = {
        **HEADS,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 1,
        "text_embed_dim": TEXT_WIDTH,
        "time_embed_dim": 23,
        "condition_dim": 26,
        "pos_embed_max_size": 9,
        "sample_size": 12,
        "rope_axes_dim": (41, 43),
    }
    scheduler = flow(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear")
    return parts(lambda: CogView4Transformer2DModel(**config), vae=vae(**EIGHTH_VAE), scheduler=scheduler)


MASKED = {"mask_argument": "mask_image", "source_argument": "image", "masking": Masking.BLEND}
grid_row = partial(image_row, shape=SHAPE, guided=GUIDED, guided_calls=1)
sd3_row = partial(grid_row, shape=SD3_SHAPE)
z_row = partial(grid_row, layout="CTHW")
"""Z-Image takes lists of samples."""
ROWS = (
    sd3_row(StableDiffusion3InpaintPipeline, sd3, lambda: inpaint(sd3_call(), strength=0.6), steps=2, **MASKED),
    sd3_row(
        StableDiffusion3Img2ImgPipeline,
        sd3,
        lambda: sd3_call(image=picture(IMAGE), strength=0.6),
        steps=2,
    ),
    sd3_row(
        StableDiffusion3ControlNetInpaintingPipeline,
        sd3_controlnet,
        lambda: sd3_call(control_image=picture(IMAGE), control_mask=mask_picture(IMAGE, IMAGE_GRID)),
        mask_argument="control_mask",
        source_argument="control_image",
        masking=Masking.HIDE,
    ),
    sd3_row(StableDiffusion3Pipeline, sd3, sd3_call),
    z_row(ZImagePipeline, z_image, z_call),
    z_row(
        ZImageImg2ImgPipeline,
        z_image,
        lambda: z_call(image=picture(IMAGE), strength=0.6),
        steps=2,
    ),
    z_row(ZImageInpaintPipeline, z_image, lambda: inpaint(z_call(), strength=0.6), steps=2, **MASKED),
    grid_row(HiDreamImagePipeline, hidream, hidream_call, attributes=HIDREAM_SIZE),
    grid_row(Lumina2Pipeline, lumina2, lambda: call(EIGHTH, masked=True), size=EIGHTH, guided_calls=2),
    grid_row(
        SanaPipeline,
        sana_parts,
        lambda: call(EIGHTH, masked=True, use_resolution_binning=False, negative_prompt=None),
        size=EIGHTH,
        shape=(1, CHANNELS, 4, 6),
    ),
    grid_row(
        PixArtSigmaPipeline, pixart, lambda: call(masked=True, use_resolution_binning=False, negative_prompt=None)
    ),
    grid_row(AuraFlowPipeline, auraflow, lambda: call(masked=True)),
    grid_row(HunyuanDiTPipeline, hunyuan_dit, hunyuan_dit_call, size=EIGHTH),
    grid_row(CogView4Pipeline, cogview4, lambda: call(EIGHTH), size=EIGHTH, guided_calls=2),
)
