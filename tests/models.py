"""Tiny random Wan models and calls of them. Sizes are distinct primes where the architecture allows it.

Weights are drawn so that every part matters: attention is far from uniform and the control branch is as loud as
the main one. With a model's own initial weights a wrong cache would move the output by less than a test can see.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from torch import nn

Grid = tuple[int, int, int]
M = TypeVar("M", bound=nn.Module)

GRID: Grid = (3, 5, 7)
NUM_TOKENS = prod(GRID)
TEXT_TOKENS = 11
PATCH: Grid = (1, 2, 2)
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


def wan(seed: int = 0, **config: Any) -> WanTransformer3DModel:
    """A Wan text-to-video transformer, width 24, two blocks."""
    torch.manual_seed(seed)
    return make_loud(WanTransformer3DModel(**{**CONFIG, **config}))


def vace(seed: int = 0, **config: Any) -> WanVACETransformer3DModel:
    """A Wan VACE transformer, width 24, two blocks and two control blocks."""
    torch.manual_seed(seed)
    vace_config = {"vace_layers": (0, 1), "vace_in_channels": 17}
    return make_loud(WanVACETransformer3DModel(**{**CONFIG, **vace_config, **config}))


def make_loud(model: M) -> M:
    """Draw all weights anew: matrices with standard deviation 1 / sqrt(fan in), biases and tables with 0.3."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            elif parameter.ndim in (2, 5):
                parameter.copy_(noise / prod(parameter.shape[1:]) ** 0.5)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()


def as_loaded(model: M, dtype: torch.dtype) -> M:
    """The model as `from_pretrained` gives it in another dtype: norms and tables stay in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, torch_dtype=dtype).eval()


def latent_shape(model: nn.Module, grid: Grid = GRID) -> tuple[int, int, int]:
    """(T, H, W) of the latents that make the token grid."""
    t, h, w = (size * patch for size, patch in zip(grid, model.config.patch_size, strict=True))
    return t, h, w


def call(
    model: nn.Module,
    *,
    grid: Grid = GRID,
    batch: int = 1,
    seed: int = 0,
    text_tokens: int = TEXT_TOKENS,
    time_per_token: bool = False,
) -> dict[str, Any]:
    """Keyword arguments of a call, drawn from `seed`, in the dtype of the patch embedding; returns a tuple.

    Seeds from 0 to 49 are the steps of one edit: time falls, and the text stays. So are those from 50 to 99, and so on.
    """
    generator = torch.Generator().manual_seed(seed)
    edit, step = divmod(seed, 50)
    of_edit = torch.Generator().manual_seed(10_000 + edit)

    def randn(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(model.patch_embedding.weight.dtype)

    size = latent_shape(model, grid)
    timestep = torch.full((batch, prod(grid)) if time_per_token else (batch,), 990.5 - 19.25 * step)
    if time_per_token:
        timestep[:, : grid[1] * grid[2]] *= torch.rand(grid[1] * grid[2], generator=generator)
    kwargs = {
        "hidden_states": randn(batch, model.config.in_channels, *size),
        "timestep": timestep,
        "encoder_hidden_states": randn(batch, text_tokens, model.config.text_dim, generator=of_edit),
        "return_dict": False,
    }
    if isinstance(model, WanVACETransformer3DModel):
        kwargs["control_hidden_states"] = randn(batch, model.config.vace_in_channels, *size, generator=of_edit)
        kwargs["control_hidden_states_scale"] = randn(len(model.config.vace_layers))
    return kwargs


def to_tokens(video: torch.Tensor, patch: Grid = PATCH) -> torch.Tensor:
    """`[B, C, T, H, W]` as `[B, N, C · patch]`: what the model computes for each token, in token order."""
    b, c, t, h, w = video.shape
    pt, ph, pw = patch
    split = video.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, (t // pt) * (h // ph) * (w // pw), -1)


class TinyDiT(nn.Module):
    """A video transformer that compiles in a moment: latents `[B, 5, T, H, W]`, text `[B, any, 13]`, one block."""

    def __init__(self, seed: int = 0, patch: Grid = PATCH, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patch, self.causal = patch, causal
        self.embed = nn.Conv3d(5, 22, patch, patch)
        self.embed_text = nn.Linear(13, 22)
        self.norm = nn.LayerNorm(22)
        self.qkv = nn.Linear(22, 66)
        self.out = nn.Linear(22, 5 * prod(patch))
        make_loud(self)

    def forward(self, latents: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        """Attend to the text, if there is any, then to each other."""
        (b, _, *size), (pt, ph, pw) = latents.shape, self.patch
        t, h, w = size[0] // pt, size[1] // ph, size[2] // pw
        x = self.embed(latents).flatten(2).transpose(1, 2)
        if text is not None:
            text = self.embed_text(text)
            x = x + nn.functional.scaled_dot_product_attention(x, text, text)
        query, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = self.out(x).reshape(b, t, h, w, pt, ph, pw, 5)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, 5, *size)


def tiny_call(seed: int, *, patch: Grid = PATCH, batch: int = 1, text_tokens: int = TEXT_TOKENS) -> dict[str, Any]:
    """Keyword arguments of a call of `TinyDiT`."""
    generator, of_edit = (torch.Generator().manual_seed(number) for number in (seed, 10_000 + seed // 50))
    size = (g * p for g, p in zip(GRID, patch, strict=True))
    return {
        "latents": torch.randn(batch, 5, *size, generator=generator),
        "text": torch.randn(batch, text_tokens, 13, generator=of_edit),
    }


@dataclass(frozen=True)
class Case:
    """A model and a shape of call; hashable, so that its capture can be shared by tests."""

    architecture: str
    grid: Grid = GRID
    batch: int = 1
    text_tokens: int = TEXT_TOKENS
    time_per_token: bool = False
    fused: bool = False
    dtype: torch.dtype = torch.float32
    config: tuple[tuple[str, Any], ...] = ()

    @property
    def num_tokens(self) -> int:
        """N."""
        return prod(self.grid)

    def build(self) -> nn.Module:
        """The model."""
        model = {"wan": wan, "vace": vace}[self.architecture](**dict(self.config))
        if self.dtype is not torch.float32:
            model = as_loaded(model, self.dtype)
        if self.fused:
            model.fuse_qkv_projections()
        return model

    def call(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """Keyword arguments of a call."""
        return call(
            model,
            grid=self.grid,
            batch=self.batch,
            seed=seed,
            text_tokens=self.text_tokens,
            time_per_token=self.time_per_token,
        )
