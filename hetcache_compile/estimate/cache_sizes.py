"""How much memory a cache takes, by the type that its keys and values are stored in: the one place that knows.

=======  ==========================================================
type     a cached key or value of D numbers, for one token and head
=======  ==========================================================
same     as the model computes it
bf16     2 D bytes
fp8      D bytes
int8     D bytes, and a float32 scale
=======  ==========================================================

All else in a cache (outputs, sums, times) is stored as computed.
"""

from __future__ import annotations

from math import prod
from typing import Literal, get_args

from ..errors import EstimateError
from ..passes.ir.cache import CacheEntry, Role

CacheDtype = Literal["same", "bf16", "fp8", "int8"]
CACHE_DTYPES: tuple[CacheDtype, ...] = get_args(CacheDtype)
ITEM_BYTES = {"bf16": 2, "fp8": 1, "int8": 1}
SCALE_BYTES = {"bf16": 0, "fp8": 0, "int8": 4}
"""For each token and head."""
STORED: tuple[Role, ...] = ("key", "value", "older")


def stored_bytes(entry: CacheEntry, cache_dtype: CacheDtype = "same") -> int:
    """What a cache entry takes, in bytes.

    Raises:
        EstimateError: there is no such type.
    """
    if cache_dtype not in CACHE_DTYPES:
        raise EstimateError(f"the type of a cache must be one of {', '.join(CACHE_DTYPES)}, got {cache_dtype}")
    if cache_dtype == "same" or not is_key_or_value(entry):
        return entry.num_bytes
    vectors = prod(entry.shape[:-1])
    return vectors * (entry.shape[-1] * ITEM_BYTES[cache_dtype] + SCALE_BYTES[cache_dtype])


def is_key_or_value(entry: CacheEntry) -> bool:
    """Whether an entry holds keys or values of tokens."""
    return entry.group == "key_values" and entry.role in STORED
