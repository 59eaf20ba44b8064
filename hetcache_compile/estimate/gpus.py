"""Rates of GPUs, as data, and what a call takes by a roofline of them.

An operator takes as long as its FLOPs at the achieved rate of its kind, or as long as its bytes, whichever is longer.
`gpus.json` lists peaks, achieved shares and their sources. The shares belong to a GPU and a kind of operator, never to
a model.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from ..errors import EstimateError
from .work import Work

DATA = "gpus.json"
Attention = Literal["sdpa", "fa2", "fa3"]
"""The kernel of attention: what PyTorch 2.11 chooses on this GPU, FlashAttention-2, or 3 where there is one."""


@dataclass(frozen=True)
class Gpu:
    """A GPU and its rates.

    Attributes:
        name: as the vendor has it.
        matmul_flops: achieved FLOPs a second of products in bfloat16.
        attention_flops: achieved FLOPs a second of attention, by kernel (see `Attention`).
        memory_bytes_per_second: achieved bytes a second.
        memory_gib: GiB of memory.
        call_seconds: what any call takes, however little it computes.
        source: where the numbers are from.
    """

    name: str
    matmul_flops: float
    attention_flops: Mapping[str, float]
    memory_bytes_per_second: float
    memory_gib: float
    call_seconds: float
    source: str

    def seconds(self, work: Work, attention: Attention = "sdpa", *, eager: bool = False) -> float:
        """What one call takes.

        Args:
            work: of the call.
            attention: the kernel.
            eager: whether light operators are kernels of their own, instead of fused ones.

        Raises:
            EstimateError: no rate of this kernel is listed.
        """
        if attention not in self.attention_flops:
            raise EstimateError(f"{self.name} has rates of {', '.join(self.attention_flops)}, not of {attention}")
        light_bytes = work.eager_bytes if eager else work.fused_bytes
        seconds = self.call_seconds + light_bytes / self.memory_bytes_per_second
        for operation, count in work.operations.items():
            rate = self.attention_flops[attention] if operation.attends else self.matmul_flops
            seconds += count * max(operation.flops / rate, operation.bytes / self.memory_bytes_per_second)
        return seconds

    def describe(self) -> str:
        """The rates in one line."""
        return (
            f"{self.name}: products {self.matmul_flops / 1e12:.0f} TFLOP/s, attention "
            f"{self.attention_flops['sdpa'] / 1e12:.0f} TFLOP/s, memory {self.memory_bytes_per_second / 1e12:.2f} TB/s"
        )


@functools.cache
def known_gpus() -> Mapping[str, Gpu]:
    """Every GPU whose rates are listed, by its short name."""
    data = json.loads((resources.files(__package__) / DATA).read_text())
    found = {}
    for name, entry in data["gpus"].items():
        peak, shares = 1e12 * entry["peak_tflops"], entry["shares"]
        found[name] = Gpu(
            entry["name"], peak * shares.pop("matmul"), {kernel: peak * share for kernel, share in shares.items()},
            1e9 * entry["memory_gb_per_second"] * entry["memory_share"], entry["memory_gib"],
            data["call_seconds"]["value"], entry["source"],
        )  # fmt: skip
    return found


def find_gpu(name: str) -> Gpu:
    """A GPU by its short name, in any spelling of case, spaces and dashes.

    Raises:
        EstimateError: its rates are not listed.
    """
    plain = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    known = known_gpus()
    if plain not in known:
        raise EstimateError(f"the rates of {name} are not known: give one of {', '.join(known)}")
    return known[plain]
