"""Models of one sequence for all modalities: where each kind of token stands in it is an input."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers import Cosmos3OmniTransformer, MiniMaxH3Transformer3DModel
from torch import nn

from .entry import VIDEO, Draw, Entry, coordinates, latents, newer, seeded, tokens

QwenImage21Transformer2DModel = newer("QwenImage21Transformer2DModel")

TEXT, AUDIO, REFERENCE = 11, 17, 3
N = tokens(VIDEO)
EVEN = (1, 4, 6)
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}


def places(text: int, *grids: tuple[int, int, int]) -> torch.Tensor:
    """`[text + tokens, 3]`: text along the first diagonal, then grids one after the other."""
    rows, first = [torch.arange(text).float()[:, None].expand(-1, 3)], text
    for grid in grids:
        rows.append(coordinates(grid) + first)
        first += max(grid)
    return torch.cat(rows)


def cosmos3(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    video = TEXT + torch.arange(N)
    return {
        "input_ids": draw.ints(31, TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": places(TEXT, VIDEO).T.contiguous(),
        "und_len": TEXT,
        "sequence_length": TEXT + N,
        "vision_tokens": [latents(draw, 5, VIDEO, (1, 2, 2))],
        "vision_token_shapes": [VIDEO],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": draw.timestep(N),
        "vision_noisy_frame_indexes": [torch.arange(VIDEO[0])],
        "return_dict": False,
    }


def minimax_h3(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    kinds = torch.cat([torch.full((length,), kind) for kind, length in enumerate((TEXT, N, AUDIO))])
    order = torch.arange(len(kinds))
    return {
        "hidden_states": draw(1, N, 20),
        "audio_hidden_states": draw(1, AUDIO, 7),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "timestep": torch.cat([torch.zeros(1), draw.timestep(2)]),
        "timestep_indices": kinds,
        "token_tags": kinds,
        "position_ids": places(TEXT, VIDEO, (AUDIO, 1, 1)),
        "video_indices": order[kinds == 1],
        "audio_indices": order[kinds == 2],
        "text_indices": order[kinds == 0],
        "return_dict": False,
    }


def minimax_h3_referenced(seed: int = 0) -> dict[str, Any]:
    """The rows of a reference are video too, and stand before the text: two runs of places."""
    draw = Draw(seed)
    kinds = torch.cat([torch.full((length,), kind) for kind, length in ((0, REFERENCE), (1, TEXT), (0, N), (2, AUDIO))])
    order = torch.arange(len(kinds))
    return {
        **minimax_h3(seed),
        "hidden_states": draw(1, REFERENCE + N, 20),
        "timestep": torch.cat([torch.zeros(1), draw.timestep(2)]),
        "timestep_indices": (order >= REFERENCE + TEXT).long() + (order >= REFERENCE + TEXT + N),
        "token_tags": kinds,
        "position_ids": torch.cat([coordinates((1, 1, REFERENCE)) - 1, places(TEXT, VIDEO, (AUDIO, 1, 1))]),
        "video_indices": order[kinds == 0],
        "audio_indices": order[kinds == 2],
        "text_indices": order[kinds == 1],
    }


def qwen21(seed: int = 0) -> dict[str, Any]:
    """Text, then one slot for each 2 x 2 tokens of the image."""
    draw = Draw(seed)
    slots = tokens(EVEN) // 4
    return {
        "hidden_states": draw(1, tokens(EVEN), 5),
        "encoder_hidden_states": draw(1, TEXT, 13),
        "timestep": draw.sigma(),
        "img_shapes": [[EVEN]],
        "img_mask": torch.arange(TEXT + slots)[None] >= TEXT,
        "return_dict": False,
    }


def build_cosmos3() -> Cosmos3OmniTransformer:
    config = {
        "head_dim": 12,
        "hidden_size": 48,
        "intermediate_size": 53,
        "latent_channel": 5,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "patch_latent_dim": 20,
        "vocab_size": 31,
        "rope_axes_dim": (2, 2, 2),
    }
    return seeded(lambda: Cosmos3OmniTransformer(**config))


def build_minimax_h3() -> MiniMaxH3Transformer3DModel:
    config = {
        "hidden_size": 24,
        "num_refiner_layers": 1,
        "ffn_dim": 53,
        "in_channels": 5,
        "audio_in_channels": 7,
        "text_dim": 13,
        "freq_dim": 26,
        "time_embed_hidden_dim": 29,
        "time_embed_dim": 19,
        "rope_freq_dim": 2,
    }
    return seeded(lambda: MiniMaxH3Transformer3DModel(**HEADS, **config))


def build_qwen21() -> nn.Module:
    config = {"in_channels": 5, "out_channels": 5, "context_in_dim": 13, "axes_dims_rope": (2, 4, 6)}
    return seeded(lambda: QwenImage21Transformer2DModel(**HEADS, **config))


ENTRIES = (
    Entry(
        "Cosmos3OmniTransformer",
        build_cosmos3,
        cosmos3,
        VIDEO,
        note="no batch dim; tokens are written into a sequence at positions that are inputs, and read from it again; "
        "text attends causally to itself, video tokens to all; time is added by scatter_add; outputs are lists",
    ),
    Entry(
        "MiniMaxH3Transformer3DModel",
        build_minimax_h3,
        minimax_h3,
        VIDEO,
        {"hidden_states": 1},
        note="tokens are copied into a sequence of text, video and audio at positions that are inputs (index_copy), "
        "and selected again; modulation is chosen for each token by an index; audio is an output too",
    ),
    Entry(
        "MiniMaxH3Transformer3DModel (references)",
        build_minimax_h3,
        minimax_h3_referenced,
        VIDEO,
        {"hidden_states": (1, REFERENCE)},
        note="the tokens of a reference come first in the latents, and stand elsewhere in the sequence",
    ),
    Entry(
        "QwenImage21Transformer2DModel",
        build_qwen21,
        qwen21,
        EVEN,
        {"hidden_states": 1},
        note="the sequence is built from a boolean mask that is data: four image tokens for each marked slot; text "
        "attends causally, block by block; the output is the whole sequence",
    ),
)
