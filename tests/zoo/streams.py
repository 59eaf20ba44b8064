"""Models grown from Wan that generate in chunks: frames of history, two timesteps, caches of their own."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AnyFlowTransformer3DModel, HeliosTransformer3DModel
from diffusers.models.transformers import AnyFlowFARTransformer3DModel, WanAnimate2Transformer3DModel
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

from .entry import VIDEO, Draw, Entry, latents, seeded, tokens
from .wan import CONFIG, PATCH, TEXT, text_to_video

WITHOUT_ROPE = {name: value for name, value in CONFIG.items() if name != "rope_max_seq_len"}
HISTORY = {"short": 2, "mid": 2, "long": 4}

EVEN = (3, 4, 6)


def anyflow(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": latents(draw, 5, VIDEO, PATCH).transpose(1, 2).contiguous(),
        "timestep": draw.timestep(1, VIDEO[0]),
        "r_timestep": draw.timestep(1, VIDEO[0]),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "return_dict": False,
    }


def helios(seed: int = 0) -> dict[str, Any]:
    draw, kwargs, first = Draw(seed + 1), text_to_video(seed), 0
    for term in ("long", "mid", "short"):
        frames = HISTORY[term]
        kwargs[f"latents_history_{term}"] = latents(draw, 5, (frames, *VIDEO[1:]), PATCH)
        kwargs[f"indices_latents_history_{term}"] = torch.arange(first, first + frames)[None]
        first += frames
    return {**kwargs, "indices_hidden_states": torch.arange(first, first + VIDEO[0])[None]}


def anyflow_far(seed: int = 0) -> dict[str, Any]:
    latent = latents(Draw(seed + 1), 5, EVEN, PATCH)
    chunks = {"hidden_states": latent.transpose(1, 2).contiguous(), "chunk_partition": [1, 2]}
    return {**anyflow(seed), **chunks}


def animate2(seed: int = 0) -> dict[str, Any]:
    """A step after the reference pass: its cache holds keys and values of two frames."""
    draw, (t, h, w) = Draw(seed), VIDEO
    cache = WanAnimate2KVCache(2)
    for layer in cache.layer_caches:
        layer.store(draw(1, (t - 1) * h * w, 2, 12), draw(1, (t - 1) * h * w, 2, 12))
    return {
        "hidden_states": [latents(draw, 5, VIDEO, PATCH)[0]],
        "timestep": draw.timestep(),
        "encoder_hidden_states": [draw(TEXT, 13)],
        "condition_latents": [latents(draw, 7, VIDEO, PATCH)[0]],
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": tokens(VIDEO),
        "reference_grid_sizes": torch.tensor([[t - 1, h, w]]),
        "origin_len": 4 * (t - 2),
        "origin_area": [16 * h, 16 * w],
        "return_dict": False,
    }


def build_anyflow() -> AnyFlowTransformer3DModel:
    return seeded(lambda: AnyFlowTransformer3DModel(**CONFIG))


def build_anyflow_far() -> AnyFlowFARTransformer3DModel:
    return seeded(lambda: AnyFlowFARTransformer3DModel(**CONFIG, chunk_partition=(1, 2)))


def build_animate2() -> WanAnimate2Transformer3DModel:
    config = {
        "text_len": 17,
        "in_dim": 12,
        "dim": 24,
        "ffn_dim": 53,
        "freq_dim": 26,
        "text_dim": 13,
        "out_dim": 5,
        "num_heads": 2,
        "num_layers": 2,
        "use_img_emb": False,
    }
    return seeded(lambda: WanAnimate2Transformer3DModel(**config))


def build_helios(**variant: Any) -> HeliosTransformer3DModel:
    return seeded(lambda: HeliosTransformer3DModel(**WITHOUT_ROPE, rope_dim=(4, 4, 4), **variant))


ENTRIES = (
    Entry(
        "AnyFlowTransformer3DModel",
        build_anyflow,
        anyflow,
        VIDEO,
        note="two timesteps for each frame, repeated to tokens; latents are [B, T, C, H, W]",
    ),
    Entry(
        "HeliosTransformer3DModel",
        build_helios,
        helios,
        VIDEO,
        note="tokens of older frames, at three resolutions, stand before the video tokens along one axis; only the "
        "video tokens attend to the text; modulation is joined along the token axis: at time 0 for the history",
    ),
    Entry(
        "HeliosTransformer3DModel (amplified history)",
        lambda: build_helios(is_amplify_history=True, guidance_cross_attn=False),
        helios,
        VIDEO,
        note="as above; the history's keys are scaled; all tokens attend to the text",
    ),
    Entry("HeliosTransformer3DModel (no history)", build_helios, text_to_video, VIDEO),
    Entry(
        "AnyFlowFARTransformer3DModel",
        build_anyflow_far,
        anyflow_far,
        EVEN,
        note="attention is flex_attention with a block mask, causal over chunks of frames; tokens are padded to a "
        "multiple of 128 in each attention",
    ),
    Entry(
        "WanAnimate2Transformer3DModel",
        build_animate2,
        animate2,
        VIDEO,
        note="the cache of the reference pass is a Python object among the inputs; attention is flex_attention with a "
        "block mask over padded tokens: a video frame sees all video tokens and one reference frame; the first call "
        "compiles that mask (15 s)",
    ),
)
