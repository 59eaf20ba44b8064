"""Models grown from Wan that generate in chunks: frames of history, two timesteps, caches of their own."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AnyFlowTransformer3DModel, HeliosTransformer3DModel

from .entry import VIDEO, Draw, Entry, latents, seeded
from .wan import CONFIG, PATCH, TEXT, text_to_video

WITHOUT_ROPE = {name: value for name, value in CONFIG.items() if name != "rope_max_seq_len"}
HISTORY = {"short": 2, "mid": 2, "long": 4}


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


def build_anyflow() -> AnyFlowTransformer3DModel:
    return seeded(lambda: AnyFlowTransformer3DModel(**CONFIG))


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
)
