"""Store cached keys and values in fewer bytes than the model computes them in.

=======  ===================================  ==============================================================
type     a key or value of D numbers          read as
=======  ===================================  ==============================================================
same     as the model computes it             it is
bf16     2 D bytes                            it is, cast
fp8      D bytes (e4m3), and a scale          number * scale
int8     D bytes, and a scale                 number * scale
=======  ===================================  ==============================================================

The scale is a float32 for each token and head, chosen so that the largest of the D numbers is the largest one that the
type can hold. Scales of whole heads would let a few large tokens (there are some in every model) coarsen all others. In
16 bits they would be hardly smaller, and compilers that keep a rounded number exact where they fuse would divide by
another scale than they store.

==========  ======================================================
form        after the pass
==========  ======================================================
full        rounds what it writes
partial     reads what was rounded; its fresh rows are exact
reuse       as before
==========  ======================================================

All else in a cache (outputs, sums, centroids' sizes, times) stays as computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from ..ir.cache import CacheEntry, with_rows
from ..ir.editor import FormEditor, FormPass
from ..ir.graphs import AddNode

aten = torch.ops.aten
TYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""By what a plan calls them."""
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""The largest number of the types that need a scale."""


@dataclass(frozen=True)
class StoreCache(FormPass):
    """Keys and values of tokens in another type.

    Attributes:
        cache_dtype: one of `contract.CACHE_DTYPES`.
    """

    cache_dtype: str

    name = "store"
    kinds = ("full", "partial")

    def cached(self, entries: tuple[CacheEntry, ...]) -> tuple[CacheEntry, ...]:
        """See `FormPass`."""
        return tuple(stored for entry in entries for stored in stored_as(entry, self.cache_dtype))

    def edit(self, form: FormEditor) -> None:
        """Round where a value is computed; read where it is used first."""
        for entry in list(form.reads):
            if changes(entry, self.cache_dtype):
                form.replace_read(entry, stored_as(entry, self.cache_dtype), decode)
        written: dict[CacheEntry, Node] = {}
        for entry, value in form.writes.items():
            if not changes(entry, self.cache_dtype):
                written[entry] = value
            elif form.kind == "full":
                stored = stored_as(entry, self.cache_dtype)
                written.update(zip(stored, encode(form.after(value), value, stored), strict=True))
            # A partial step leaves what the last full step computed: the next one computes the same tokens anew.
        form.writes = written


def changes(entry: CacheEntry, cache_dtype: str) -> bool:
    """Whether an entry is stored otherwise than it is computed: keys and values of tokens, where that saves memory."""
    dtype = TYPES.get(cache_dtype, entry.dtype)
    if not entry.is_context or dtype.itemsize >= entry.dtype.itemsize:
        return False
    return dtype not in LARGEST or entry.dim < len(entry.shape) - 1  # a scale belongs to one token


def stored_as(entry: CacheEntry, cache_dtype: str) -> tuple[CacheEntry, ...]:
    """What stands for an entry in the cache: the numbers, and their scales where there are any."""
    if not changes(entry, cache_dtype):
        return (entry,)
    numbers = replace(entry, dtype=TYPES[cache_dtype])
    if numbers.dtype not in LARGEST:
        return (numbers,)
    shape = with_rows(entry.shape, len(entry.shape) - 1, 1)
    return numbers, replace(entry, name=f"{entry.name}.scale", role="scale", shape=shape, dtype=torch.float32)


def encode(call: AddNode, value: Node, stored: tuple[CacheEntry, ...]) -> tuple[Node, ...]:
    """The nodes that hold what `stored_as` says, of a node's value."""
    if len(stored) == 1:
        return (call(aten._to_copy.default, value, dtype=stored[0].dtype),)
    numbers, scales = stored
    largest = LARGEST[numbers.dtype]
    exact = call(aten._to_copy.default, value, dtype=torch.float32)
    top = call(aten.amax.default, call(aten.abs.default, exact), [-1], True)
    scale = call(aten.clamp_min.default, call(aten.mul.Tensor, top, 1 / largest), torch.finfo(scales.dtype).tiny)
    scaled = call(aten.div.Tensor, exact, scale)
    if not numbers.dtype.is_floating_point:
        scaled = call(aten.round.default, scaled)
    held = call(aten.clamp.default, scaled, -largest, largest)
    return call(aten._to_copy.default, held, dtype=numbers.dtype), scale


def decode(call: AddNode, given: tuple[Node, ...], dtype: torch.dtype) -> Node:
    """The node that holds the value of a type, of the inputs that hold what `stored_as` says."""
    numbers, *scales = given
    if not scales:
        return call(aten._to_copy.default, numbers, dtype=dtype)
    value = call(aten.mul.Tensor, call(aten._to_copy.default, numbers, dtype=torch.float32), *scales)
    return value if dtype == torch.float32 else call(aten._to_copy.default, value, dtype=dtype)
