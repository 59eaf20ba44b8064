"""Whole attention matrices of a model's own call: what no pass may hold, and what its results are compared with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode


class _Attentions(TorchFunctionMode):
    """Queries and keys of every attention over `rows` queries and as many keys, in order."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = [*args, *(kwargs or {}).values()][:2]
            if query.shape[-2] == key.shape[-2] == self.rows:
                self.seen.append((query, key))
        return func(*args, **(kwargs or {}))


def attention_matrices(model: nn.Module, kwargs: dict[str, Any], rows: int) -> list[torch.Tensor]:
    """softmax(QK^T) in float64, `[..., rows, rows]` for each attention over so many rows, in order."""
    with _Attentions(rows) as found, torch.no_grad():
        model(**kwargs)
    return [
        (query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        for query, key in found.seen
    ]
