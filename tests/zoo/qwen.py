"""Qwen-Image, Stable Diffusion 3, Z-Image and the Sana models."""

from __future__ import annotations

from typing import Any

from diffusers import (
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SanaVideoTransformer3DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)

from .entry import IMAGE, VIDEO, Draw, Entry, image, latents, seeded, text_mask, tokens

PATCH = (1, 2, 2)
N, TEXT = tokens(IMAGE), 11
REFERENCE = (1, 3, 4)
WITH_REFERENCE = (1, 1, N + tokens(REFERENCE))


def qwen(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw(1, N, 5),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "encoder_hidden_states_mask": text_mask(TEXT),
        "timestep": draw.sigma(),
        "img_shapes": [[IMAGE]],
        "return_dict": False,
    }


def qwen_edit(seed: int = 0) -> dict[str, Any]:
    latents_and_reference = Draw(seed + 1)(1, tokens(WITH_REFERENCE), 5)
    return {**qwen(seed), "hidden_states": latents_and_reference, "img_shapes": [[IMAGE, REFERENCE]]}


def qwen_unmasked(seed: int = 0) -> dict[str, Any]:
    return {**qwen(seed), "encoder_hidden_states_mask": None}


def sd3(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": image(draw, 5, IMAGE, 2),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "pooled_projections": draw(1, 17),
        "timestep": draw.timestep(),
        "return_dict": False,
    }


def z_image(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "x": [latents(draw, 5, IMAGE, PATCH)[0]],
        "t": draw.sigma(),
        "cap_feats": [draw(TEXT, 13)],
        "return_dict": False,
    }


def sana(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": image(draw, 5, IMAGE),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "timestep": draw.timestep(),
        "encoder_attention_mask": text_mask(TEXT),
        "return_dict": False,
    }


def sana_video(seed: int = 0) -> dict[str, Any]:
    return {**sana(seed), "hidden_states": latents(Draw(seed + 1), 5, VIDEO, PATCH)}


def build_qwen(**variant: Any) -> QwenImageTransformer2DModel:
    config = {
        "patch_size": 1,
        "in_channels": 5,
        "out_channels": 5,
        "num_layers": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "joint_attention_dim": 13,
        "axes_dims_rope": (2, 4, 6),
    }
    return seeded(lambda: QwenImageTransformer2DModel(**config, **variant))


def build_sd3() -> SD3Transformer2DModel:
    config = {
        "sample_size": 14,
        "in_channels": 5,
        "out_channels": 5,
        "num_layers": 3,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "joint_attention_dim": 13,
        "caption_projection_dim": 24,
        "pooled_projection_dim": 17,
        "pos_embed_max_size": 9,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return seeded(lambda: SD3Transformer2DModel(**config))


def build_z_image() -> ZImageTransformer2DModel:
    config = {
        "in_channels": 5,
        "dim": 24,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 13,
        "axes_dims": (2, 4, 6),
        "axes_lens": (97, 29, 31),
    }
    return seeded(lambda: ZImageTransformer2DModel(**config))


SANA: dict[str, Any] = {
    "in_channels": 5,
    "out_channels": 5,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_cross_attention_heads": 3,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 24,
    "caption_channels": 13,
    "sample_size": 14,
}


def build_sana() -> SanaTransformer2DModel:
    return seeded(lambda: SanaTransformer2DModel(**SANA, qk_norm="rms_norm_across_heads"))


def build_sana_video() -> SanaVideoTransformer3DModel:
    return seeded(lambda: SanaVideoTransformer3DModel(**SANA, rope_max_seq_len=37))


PACKED = {"hidden_states": 1}
JOINT = "text before image tokens along one axis"
ENTRIES = (
    Entry("QwenImageTransformer2DModel", build_qwen, qwen, IMAGE, PACKED, note=JOINT + "; a key mask over both"),
    Entry("QwenImageTransformer2DModel (no mask)", build_qwen, qwen_unmasked, IMAGE, PACKED, note=JOINT),
    Entry(
        "QwenImageTransformer2DModel (edit)",
        lambda: build_qwen(zero_cond_t=True),
        qwen_edit,
        WITH_REFERENCE,
        PACKED,
        note=f"{JOINT}; the grid here is all packed tokens: {N} latents, then {tokens(REFERENCE)} of a reference "
        "image, which are modulated as at time 0: one of two modulations is chosen for each token by an index",
    ),
    Entry(
        "SD3Transformer2DModel",
        build_sd3,
        sd3,
        IMAGE,
        note="image before text tokens along one axis; the first block also attends to the image alone, the last "
        "computes no text; the positional table is cropped to the grid",
    ),
    Entry(
        "ZImageTransformer2DModel",
        build_z_image,
        z_image,
        IMAGE,
        note="lists of [C, F, H, W] without a batch dim; tokens are born by a reshape into patches, then padded to a "
        "multiple of 32 with a learned token; two blocks' axes: image alone, then image before text; the rotary table "
        "is complex, indexed by positions, and kept on the module by the first call: capture after an eager call",
    ),
    Entry(
        "SanaTransformer2DModel",
        build_sana,
        sana,
        IMAGE,
        note="linear attention: sums of key x value over all tokens; each block turns tokens back into the grid for a "
        "3 x 3 depthwise convolution, so a token needs its neighbours",
    ),
    Entry(
        "SanaVideoTransformer3DModel",
        build_sana_video,
        sana_video,
        VIDEO,
        note="linear attention: sums of rotated key x value, and of keys, over all tokens; each block has a 3 x 3 "
        "depthwise convolution in each frame and one over 3 frames",
    ),
)
