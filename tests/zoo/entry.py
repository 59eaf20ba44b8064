"""What an entry of the zoo is, and how its weights and inputs are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import diffusers
import torch
from diffusers.models import transformers
from torch import nn

Grid = tuple[int, int, int]

VIDEO: Grid = (3, 5, 7)
IMAGE: Grid = (1, 5, 7)


class Inputs(Protocol):
    """Keyword arguments of a call of the model, always the same for the same seed."""

    def __call__(self, seed: int = 0) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Entry:
    """A tiny model of one transformer class, with random weights, and a call of it.

    Attributes:
        name: the class's name, followed by the variant in brackets if the class has several entries.
        build: makes the model, in eval mode and fp32, always with the same weights.
        inputs: keyword arguments of `forward`, batch 1, `return_dict=False` where the model knows it.
        grid: (T', H', W') of the tokens that are denoised; 1-D sequences are (T', 1, 1).
        token_inputs: for latents that come packed, the dim of the tokens in each input that has them, or that and the
            first row that is one.
        note: what the analysis of the token axis meets here.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    grid: Grid
    token_inputs: Mapping[str, int | tuple[int, int]] | None = None
    note: str = ""


def newer(name: str) -> Any:
    """A class that not every supported diffusers has; a stand-in of the same name where it is missing.

    `has_class` leaves out what is made of a stand-in.
    """
    return getattr(diffusers, name, None) or getattr(transformers, name, None) or type(name, (), {})


def has_class(named: Any) -> bool:
    """Whether the installed diffusers has the class that an entry of the zoo or a row of a pipeline is named after."""
    name = named.name.split()[0]
    return hasattr(diffusers, name) or hasattr(transformers, name)


class Draw:
    """Random inputs, in a fixed order."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        """Normal values of this shape."""
        return torch.randn(*shape, generator=self.generator)

    def timestep(self, *shape: int) -> torch.Tensor:
        """Timesteps from 1 to 999, as floats; of shape [1] unless told otherwise."""
        return torch.randint(1, 1000, shape or (1,), generator=self.generator).float()

    def sigma(self, *shape: int) -> torch.Tensor:
        """Noise levels between 0.1 and 0.9; of shape [1] unless told otherwise."""
        return 0.1 + 0.8 * torch.rand(*(shape or (1,)), generator=self.generator)

    def ints(self, high: int, *shape: int) -> torch.Tensor:
        """Indices below `high`."""
        return torch.randint(0, high, shape, generator=self.generator)


def latents(draw: Draw, channels: int, grid: Grid, patch: Grid = (1, 1, 1)) -> torch.Tensor:
    """`[1, channels, T, H, W]` that a patch embedding turns into the token grid."""
    return draw(1, channels, *(size * p for size, p in zip(grid, patch, strict=True)))


def image(draw: Draw, channels: int, grid: Grid, patch: int = 1) -> torch.Tensor:
    """`[1, channels, H, W]` that a patch embedding turns into the token grid."""
    return draw(1, channels, grid[1] * patch, grid[2] * patch)


def coordinates(grid: Grid, axes: int = 3) -> torch.Tensor:
    """`[N, axes]`: where each token stands, in token order; the first of more than three axes are zero."""
    where = torch.cartesian_prod(*(torch.arange(size).float() for size in grid))
    return torch.cat([where.new_zeros(len(where), max(0, axes - 3)), where], dim=1)[:, -axes:]


def text_mask(length: int, valid: int = 8) -> torch.Tensor:
    """`[1, length]`: 1 for the first tokens, 0 for padding."""
    return (torch.arange(length) < valid).long()[None]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """The model that `make` gives, with loud random weights.

    Many parameters start at zero or one (output projections, gates, norms), which would hide a wrong cache. Matrices
    get standard deviation 1 / sqrt(fan in); vectors move by 0.3 from where they are; tables get 0.3.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().float().eval()
        with torch.no_grad():
            for module in model.modules():
                is_matrix = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
                for name, parameter in module.named_parameters(recurse=False):
                    noise = torch.randn_like(parameter)
                    if is_matrix and name == "weight":
                        parameter.copy_(noise / prod(parameter.shape[1:]) ** 0.5)
                    elif parameter.ndim == 1:
                        parameter.add_(0.3 * noise)
                    else:
                        parameter.copy_(0.3 * noise)
    return model.requires_grad_(False)


def tokens(grid: Grid) -> int:
    """N of a grid."""
    return prod(grid)
