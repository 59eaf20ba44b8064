"""Pipelines that edit one image and stand alone: Bria FIBO, Z-Image's controlnet, Joy-Image, LongCat, Sana Sprint."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    BriaFiboEditPipeline,
    BriaFiboTransformer2DModel,
    JoyImageEditPipeline,
    JoyImageEditTransformer3DModel,
    LongCatImageEditPipeline,
    LongCatImageTransformer2DModel,
    SanaSprintImg2ImgPipeline,
    SCMScheduler,
    ZImageControlNetInpaintPipeline,
    ZImageControlNetModel,
)
from torch import nn
from zoo.entry import newer, seeded, text_mask
from zoo.flux import CONFIG

from . import flux, images, wan
from .parts import CHANNELS, EIGHTH, IMAGE, IMAGE_GRID, TEXT, TEXT_WIDTH, flow, image_row, packed_row, vae
from .row import STEPS, Masking, embeds, mask_picture, picture

BriaFibo2Pipeline = newer("BriaFibo2Pipeline")
BriaFibo2Transformer2DModel = newer("BriaFibo2Transformer2DModel")

PROMPT = '{"edit_instruction": "remove it"}'
FIBO_WIDTH = 6


class Tokenizer:
    """Stands for FIBO's tokenizer: every prompt is the same tokens."""

    def __call__(self, prompts: list[str], **_: Any) -> SimpleNamespace:
        ids = torch.arange(TEXT).expand(len(prompts), -1)
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


class TextEncoder(nn.Module):
    """Stands for FIBO's language model: an embedding, and a copy of it for each of its layers."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TEXT, FIBO_WIDTH)

    def forward(self, ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        # The pipeline gives an empty prompt a token of its own, with a large number.
        hidden = self.embed(ids % TEXT)
        return SimpleNamespace(hidden_states=(hidden, 0.9 * hidden, 0.8 * hidden))


def fibo() -> dict[str, Any]:
    """A token is one latent; the pipeline takes for granted that the VAE divides height and width by 16."""
    halvings = [False] * 4
    autoencoder = wan.vae(dim_mult=[1] * 5, temperal_downsample=halvings, scale_factor_spatial=16)
    config = {**CONFIG, "joint_attention_dim": 2 * FIBO_WIDTH, "text_encoder_dim": FIBO_WIDTH}
    return {
        "transformer": seeded(lambda: BriaFiboTransformer2DModel(**config)),
        "scheduler": flow(),
        "vae": autoencoder,
        "text_encoder": seeded(TextEncoder),
        "tokenizer": Tokenizer(),
    }


def fibo_call() -> dict[str, Any]:
    size = {"height": EIGHTH[1], "width": EIGHTH[2], "_auto_resize": False}
    edit = {"image": picture(EIGHTH), "mask": mask_picture(EIGHTH, IMAGE_GRID), "prompt": PROMPT}
    return {**edit, **size, "num_inference_steps": STEPS, "guidance_scale": 1.0}


def fibo2() -> dict[str, Any]:
    config = {
        "in_channels": 2,
        "dim": 24,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "cap_feat_dim": TEXT_WIDTH,
        "injection_layer_ids": (0,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 3,
        "max_num_gist_tokens": 8,
        "gist_step": 1,
        "gist_min_text_len": 3,
        "gist_max_text_len": 17,
        "axes_dims": (2, 4, 6),
        "axes_lens": (37, 29, 31),
    }
    return {
        "transformer": seeded(lambda: BriaFibo2Transformer2DModel(**config)),
        "scheduler": flow(),
        "vae": flux.flux2_vae(),
        "text_encoder": None,
        "processor": None,
    }


def fibo2_call() -> dict[str, Any]:
    text = {f"{p}prompt_embeds": embeds(2, TEXT, TEXT_WIDTH, seed=seed) for seed, p in enumerate(("", "negative_"))}
    edit = {"image": picture(IMAGE), "mask": mask_picture(IMAGE, IMAGE_GRID)}
    size = {"height": IMAGE[1], "width": IMAGE[2]}
    return {**text, **edit, **size, "num_inference_steps": STEPS, "guidance_scale": 1.0}


def z_image_controlnet() -> dict[str, Any]:
    # The control image, the mask and the masked image, joined along channels.
    config = {
        "control_layers_places": [0],
        "control_refiner_layers_places": [0],
        "control_in_dim": 2 * CHANNELS + 1,
        "add_control_noise_refiner": "control_noise_refiner",
        "dim": 24,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
    }
    return {**images.z_image(), "controlnet": seeded(lambda: ZImageControlNetModel(**config))}


def z_image_control_call() -> dict[str, Any]:
    return images.inpaint(images.z_call(), control_image=picture(IMAGE, seed=1))


def sprint() -> dict[str, Any]:
    parts = images.sana_parts(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return {**parts, "scheduler": SCMScheduler()}


def sprint_call() -> dict[str, Any]:
    text = {"prompt_embeds": embeds(TEXT, TEXT_WIDTH), "prompt_attention_mask": text_mask(TEXT, TEXT - 2)}
    steps = {"num_inference_steps": STEPS, "intermediate_timesteps": None, "strength": 0.6}
    size = {"height": EIGHTH[1], "width": EIGHTH[2], "use_resolution_binning": False}
    return {**text, **steps, **size, "image": picture(EIGHTH)}


LONGCAT_CHANNELS = 16
"""The pipeline takes this for granted."""


def longcat() -> dict[str, Any]:
    """Every picture is scaled to a megapixel; this VAE divides height and width by 64."""
    halvings = {
        "block_out_channels": (2,) * 7,
        "down_block_types": ("DownEncoderBlock2D",) * 7,
        "up_block_types": ("UpDecoderBlock2D",) * 7,
        "latent_channels": LONGCAT_CHANNELS,
        "norm_num_groups": 1,
        "mid_block_add_attention": False,
    }
    config = {**CONFIG, "in_channels": 4 * LONGCAT_CHANNELS}
    return {
        "scheduler": flow(),
        "vae": vae(**halvings),
        "text_encoder": None,
        "tokenizer": None,
        "text_processor": TextProcessor(),
        "transformer": seeded(lambda: LongCatImageTransformer2DModel(**config)),
    }


class TextProcessor:
    """Stands for the processor of the language model, of which the pipeline takes this part when it is made."""

    image_processor = None


def longcat_call() -> dict[str, Any]:
    text = {f"{p}prompt_embeds": embeds(TEXT, TEXT_WIDTH, seed=seed) for seed, p in enumerate(("", "negative_"))}
    return {**text, "image": picture(IMAGE), "num_inference_steps": STEPS, "guidance_scale": 1.0}


def joyimage() -> dict[str, Any]:
    config = {
        "patch_size": [1, 2, 2],
        "in_channels": 5,
        "hidden_size": 24,
        "num_attention_heads": 2,
        "text_dim": TEXT_WIDTH,
        "num_layers": 1,
        "rope_dim_list": [2, 4, 6],
    }
    halvings = {"dim_mult": [1] * 7, "temperal_downsample": [False] * 6, "scale_factor_spatial": 64}
    return {
        "scheduler": flow(use_dynamic_shifting=False),
        "vae": wan.vae(base_dim=2, num_res_blocks=0, **halvings),
        "text_encoder": None,
        "tokenizer": None,
        "transformer": seeded(lambda: JoyImageEditTransformer3DModel(**config)),
        "processor": None,
    }


def joyimage_call() -> dict[str, Any]:
    text: dict[str, Any] = {}
    for seed, prefix in enumerate(("", "negative_")):
        text[f"{prefix}prompt_embeds"] = embeds(TEXT, TEXT_WIDTH, seed=seed)
        text[f"{prefix}prompt_embeds_mask"] = text_mask(TEXT, TEXT)
    return {**text, "image": picture(SQUARE), "num_inference_steps": STEPS, "guidance_scale": 1.0}


SQUARE = (1, 24, 24)


ROWS = (
    packed_row(
        BriaFiboEditPipeline,
        fibo,
        fibo_call,
        size=EIGHTH,
        shape=(1, 24, 5),
        guided=images.GUIDED,
        guided_calls=1,
        reference_tokens=24,
        mask_argument="mask",
        source_argument="image",
        masking=Masking.HIDE,
    ),
    image_row(
        BriaFibo2Pipeline,
        fibo2,
        fibo2_call,
        shape=(1, 2, 8, 12),
        guided=images.GUIDED,
        mask_argument="mask",
        source_argument="image",
        masking=Masking.HIDE,
    ),
    image_row(
        ZImageControlNetInpaintPipeline,
        z_image_controlnet,
        z_image_control_call,
        layout="CTHW",
        shape=(1, CHANNELS, 8, 12),
        guided=images.GUIDED,
        guided_calls=1,
        mask_argument="mask_image",
        source_argument="image",
        masking=Masking.HIDE,
    ),
    image_row(
        SanaSprintImg2ImgPipeline,
        sprint,
        sprint_call,
        size=EIGHTH,
        shape=(1, CHANNELS, 4, 6),
        steps=2,
    ),
    packed_row(
        LongCatImageEditPipeline,
        longcat,
        longcat_call,
        reason="diffusers 0.42.1 counts the prompts even if it is given embeddings, and refuses both together",
    ),
    image_row(
        JoyImageEditPipeline,
        joyimage,
        joyimage_call,
        size=(1, 1024, 1024),
        grid=(1, 8, 8),
        shape=(1, 5, 16, 16),
        layout="BICTHW",
        guided=images.GUIDED,
    ),
)
