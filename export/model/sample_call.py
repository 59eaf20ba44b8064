"""A sample call of a diffusers model, made up from the names of its inputs and from its config.

Only shapes, types and units have to be right: the values are for tests and timing. `INPUTS` knows what the pipelines of
Wan, LTX, LTX-2, CogVideoX, HunyuanVideo (1 and 1.5), Mochi, Flux, SD3, Qwen-Image, Z-Image and their relatives pass. A
model with an input that it does not know needs a recorded call (`read_call`) or a factory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from torch import nn

from ...errors import ExportError
from ...plan.plan import Plan

REMEDY = (
    "give --call FILE, the keyword arguments of a real call, saved with torch.save; or package.module:factory, a "
    "function that takes the plan and returns (model, kwargs)"
)


@dataclass(frozen=True)
class CallShape:
    """What a call's shapes depend on besides the model."""

    plan: Plan
    batch: int = 1
    text_tokens: int = 512
    seed: int = 0


def read_call(path: Path) -> dict[str, Any]:
    """Keyword arguments of a call that was recorded with `torch.save`. Loading it runs no code.

    Raises:
        ExportError: no such file, or it holds something else.
    """
    if not is_zipfile(path):
        raise ExportError(f"{path} cannot be read as a recorded call: it is no file of torch.save")
    try:
        kwargs = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        raise ExportError(f"{path} cannot be read as a recorded call: {str(error).splitlines()[0]}") from error
    if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        raise ExportError(f"{path} holds no keyword arguments: save a dict of them with torch.save")
    return {name: value for name, value in kwargs.items() if name != "return_dict"}


def sample_call(model: nn.Module, shape: CallShape, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of one call, by diffusers' names of inputs.

    Raises:
        ExportError: the model needs an input that `INPUTS` does not know, or whose size its config does not give.
    """
    parameters = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(shape.seed)
    call = InputMaker(dict(getattr(model, "config", {})), frozenset(parameters), shape, dtype, generator)
    kwargs: dict[str, Any] = {}
    unknown = []
    for name, parameter in parameters.items():
        try:
            value = INPUTS[name](call) if name in INPUTS else None
        except KeyError:  # the config says nothing of it: where it is optional, this model does without
            value = None
        if value is not None:
            kwargs[name] = value
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            unknown.append(name)
    if unknown or not kwargs:
        names = ", ".join(unknown) or "none"
        raise ExportError(f"no sample call is known for {type(model).__name__} (inputs {names}): {REMEDY}")
    return kwargs


@dataclass(frozen=True)
class InputMaker:
    """What an input of `INPUTS` may look at: the config, the names of all inputs, and the plan."""

    config: Mapping[str, Any]
    names: frozenset[str]
    shape: CallShape
    dtype: torch.dtype
    generator: torch.Generator

    def randn(self, *sizes: int) -> torch.Tensor:
        """Standard normal values."""
        return torch.randn(*sizes, generator=self.generator).to(self.dtype)

    def size(self, *keys: str) -> int:
        """The first of these config entries that is set.

        Raises:
            KeyError: none is.
        """
        found = next((self.config[key] for key in keys if self.config.get(key) is not None), None)
        if found is None:
            raise KeyError(" or ".join(keys))
        return int(found)

    @property
    def is_packed(self) -> bool:
        """Whether latents come as tokens `[B, N, C]`, with their positions or sizes beside them."""
        return bool({"img_ids", "img_shapes"} & self.names) or {"num_frames", "height", "width"} <= self.names

    @property
    def patch(self) -> tuple[int, int, int]:
        """Size of a patch in frames, rows and columns of latents."""
        size = self.config["patch_size"]
        if isinstance(size, int):
            return int(self.config.get("patch_size_t") or 1), size, size
        t, h, w = size
        return t, h, w

    def latents(self, channels: int) -> torch.Tensor:
        """Tokens, pictures, or videos, in the layout that the config speaks of."""
        batch, grid = self.shape.batch, self.shape.plan.grid
        if self.is_packed:
            return self.randn(batch, self.shape.plan.num_tokens, channels)
        t, h, w = (g * p for g, p in zip(grid, self.patch, strict=True))
        if isinstance(self.config["patch_size"], int) and PICTURES & self.config.keys():
            if grid[0] != 1:
                raise ExportError(f"the plan's grid {grid} has {grid[0]} frames, and the model takes pictures")
            return self.randn(batch, channels, h, w)
        if FRAMES_FIRST in self.config:
            return self.randn(batch, t, channels, h, w)
        return self.randn(batch, channels, t, h, w)

    def text(self) -> torch.Tensor:
        """`[B, text tokens, text width]`."""
        return self.randn(self.shape.batch, self.shape.text_tokens, self.size(*TEXT_WIDTHS))

    def text_mask(self) -> torch.Tensor:
        """`[B, text tokens]`: every token counts."""
        return torch.ones(self.shape.batch, self.shape.text_tokens, dtype=torch.bool)

    def time(self) -> torch.Tensor:
        """`[B]` float32: sigma from 0 to 1 where a model multiplies by 1000 itself, else from 0 to 1000."""
        first = float(self.shape.plan.timesteps[0]) if self.shape.plan.timesteps.size else 500.0
        return torch.full((self.shape.batch,), first / (1000 if SIGMAS & self.names else 1))

    def guidance(self) -> torch.Tensor | None:
        """`[B]` float32, in the unit of the time, for models that have learned it."""
        return self.time() if self.config.get("guidance_embeds") else None

    def positions(self) -> torch.Tensor:
        """`[N, axes]` float32: where each token stands; of more than three axes the first are zero."""
        where = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float32) for size in self.shape.plan.grid))
        axes = len(self.config["axes_dims_rope"])
        return torch.cat([where.new_zeros(len(where), max(0, axes - 3)), where], dim=1)[:, -axes:]

    def text_positions(self) -> torch.Tensor:
        """`[text tokens, axes]` float32."""
        return torch.zeros(self.shape.text_tokens, len(self.config["axes_dims_rope"]))

    def rotary_table(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines `[N, head width]` float32, where the model gets them from its pipeline."""
        if not self.config.get("use_rotary_positional_embeddings"):
            return None
        width = int(self.config["attention_head_dim"])
        angles = torch.rand(self.shape.plan.num_tokens, width // 2, generator=self.generator).repeat_interleave(2, 1)
        return angles.cos(), angles.sin()

    def pictures_of_sequence(self) -> list[list[tuple[int, int, int]]]:
        """The grid of each sample's pictures."""
        return [[self.shape.plan.grid]] * self.shape.batch

    def second_text(self) -> torch.Tensor:
        """`[B, 256, width]` of a second text encoder, which spells out glyphs."""
        return self.randn(self.shape.batch, GLYPH_TOKENS, self.size("text_embed_2_dim"))

    def second_text_mask(self) -> torch.Tensor | None:
        """`[B, 256]`: every token counts."""
        if self.config.get("text_embed_2_dim") is None:
            return None
        return torch.ones(self.shape.batch, GLYPH_TOKENS, dtype=torch.bool)

    def audio(self, *widths: str) -> torch.Tensor:
        """`[B, audio tokens, width]`."""
        return self.randn(self.shape.batch, self.audio_tokens, self.size(*widths))

    @property
    def audio_tokens(self) -> int:
        """As long as the video is at 24 frames a second."""
        frames = int(self.config["vae_scale_factors"][0])
        seconds = ((self.shape.plan.grid[0] - 1) * frames + 1) / 24
        hop = self.size("audio_hop_length") * self.size("audio_scale_factor")
        return max(1, round(seconds * self.size("audio_sampling_rate") / hop))

    def latents_list(self) -> list[torch.Tensor]:
        """`[C, T, H, W]` of each sample."""
        patch = (int(self.config["all_f_patch_size"][0]), *[int(self.config["all_patch_size"][0])] * 2)
        sizes = [g * p for g, p in zip(self.shape.plan.grid, patch, strict=True)]
        return [self.randn(self.size("in_channels"), *sizes) for _ in range(self.shape.batch)]

    def text_list(self) -> list[torch.Tensor]:
        """`[text tokens, text width]` of each sample."""
        return list(self.text())


TEXT_WIDTHS = ("text_dim", "text_embed_dim", "joint_attention_dim", "caption_channels", "cap_feat_dim")
"""What configs call the width of text states."""

GLYPH_TOKENS = 256
"""Of HunyuanVideo 1.5 and HunyuanImage."""
IMAGE_TOKENS = {"image_dim": 257, "image_embed_dim": 729}
"""Tokens of a picture's encoder, by the config entry that says how wide they are: CLIP ViT-H/14, SigLIP."""

PICTURES = frozenset({"sample_size", "pos_embed_max_size"})
"""Config entries of models that take `[B, C, H, W]`."""

FRAMES_FIRST = "temporal_compression_ratio"
"""The config entry of models that take `[B, T, C, H, W]`."""

SIGMAS = frozenset({"img_ids", "img_shapes", "t"})
"""Inputs of models whose time runs from 0 to 1."""

INPUTS: dict[str, Callable[[InputMaker], Any]] = {
    "hidden_states": lambda call: call.latents(call.size("in_channels")),
    "x": InputMaker.latents_list,
    "timestep": InputMaker.time,
    "t": InputMaker.time,
    "encoder_hidden_states": InputMaker.text,
    "cap_feats": InputMaker.text_list,
    "encoder_attention_mask": InputMaker.text_mask,
    "pooled_projections": lambda call: call.randn(call.shape.batch, call.size("pooled_projection_dim")),
    "guidance": InputMaker.guidance,
    "img_ids": InputMaker.positions,
    "txt_ids": InputMaker.text_positions,
    "img_shapes": InputMaker.pictures_of_sequence,
    "num_frames": lambda call: call.shape.plan.grid[0],
    "height": lambda call: call.shape.plan.grid[1],
    "width": lambda call: call.shape.plan.grid[2],
    "rope_interpolation_scale": lambda call: (8 / 25, 32, 32),
    "image_rotary_emb": InputMaker.rotary_table,
    "encoder_hidden_states_image": lambda call: call.randn(
        call.shape.batch, IMAGE_TOKENS["image_dim"], call.size("image_dim")
    ),
    # No picture is given, which HunyuanVideo 1.5 is told by zeros.
    "image_embeds": lambda call: torch.zeros(
        call.shape.batch, IMAGE_TOKENS["image_embed_dim"], call.size("image_embed_dim"), dtype=call.dtype
    ),
    "encoder_hidden_states_2": InputMaker.second_text,
    "encoder_attention_mask_2": InputMaker.second_text_mask,
    "audio_hidden_states": lambda call: call.audio("audio_in_channels"),
    "audio_encoder_hidden_states": InputMaker.text,
    "audio_num_frames": lambda call: call.audio_tokens,
    "ofs": lambda call: torch.full((1,), 2.0) if call.config.get("ofs_embed_dim") else None,
    "control_hidden_states": lambda call: call.latents(call.size("vace_in_channels")),
    "control_hidden_states_scale": lambda call: torch.ones(len(call.config["vace_layers"]), dtype=call.dtype),
}
"""How to make each input up, by the names diffusers gives them; None leaves it out.

The scale of positions is that of LTX's pipeline at its usual 25 frames a second.
"""
