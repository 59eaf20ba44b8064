"""Kandinsky, Cosmos, ConsisID and Latte."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ConsisIDTransformer3DModel,
    CosmosTransformer3DModel,
    Kandinsky5Transformer3DModel,
    LatteTransformer3DModel,
)
from torch import nn

from .entry import VIDEO, Draw, Entry, latents, newer, seeded, tokens
from .video import rotary

Kandinsky6SRTransformer3DModel = newer("Kandinsky6SRTransformer3DModel")
Kandinsky6Transformer3DModel = newer("Kandinsky6Transformer3DModel")

PATCH = (1, 2, 2)
TEXT, AUDIO = 11, 17
N = tokens(VIDEO)
FRACTAL = (3, 8, 16)


def text_to_video(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": latents(draw, 5, VIDEO, PATCH),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "return_dict": False,
    }


def channels_last(seed: int = 0) -> dict[str, Any]:
    kwargs = text_to_video(seed)
    kwargs["hidden_states"] = kwargs["hidden_states"].permute(0, 2, 3, 4, 1).contiguous()
    return {**kwargs, "pooled_projections": Draw(seed + 1)(1, 17)}


def kandinsky5(seed: int = 0) -> dict[str, Any]:
    places = {"visual_rope_pos": tuple(map(torch.arange, VIDEO)), "text_rope_pos": torch.arange(TEXT)}
    return {**channels_last(seed), **places}


def kandinsky6(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 2)
    return {**channels_last(seed), "audio_hidden_states": draw(1, AUDIO, 7)}


def kandinsky6_sr(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {"hidden_states": draw(1, *FRACTAL, 11), "timestep": draw.timestep(), "return_dict": False}


def cosmos(seed: int = 0) -> dict[str, Any]:
    return {**text_to_video(seed), "fps": 16}


def cosmos_per_frame(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 1)
    condition = {"condition_mask": latents(draw, 1, VIDEO, PATCH), "timestep": draw.timestep(1, 1, VIDEO[0], 1, 1)}
    return {**cosmos(seed), **condition}


def consisid(seed: int = 0) -> dict[str, Any]:
    draw, kwargs = Draw(seed + 1), text_to_video(seed)
    return {
        **kwargs,
        "hidden_states": kwargs["hidden_states"].transpose(1, 2).contiguous(),
        "image_rotary_emb": rotary(draw, N, 8),
        "id_cond": draw(1, 17),
        "id_vit_hidden": [draw(1, 7, 23) for _ in range(2)],
    }


def latte(seed: int = 0) -> dict[str, Any]:
    return {**text_to_video(seed), "encoder_attention_mask": None}


def build_kandinsky5() -> Kandinsky5Transformer3DModel:
    config = {
        "in_visual_dim": 5,
        "in_text_dim": 13,
        "in_text_dim2": 17,
        "time_dim": 19,
        "out_visual_dim": 5,
        "model_dim": 24,
        "ff_dim": 53,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (2, 4, 6),
    }
    return seeded(lambda: Kandinsky5Transformer3DModel(**config))


def build_kandinsky6() -> nn.Module:
    config = {
        "in_visual_dim": 5,
        "out_visual_dim": 5,
        "in_text_dim": 13,
        "in_text_dim2": 17,
        "time_dim": 19,
        "model_dim": 24,
        "ff_dim": 53,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (2, 4, 6),
        "visual_cond": False,
        "in_audio_dim": 7,
        "out_audio_dim": 7,
        "model_dim_a": 16,
        "ff_dim_a": 29,
        "axes_dims_a": (2, 2, 4),
    }
    return seeded(lambda: Kandinsky6Transformer3DModel(**config))


def build_kandinsky6_sr() -> nn.Module:
    config = {
        "in_visual_dim": 5,
        "out_visual_dim": 7,
        "time_dim": 19,
        "model_dim": 32,
        "ff_dim": 53,
        "num_visual_blocks": 1,
        "axes_dims": (4, 6, 6),
        "nabla_window": (3, 1, 1),
    }
    return seeded(lambda: Kandinsky6SRTransformer3DModel(**config))


def build_cosmos(**variant: Any) -> CosmosTransformer3DModel:
    config = {
        "in_channels": 5,
        "out_channels": 5,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "mlp_ratio": 2,
        "text_embed_dim": 13,
        "adaln_lora_dim": 11,
        "max_size": (5, 22, 26),
        "concat_padding_mask": False,  # it needs torchvision
    }
    return seeded(lambda: CosmosTransformer3DModel(**{**config, **variant}))


def build_consisid() -> ConsisIDTransformer3DModel:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 5,
        "out_channels": 5,
        "time_embed_dim": 23,
        "text_embed_dim": 13,
        "num_layers": 2,
        "sample_width": 14,
        "sample_height": 10,
        "sample_frames": 9,
        "max_text_seq_length": TEXT,
        "use_rotary_positional_embeddings": True,
        "is_train_face": True,
        "cross_attn_dim_head": 6,
        "cross_attn_num_heads": 2,
        "LFE_id_dim": 17,
        "LFE_vit_dim": 23,
        "LFE_depth": 2,
        "LFE_dim_head": 4,
        "LFE_num_heads": 2,
        "LFE_num_id_token": 3,
        "LFE_num_querie": 5,
        "LFE_output_dim": 21,
        "LFE_num_scale": 2,
    }
    return seeded(lambda: ConsisIDTransformer3DModel(**config))


def build_latte() -> LatteTransformer3DModel:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 5,
        "out_channels": 10,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "attention_bias": True,
        "sample_size": 14,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 29,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "caption_channels": 13,
        "video_length": VIDEO[0],
    }
    return seeded(lambda: LatteTransformer3DModel(**config))


ENTRIES = (
    Entry(
        "Kandinsky5Transformer3DModel",
        build_kandinsky5,
        kandinsky5,
        VIDEO,
        note="latents are channels-last; the tokens stand in the grid [B, T, H, W, C] in the patch and output layers, "
        "along one axis in the blocks; the rotary table is [.., 2, 2] matrices; the output is a bare tensor",
    ),
    Entry(
        "Kandinsky6Transformer3DModel",
        build_kandinsky6,
        kandinsky6,
        VIDEO,
        note="as Kandinsky 5, with audio tokens in a stream of their own that attends to the video tokens and is an "
        "output too",
    ),
    Entry(
        "Kandinsky6SRTransformer3DModel",
        build_kandinsky6_sr,
        kandinsky6_sr,
        FRACTAL,
        note="tokens are reordered into 8 x 8 tiles; attention is flex_attention with a block mask that is computed "
        "from the keys and queries of tiles",
    ),
    Entry(
        "CosmosTransformer3DModel",
        lambda: build_cosmos(extra_pos_embed_type="learnable"),
        cosmos,
        VIDEO,
        note="tokens are born by a reshape into patches; a learned positional table, normalised over channels",
    ),
    Entry(
        "CosmosTransformer3DModel (2.5)",
        lambda: build_cosmos(in_channels=6, extra_pos_embed_type=None),
        cosmos_per_frame,
        VIDEO,
        note="a timestep for each frame, expanded to tokens; the condition mask joins the latents along channels",
    ),
    Entry(
        "ConsisIDTransformer3DModel",
        build_consisid,
        consisid,
        VIDEO,
        note="text before video tokens along one axis; a perceiver in which video tokens attend to the face",
    ),
    Entry(
        "LatteTransformer3DModel",
        build_latte,
        latte,
        VIDEO,
        note="factorised attention: frames are folded into the batch in one block, places in the next; tokens never "
        "stand along one axis",
    ),
)
