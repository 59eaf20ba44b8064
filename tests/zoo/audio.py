"""Audio models: one token for each latent frame or patch of frames, a grid of (T', 1, 1)."""

from __future__ import annotations

from typing import Any

from diffusers import StableAudioDiTModel
from diffusers.models.transformers import (
    AceStepTransformer1DModel,
    LongCatAudioDiTTransformer,
    MiniMaxMusic3Transformer1DModel,
    StableAudio3DiTModel,
    T5FilmDecoder,
)

from .entry import Draw, Entry, seeded, text_mask
from .video import rotary

FRAMES, TEXT = 37, 11
GRID = (FRAMES, 1, 1)


def stable_audio(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw(1, 5, FRAMES),
        "timestep": draw.sigma(),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "global_hidden_states": draw(1, 1, 19),
        "rotary_embedding": rotary(draw, FRAMES + 1, 3),
        "return_dict": False,
    }


def stable_audio_masked(seed: int = 0) -> dict[str, Any]:
    return {**stable_audio(seed), "attention_mask": text_mask(FRAMES, FRAMES - 3).bool()}


def stable_audio3(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw(1, 5, FRAMES),
        "timestep": draw.sigma(),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "global_hidden_states": draw(1, 17),
        "encoder_attention_mask": text_mask(TEXT),
        "local_add_cond": draw(1, 7, FRAMES),
        "return_dict": False,
    }


def ace_step(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw(1, 2 * FRAMES, 5),
        "timestep": draw.sigma(),
        "timestep_r": draw.sigma(),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "context_latents": draw(1, 2 * FRAMES, 10),
        "return_dict": False,
    }


def longcat_audio(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw(1, FRAMES, 5),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "encoder_attention_mask": text_mask(TEXT).bool(),
        "timestep": draw.sigma(),
        "latent_cond": draw(1, FRAMES, 5),
        "return_dict": False,
    }


def longcat_audio_masked(seed: int = 0) -> dict[str, Any]:
    return {**longcat_audio(seed), "attention_mask": text_mask(FRAMES, FRAMES - 3).bool()}


def minimax_music(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw(1, 5, FRAMES),
        "timestep": draw.sigma(),
        "encoder_hidden_states": draw(1, FRAMES, 13),
        "return_dict": False,
    }


def t5_film(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "encodings_and_masks": [(draw(1, length, 24), text_mask(length).float()) for length in (TEXT, 17)],
        "decoder_input_tokens": draw(1, FRAMES, 5),
        "decoder_noise_time": draw.sigma(),
    }


def build_stable_audio() -> StableAudioDiTModel:
    config = {
        "sample_size": FRAMES,
        "in_channels": 5,
        "num_layers": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 4,
        "num_key_value_attention_heads": 2,
        "out_channels": 5,
        "cross_attention_dim": 24,
        "time_proj_dim": 26,
        "global_states_input_dim": 19,
        "cross_attention_input_dim": 13,
    }
    return seeded(lambda: StableAudioDiTModel(**config))


def build_stable_audio3() -> StableAudio3DiTModel:
    config = {
        "io_channels": 5,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "cond_token_dim": 13,
        "global_cond_dim": 17,
        "local_add_cond_dim": 7,
        "timestep_features_dim": 26,
        "ff_mult": 2.0,
        "num_memory_tokens": 3,
    }
    return seeded(lambda: StableAudio3DiTModel(**config))


def build_ace_step() -> AceStepTransformer1DModel:
    config = {
        "hidden_size": 48,
        "intermediate_size": 53,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "in_channels": 15,
        "audio_acoustic_hidden_dim": 5,
        "sliding_window": 5,
        "encoder_hidden_size": 13,
    }
    return seeded(lambda: AceStepTransformer1DModel(**config))


def build_longcat_audio() -> LongCatAudioDiTTransformer:
    config = {"dit_dim": 24, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 13, "latent_dim": 5}
    return seeded(lambda: LongCatAudioDiTTransformer(**config))


def build_minimax_music() -> MiniMaxMusic3Transformer1DModel:
    config = {
        "in_channels": 5,
        "condition_dim": 13,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "ff_inner_dim": 53,
        "rotary_dim": 6,
        "fourier_embedding_dim": 26,
    }
    return seeded(lambda: MiniMaxMusic3Transformer1DModel(**config))


def build_t5_film() -> T5FilmDecoder:
    config = {
        "input_dims": 5,
        "targets_length": FRAMES,
        "d_model": 24,
        "num_layers": 2,
        "num_heads": 2,
        "d_kv": 12,
        "d_ff": 53,
    }
    return seeded(lambda: T5FilmDecoder(**config))


ENTRIES = (
    Entry(
        "StableAudioDiTModel",
        build_stable_audio,
        stable_audio,
        GRID,
        {"hidden_states": 2},
        note="packed [B, C, N]; one token of conditions before the audio tokens along one axis; the rotary table is an "
        "input over both; grouped-query attention",
    ),
    Entry(
        "StableAudioDiTModel (masked)",
        build_stable_audio,
        stable_audio_masked,
        GRID,
        {"hidden_states": 2, "attention_mask": 1},
        note="as above; a key mask over audio tokens is an input",
    ),
    Entry(
        "StableAudio3DiTModel",
        build_stable_audio3,
        stable_audio3,
        GRID,
        {"hidden_states": 2, "local_add_cond": 2},
        note="packed [B, C, N]; learned memory tokens before the audio tokens along one axis; differential attention: "
        "the difference of two attentions that share values",
    ),
    Entry(
        "AceStepTransformer1DModel",
        build_ace_step,
        ace_step,
        GRID,
        note="tokens are born by a convolution of stride 2 over frames [B, 2 N, C] and die by a transposed one; every "
        "other block attends in a sliding window, by a square mask; grouped-query attention",
    ),
    Entry(
        "LongCatAudioDiTTransformer",
        build_longcat_audio,
        longcat_audio,
        GRID,
        {"hidden_states": 1, "latent_cond": 1},
    ),
    Entry(
        "LongCatAudioDiTTransformer (masked)",
        build_longcat_audio,
        longcat_audio_masked,
        GRID,
        {"hidden_states": 1, "latent_cond": 1, "attention_mask": 1},
        note="a key mask over audio tokens is an input; masked tokens are set to zero in between",
    ),
    Entry(
        "MiniMaxMusic3Transformer1DModel",
        build_minimax_music,
        minimax_music,
        GRID,
        {"hidden_states": 2, "encoder_hidden_states": 1},
        note="packed [B, C, N]; conditions for each token join along channels; the time is a token before the others",
    ),
    Entry(
        "T5FilmDecoder",
        build_t5_film,
        t5_film,
        GRID,
        {"decoder_input_tokens": 1},
        note="attention is baddbmm, softmax, bmm; the cross mask has one row for each token; the output is a bare "
        "tensor",
    ),
)
