"""Flux, Flux.2 and Chroma: latents are packed into tokens, 2 x 2 each, and references stand behind them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    ChromaImg2ImgPipeline,
    ChromaInpaintPipeline,
    ChromaPipeline,
    ChromaTransformer2DModel,
    Flux2KleinInpaintPipeline,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from zoo.entry import seeded
from zoo.flux import CONFIG

from .parts import CHANNELS, IMAGE, IMAGE_GRID, POOLED, TEXT, TEXT_WIDTH, flow, packed_row, vae
from .row import STEPS, Masking, embeds, mask_picture, picture

PACKED = 4 * CHANNELS
SHAPE = (1, 24, PACKED)
REFERENCE = (1, 64, 64)
"""The smallest that Flux.2 takes: 256 tokens."""
UNPACKED = (1, CHANNELS, 8, 12)


def transformer(**changes: Any) -> FluxTransformer2DModel:
    config = {**CONFIG, "in_channels": PACKED, "pooled_projection_dim": POOLED, "guidance_embeds": True, **changes}
    return seeded(lambda: FluxTransformer2DModel(**config))


def parts(**model: Any) -> dict[str, Any]:
    text = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return {**text, "vae": vae(), "scheduler": flow(), "transformer": transformer(**model)}


def call(**changes: Any) -> dict[str, Any]:
    _, height, width = IMAGE
    return {
        "prompt_embeds": embeds(TEXT, TEXT_WIDTH),
        "pooled_prompt_embeds": embeds(POOLED, seed=2),
        "height": height,
        "width": width,
        "num_inference_steps": STEPS,
        **changes,
    }


GUIDED = {
    "true_cfg_scale": 3.0,
    "negative_prompt_embeds": embeds(TEXT, TEXT_WIDTH, seed=1),
    "negative_pooled_prompt_embeds": embeds(POOLED, seed=3),
}


def edit(**changes: Any) -> dict[str, Any]:
    return call(image=picture(IMAGE), **changes)


def inpaint(**changes: Any) -> dict[str, Any]:
    return edit(mask_image=mask_picture(IMAGE, IMAGE_GRID), **changes)


CONTROL = {"in_channels": 2 * PACKED, "out_channels": PACKED}
"""The control image is packed too, and joins the latents along channels."""
FILL = {"in_channels": 2 * PACKED + 4 * 2 * 2, "out_channels": PACKED}
"""The masked image and the pixels of the mask join the latents along channels."""
KONTEXT = {"max_area": IMAGE[1] * IMAGE[2], "_auto_resize": False}
"""The reference keeps its size: 4 x 6 tokens."""


def controlnet() -> FluxControlNetModel:
    config = {**CONFIG, "in_channels": PACKED, "pooled_projection_dim": POOLED, "num_single_layers": 0}
    return seeded(lambda: FluxControlNetModel(**config))


def flux2_vae() -> AutoencoderKLFlux2:
    """Its own batch norm scales the packed latents."""
    config = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": CHANNELS,
        "norm_num_groups": 2,
    }
    return seeded(lambda: AutoencoderKLFlux2(**config))


def flux2(guidance_embeds: bool = False) -> dict[str, Any]:
    config = {**CONFIG, "axes_dims_rope": (2, 2, 4, 4), "timestep_guidance_channels": 26}
    model = {"in_channels": PACKED, "out_channels": PACKED, "guidance_embeds": guidance_embeds}
    return {
        "text_encoder": None,
        "tokenizer": None,
        "vae": flux2_vae(),
        "scheduler": flow(),
        "transformer": seeded(lambda: Flux2Transformer2DModel(**{**config, **model})),
    }


def flux2_call(**changes: Any) -> dict[str, Any]:
    arguments = call(**changes)
    del arguments["pooled_prompt_embeds"]
    return arguments


def klein(**changes: Any) -> dict[str, Any]:
    return flux2_call(negative_prompt_embeds=embeds(TEXT, TEXT_WIDTH, seed=1), guidance_scale=1.0, **changes)


def klein_inpaint(**changes: Any) -> dict[str, Any]:
    return klein(image=picture(IMAGE), mask_image=mask_picture(IMAGE, IMAGE_GRID), strength=0.6, **changes)


def chroma() -> dict[str, Any]:
    extra = {"approximator_num_channels": 64, "approximator_hidden_dim": 29, "approximator_layers": 1}
    config = {**CONFIG, "in_channels": PACKED, **extra}
    model = seeded(lambda: ChromaTransformer2DModel(**config))
    # The inpainting pipeline reads this from the config, though the model class has no such argument.
    model.register_to_config(guidance_embeds=False)
    return {"text_encoder": None, "tokenizer": None, "vae": vae(), "scheduler": flow(), "transformer": model}


def chroma_call(**changes: Any) -> dict[str, Any]:
    valid = torch.arange(TEXT)[None] < TEXT - 2
    text = {"prompt_attention_mask": valid, "negative_prompt_attention_mask": valid}
    return klein(**text, **changes)


def chroma_edit(**changes: Any) -> dict[str, Any]:
    return chroma_call(image=picture(IMAGE), strength=0.6, **changes)


MASKED = {"mask_argument": "mask_image", "source_argument": "image"}
SCALED = {"guidance_scale": 3.0}
BLENDED = {**MASKED, "masking": Masking.BLEND}
HIDDEN = {**MASKED, "masking": Masking.HIDE}
flux_row = partial(packed_row, shape=SHAPE)
ROWS = (
    flux_row(FluxInpaintPipeline, parts, lambda: inpaint(strength=0.6), guided=GUIDED, steps=2, **BLENDED),
    flux_row(FluxFillPipeline, lambda: parts(**FILL), inpaint, **HIDDEN),
    flux_row(FluxKontextPipeline, parts, lambda: edit(**KONTEXT), guided=GUIDED, reference_tokens=24),
    flux_row(
        FluxKontextInpaintPipeline,
        parts,
        lambda: inpaint(strength=1.0, **KONTEXT),
        guided=GUIDED,
        reference_tokens=24,
        **BLENDED,
    ),
    flux_row(
        FluxControlInpaintPipeline,
        lambda: parts(**CONTROL),
        lambda: inpaint(control_image=picture(IMAGE, seed=1), strength=0.6),
        steps=2,
        **BLENDED,
    ),
    flux_row(FluxControlPipeline, lambda: parts(**CONTROL), lambda: call(control_image=picture(IMAGE))),
    flux_row(
        FluxControlImg2ImgPipeline,
        lambda: parts(**CONTROL),
        lambda: edit(control_image=picture(IMAGE, seed=1), strength=0.6),
        steps=2,
    ),
    flux_row(FluxImg2ImgPipeline, parts, lambda: edit(strength=0.6), guided=GUIDED, steps=2),
    flux_row(FluxPipeline, parts, call, guided=GUIDED),
    flux_row(
        FluxControlNetInpaintPipeline,
        lambda: {**parts(), "controlnet": controlnet()},
        lambda: inpaint(control_image=picture(IMAGE, seed=1), strength=0.6),
        steps=2,
        **BLENDED,
    ),
    flux_row(
        Flux2Pipeline,
        lambda: flux2(guidance_embeds=True),
        lambda: flux2_call(image=[picture(REFERENCE)]),
        reference_tokens=256,
    ),
    flux_row(
        Flux2KleinPipeline,
        flux2,
        lambda: klein(image=[picture(REFERENCE)]),
        shape=UNPACKED,
        guided=SCALED,
        reference_tokens=256,
    ),
    flux_row(
        Flux2KleinInpaintPipeline,
        flux2,
        klein_inpaint,
        shape=UNPACKED,
        guided=SCALED,
        reference_tokens=24,
        steps=2,
        **BLENDED,
    ),
    flux_row(
        Flux2KleinInpaintPipeline,
        flux2,
        lambda: klein_inpaint(image_reference=picture((1, 8, 16), seed=1)),
        "reference",
        shape=UNPACKED,
        guided=SCALED,
        reference_tokens=32,
        steps=2,
        **BLENDED,
    ),
    flux_row(
        Flux2KleinKVPipeline,
        flux2,
        lambda: flux2_call(image=[picture(REFERENCE)]),
        shape=UNPACKED,
        references_first=True,
        reference_tokens=256,
    ),
    flux_row(ChromaPipeline, chroma, chroma_call, guided=SCALED),
    flux_row(ChromaImg2ImgPipeline, chroma, chroma_edit, guided=SCALED, steps=2),
    flux_row(
        ChromaInpaintPipeline,
        chroma,
        lambda: chroma_edit(mask_image=mask_picture(IMAGE, IMAGE_GRID)),
        guided=SCALED,
        steps=2,
        **BLENDED,
    ),
)
