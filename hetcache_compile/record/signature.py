"""What tells models apart: a digest of a graph and of the weights that it runs on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch.fx import Graph
from torch.fx.node import map_arg

WIDTH = 1024
"""Numbers in a row of those that a weight is laid out in."""
PLACES = ("device", "pin_memory")
"""Arguments that say where a tensor is made."""


@torch.no_grad()
def model_signature(graph: Graph, weights: Iterable[torch.Tensor]) -> str:
    """A digest that is another one for another graph and for other weights, and the same on every device.

    Of a graph its operators and their numbers count, in order. Names do not, nor inputs that are not used: Dynamo may
    capture one model in several ways.

    Every bit of a weight counts, and where it stands: rows and columns of its bits are summed as whole numbers on the
    weight's device. Only the sums are copied to the host, a thousandth of the weight.

    Args:
        graph: normalised, with static shapes.
        weights: plain tensors, in the order of the graph's inputs.
    """
    digest = hashlib.sha256()
    for node in graph.nodes:
        if node.op == "call_function":
            kwargs = {name: value for name, value in node.kwargs.items() if name not in PLACES}
            numbers = map_arg((node.args, kwargs), lambda _: "node")
            digest.update(f"{node.target} {numbers}".encode())
    for weight in weights:
        digest.update(f"{weight.dtype} {tuple(weight.shape)}".encode())
        for sums in _sums(weight):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _sums(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = weight.detach().reshape(-1).clone()  # a clone begins where its memory does, so that any view of it may
    bits = flat.view(torch.int32 if flat.nbytes % 4 == 0 else torch.uint8)
    whole = bits.numel() // WIDTH * WIDTH
    rows = bits[:whole].view(-1, WIDTH)
    yield rows.sum(dim=0, dtype=torch.int64)
    yield rows.sum(dim=1, dtype=torch.int64)
    yield bits[whole:]
