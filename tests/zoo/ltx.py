"""LTX, and LTX-2 with its audio stream."""

from __future__ import annotations

from typing import Any

from diffusers import LTX2VideoTransformer3DModel, LTXVideoTransformer3DModel

from .entry import VIDEO, Draw, Entry, seeded, text_mask, tokens

N = tokens(VIDEO)
SIZE = dict(zip(("num_frames", "height", "width"), VIDEO, strict=True))
TEXT, AUDIO = 11, 17


def ltx(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw(1, N, 5),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "timestep": draw.timestep(),
        "encoder_attention_mask": text_mask(TEXT),
        "return_dict": False,
        **SIZE,
    }


def ltx_per_token(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 1)
    coords = draw(1, 3, N).abs()
    return {**ltx(seed), "timestep": draw.timestep(1, N), "video_coords": coords}


def ltx2(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 1)
    return {
        **ltx(seed),
        "timestep": draw.timestep(1, N),
        "audio_hidden_states": draw(1, AUDIO, 7),
        "audio_encoder_hidden_states": draw(1, TEXT, 13),
        "audio_timestep": draw.timestep(),
        "sigma": draw.timestep(),
        "audio_encoder_attention_mask": text_mask(TEXT),
        "audio_num_frames": AUDIO,
    }


def ltx23(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 2)
    kwargs = ltx2(seed)
    kwargs.update(encoder_hidden_states=draw(1, TEXT, 24), audio_encoder_hidden_states=draw(1, TEXT, 16))
    return {**kwargs, "use_cross_timestep": True}


def build_ltx() -> LTXVideoTransformer3DModel:
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24, "num_layers": 2}
    return seeded(lambda: LTXVideoTransformer3DModel(**config, in_channels=5, out_channels=5, caption_channels=13))


def build_ltx2(**variant: Any) -> LTX2VideoTransformer3DModel:
    config = {
        "in_channels": 5,
        "out_channels": 5,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "audio_in_channels": 7,
        "audio_out_channels": 7,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 2,
        "caption_channels": 13,
    }
    return seeded(lambda: LTX2VideoTransformer3DModel(**config, **variant))


LTX23 = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "rope_type": "split",
    "use_prompt_embeddings": False,
}
PACKED = {"hidden_states": 1}
ENTRIES = (
    Entry("LTXVideoTransformer3DModel", build_ltx, ltx, VIDEO, PACKED),
    Entry(
        "LTXVideoTransformer3DModel (conditions)",
        build_ltx,
        ltx_per_token,
        VIDEO,
        {"hidden_states": 1, "timestep": 1, "video_coords": 2},
        note="a timestep for each token; positions are an input",
    ),
    Entry(
        "LTX2VideoTransformer3DModel",
        build_ltx2,
        ltx2,
        VIDEO,
        {"hidden_states": 1, "timestep": 1},
        note="audio tokens in a stream of their own, which attends to the video tokens and is an output too: "
        "the keys of that attention carry the token axis, its queries do not",
    ),
    Entry(
        "LTX2VideoTransformer3DModel (2.3)",
        lambda: build_ltx2(**LTX23),
        ltx23,
        VIDEO,
        {"hidden_states": 1, "timestep": 1},
        note="as above, with gated attention, prompt modulation and a rotary table [B, heads, N, C]",
    ),
)
