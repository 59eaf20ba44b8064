"""A model with one block for each of several operations, side by side on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import hetcache_compile as hetcache

GRID, N = (2, 3, 5), 30
WIDTH, TEXT, BATCH, CHANNELS = 14, 11, 2, 3

Op = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_plan(grid: tuple[int, int, int] = GRID) -> hetcache.Plan:
    return hetcache.Plan.from_token_mask(np.arange(np.prod(grid)) % 3 == 0, grid)


class Block(nn.Module):
    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.op(x, text)


class Model(nn.Module):
    """Patches, self-attention, then one block for each operation, side by side on the tokens `[B, N, D]`."""

    def __init__(self, ops: Mapping[str, Op]) -> None:
        super().__init__()
        self.patch = nn.Conv3d(CHANNELS, WIDTH, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleDict({name: Block(op) for name, op in ops.items()})

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> list[torch.Tensor]:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(x, x, x)
        return [x, *(block(x, text) for block in self.blocks.values())]


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(BATCH, CHANNELS, GRID[0], GRID[1] * 2, GRID[2] * 2), torch.randn(BATCH, TEXT, WIDTH)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, **kwargs)


def check_place(refusal: hetcache.Refusal) -> None:
    """It says where tokens are, and points to the line of the model, not to one of torch."""
    assert "[token axis at dim " in refusal.operands
    assert refusal.source == f"{__file__}:{Block.forward.__code__.co_firstlineno + 1}: return self.op(x, text)"
