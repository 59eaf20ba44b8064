"""How many bytes a plan's cache takes, and amounts of memory in words."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import PlanError
from ..passes.ir.contract import FormOptions

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
"""Of 1024, whether written `GiB` or `GB`: who writes 8GB means what a GPU of 8 GB has."""


@dataclass(frozen=True)
class CacheSize:
    """Bytes of the cache of one model call, as a plan has it.

    Attributes:
        options: those of the plan that it was counted for. A plan with others has another cache.
        branch: bytes of one branch of guidance.
        keys_and_values: bytes of them that may be in the host's memory.
        window: bytes of those that are on the device at a time, where they are in the host's memory.
        branches: model calls in each step, each with a cache of its own.
        shareable: bytes of a branch that others can read in place of their own: keys and values, and what they need.
        shared: whether they do.
    """

    options: FormOptions
    branch: int
    keys_and_values: int
    window: int
    branches: int
    shareable: int
    shared: bool = False

    @property
    def edit(self) -> int:
        """Bytes of all branches. Experts follow one another, and the first one's cache is freed for the next one's."""
        return self.branches * self.branch - (self.branches - 1) * self.shareable * self.shared

    @property
    def on_host(self) -> int:
        """Bytes of all branches in the host's memory, where keys and values are there."""
        return self.keys_and_values * (1 if self.shared else self.branches)

    def on_device(self, *, hosted: bool) -> int:
        """Bytes of all branches on the device."""
        return self.edit - self.on_host + self.window if hosted else self.edit

    def describe(self, *, hosted: bool) -> str:
        """One line."""
        each = f" ({self.branches} branches of {format_bytes(self.branch)})" if self.branches > 1 else ""
        each = f" ({self.branches} branches that share keys and values)" if each and self.shared else each
        if not hosted:
            return f"the cache takes {format_bytes(self.edit)}{each}"
        device = format_bytes(self.on_device(hosted=True))
        return f"the cache takes {format_bytes(self.on_host)} of the host's memory{each} and {device} on the device"


def parse_bytes(amount: int | str) -> int:
    """An amount of memory: `8GiB`, `500 MB`, or a number of bytes.

    Raises:
        PlanError: it is none, or nothing.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([KMGT]?)(i?B)?\s*", str(amount), re.IGNORECASE)
    found = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if found < 1 or isinstance(amount, bool):
        raise PlanError(f"memory is an amount such as 8GiB or 500MiB, got {amount!r}")
    return found


def format_bytes(amount: int) -> str:
    """An amount in the largest unit of which there is one: `6.32 GiB`."""
    unit = next(unit for unit in reversed(UNITS) if amount >= UNITS[unit] or not unit)
    return f"{amount / UNITS[unit]:.3g} {unit}iB" if unit else f"{amount} bytes"
