"""Video models of one family each: CogVideoX, Mochi, Allegro, EasyAnimate."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AllegroTransformer3DModel,
    CogVideoXTransformer3DModel,
    EasyAnimateTransformer3DModel,
    MochiTransformer3DModel,
)

from .entry import VIDEO, Draw, Entry, coordinates, latents, seeded, text_mask, tokens

PATCH = (1, 2, 2)
TEXT = 11
N = tokens(VIDEO)


def rotary(draw: Draw, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of random angles: any rotary table has this form."""
    angles = 3 * draw(*shape).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def cogvideox(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": latents(draw, 5, VIDEO, PATCH).transpose(1, 2).contiguous(),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "timestep": draw.timestep(),
        "return_dict": False,
    }


def cogvideox15(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 1)
    return {
        **cogvideox(seed),
        "hidden_states": latents(draw, 5, VIDEO, (2, 2, 2)).transpose(1, 2).contiguous(),
        "ofs": draw.timestep(),
        "image_rotary_emb": rotary(draw, N, 8),
    }


def mochi(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": latents(draw, 5, VIDEO, PATCH),
        "encoder_hidden_states": draw(1, TEXT, 16),
        "timestep": draw.timestep(),
        "encoder_attention_mask": text_mask(TEXT).bool(),
        "return_dict": False,
    }


def allegro(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    where = coordinates(VIDEO).long().T[:, None]
    return {
        "hidden_states": latents(draw, 5, VIDEO, PATCH),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "timestep": draw.timestep(),
        "encoder_attention_mask": text_mask(TEXT),
        "image_rotary_emb": (tuple(rotary(draw, size, 2) for size in VIDEO), tuple(where)),
        "return_dict": False,
    }


def allegro_masked(seed: int = 0) -> dict[str, Any]:
    t, h, w = VIDEO
    valid = torch.ones(1, t, 2 * h, 2 * w)
    valid[:, :, :, -2:] = 0
    return {**allegro(seed), "attention_mask": valid}


def easyanimate(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": latents(draw, 5, VIDEO, PATCH),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "encoder_hidden_states_t5": draw(1, 17, 19),
        "inpaint_latents": latents(draw, 3, VIDEO, PATCH),
        "return_dict": False,
    }


def build_cogvideox(**variant: Any) -> CogVideoXTransformer3DModel:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 5,
        "out_channels": 5,
        "time_embed_dim": 26,
        "text_embed_dim": 13,
        "num_layers": 2,
        "sample_width": 14,
        "sample_height": 10,
        "sample_frames": 9,
        "patch_size": 2,
        "max_text_seq_length": TEXT,
    }
    return seeded(lambda: CogVideoXTransformer3DModel(**{**config, **variant}))


def build_mochi() -> MochiTransformer3DModel:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "pooled_projection_dim": 17,
        "in_channels": 5,
        "text_embed_dim": 16,
        "time_embed_dim": 26,
    }
    return seeded(lambda: MochiTransformer3DModel(**config))


def build_allegro() -> AllegroTransformer3DModel:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 5,
        "out_channels": 5,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "sample_height": 10,
        "sample_width": 14,
        "sample_frames": 3,
        "caption_channels": 13,
    }
    return seeded(lambda: AllegroTransformer3DModel(**config))


def build_easyanimate() -> EasyAnimateTransformer3DModel:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 8,
        "out_channels": 5,
        "patch_size": 2,
        "num_layers": 2,
        "mmdit_layers": 1,
        "time_embed_dim": 23,
        "text_embed_dim": 13,
        "text_embed_dim_t5": 19,
    }
    return seeded(lambda: EasyAnimateTransformer3DModel(**config))


ROTARY = {
    "patch_size_t": 2,
    "ofs_embed_dim": 26,
    "use_rotary_positional_embeddings": True,
    "patch_bias": False,
}
JOINT = "text before video tokens along one axis, in patch embedding, attention and final norm"
ENTRIES = (
    Entry(
        "CogVideoXTransformer3DModel",
        build_cogvideox,
        cogvideox,
        VIDEO,
        note=JOINT + "; a positional table over both is added",
    ),
    Entry(
        "CogVideoXTransformer3DModel (another size)",
        lambda: build_cogvideox(sample_width=20, sample_height=12),
        cogvideox,
        VIDEO,
        note=JOINT + "; the positional table is not the config's: it is made in the call, and filled through `.data`",
    ),
    Entry(
        "CogVideoXTransformer3DModel (1.5)",
        lambda: build_cogvideox(**ROTARY),
        cogvideox15,
        VIDEO,
        note=JOINT + "; the rotary table is an input and is written to the slice of the video tokens; tokens are born "
        "by a reshape of latents into patches, not by a convolution",
    ),
    Entry(
        "MochiTransformer3DModel",
        build_mochi,
        mochi,
        VIDEO,
        note="text after video tokens; frames are folded into the batch while tokens are born; attention drops the "
        "masked text tokens by an index that is data; the last block computes no text",
    ),
    Entry(
        "AllegroTransformer3DModel",
        build_allegro,
        allegro,
        VIDEO,
        note="frames are folded into the batch while tokens are born; positions are integer inputs that index tables",
    ),
    Entry(
        "AllegroTransformer3DModel (masked)",
        build_allegro,
        allegro_masked,
        VIDEO,
        note="as above; a key mask over video tokens, max-pooled from a mask of latents",
    ),
    Entry(
        "EasyAnimateTransformer3DModel",
        build_easyanimate,
        easyanimate,
        VIDEO,
        note="text before video tokens along one axis; frames are folded into the batch while tokens are born",
    ),
)
