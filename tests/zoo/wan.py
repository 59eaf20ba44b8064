"""Wan and the models that grew from it."""

from __future__ import annotations

from typing import Any

from diffusers import (
    ChronoEditTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)

from .entry import VIDEO, Draw, Entry, latents, seeded, tokens

PATCH = (1, 2, 2)
CONFIG: dict[str, Any] = {
    "patch_size": PATCH,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 5,
    "out_channels": 5,
    "text_dim": 13,
    "freq_dim": 26,
    "ffn_dim": 53,
    "num_layers": 2,
    "rope_max_seq_len": 37,
}
# With an image, the processor takes all but the last 512 tokens of the context for the image.
WITH_IMAGE: dict[str, Any] = {"image_dim": 17, "added_kv_proj_dim": 24}
TEXT, TEXT_WITH_IMAGE, IMAGE_TOKENS = 11, 512, 19


def text_to_video(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": latents(draw, 5, VIDEO, PATCH),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "return_dict": False,
    }


def image_to_video(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": latents(draw, 5, VIDEO, PATCH),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw(1, TEXT_WITH_IMAGE, 13),
        "encoder_hidden_states_image": draw(1, IMAGE_TOKENS, 17),
        "return_dict": False,
    }


def time_per_token(seed: int = 0) -> dict[str, Any]:
    return {**text_to_video(seed), "timestep": Draw(seed + 1).timestep(1, tokens(VIDEO))}


def vace(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 1)
    return {
        **text_to_video(seed),
        "control_hidden_states": latents(draw, 17, VIDEO, PATCH),
        "control_hidden_states_scale": draw(2),
    }


def animate(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 1)
    t, h, w = VIDEO
    return {
        **image_to_video(seed),
        "hidden_states": latents(draw, 14, VIDEO, PATCH),
        "pose_hidden_states": latents(draw, 5, (t - 1, h, w), PATCH),
        "face_pixel_values": draw(1, 3, 4 * (t - 2) + 1, 8, 8),
    }


def time_per_frame(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 1)
    return {**text_to_video(seed), "timestep": draw.timestep(1, VIDEO[0]), "enable_diffusion_forcing": True}


def two_frames(seed: int = 0) -> dict[str, Any]:
    return {**image_to_video(seed), "hidden_states": latents(Draw(seed + 1), 5, (2, *VIDEO[1:]), PATCH)}


def build_wan(**config: Any) -> WanTransformer3DModel:
    return seeded(lambda: WanTransformer3DModel(**CONFIG, **config))


def build_vace() -> WanVACETransformer3DModel:
    return seeded(lambda: WanVACETransformer3DModel(**CONFIG, vace_layers=(0, 1), vace_in_channels=17))


def build_animate() -> WanAnimateTransformer3DModel:
    config = {**CONFIG, **WITH_IMAGE, "in_channels": 14, "latent_channels": 5}
    face = {
        "motion_encoder_channel_sizes": {"4": 13, "8": 11},
        "motion_encoder_size": 8,
        "motion_style_dim": 19,
        "motion_dim": 3,
        "motion_encoder_dim": 23,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 3,
        "inject_face_latents_blocks": 2,
    }
    return seeded(lambda: WanAnimateTransformer3DModel(**config, **face))


def build_skyreels(**config: Any) -> SkyReelsV2Transformer3DModel:
    return seeded(lambda: SkyReelsV2Transformer3DModel(**CONFIG, **config))


def build_chronoedit(**config: Any) -> ChronoEditTransformer3DModel:
    return seeded(lambda: ChronoEditTransformer3DModel(**CONFIG, **WITH_IMAGE, **config))


ENTRIES = (
    Entry("WanTransformer3DModel", build_wan, text_to_video, VIDEO),
    Entry("WanTransformer3DModel (image to video)", lambda: build_wan(**WITH_IMAGE), image_to_video, VIDEO),
    Entry("WanTransformer3DModel (2.2 TI2V)", build_wan, time_per_token, VIDEO, note="a timestep for each token"),
    Entry("WanVACETransformer3DModel", build_vace, vace, VIDEO, note="a second stream of tokens, added by hints"),
    Entry(
        "WanAnimateTransformer3DModel",
        build_animate,
        animate,
        VIDEO,
        note="pose latents are written over the later frames before tokens are born; in the face adapter the frames "
        "of the token axis become a batch dim, and each frame attends to its own face tokens",
    ),
    Entry("SkyReelsV2Transformer3DModel", build_skyreels, text_to_video, VIDEO),
    Entry(
        "SkyReelsV2Transformer3DModel (diffusion forcing)",
        build_skyreels,
        time_per_frame,
        VIDEO,
        note="a timestep for each frame, repeated to tokens",
    ),
    Entry(
        "SkyReelsV2Transformer3DModel (autoregressive)",
        lambda: build_skyreels(num_frame_per_block=3),
        text_to_video,
        VIDEO,
        note="self-attention has an N x N mask, causal over blocks of frames",
    ),
    Entry("ChronoEditTransformer3DModel", build_chronoedit, image_to_video, VIDEO),
    Entry(
        "ChronoEditTransformer3DModel (two frames)",
        build_chronoedit,
        two_frames,
        (2, *VIDEO[1:]),
        note="the rotary table skips frames",
    ),
)
