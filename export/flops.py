"""Floating-point operations of a form, counted on fake tensors: nothing is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..passes.forms import Form


def count_flops(form: Form) -> int:
    """Matrix products, convolutions and attention of one call of a form."""
    values = [node.meta.get("val") for node in form.module.graph.nodes if node.op == "placeholder"]
    mode = detect_fake_mode(values)
    assert mode is not None
    # torch's counter does not know that attention on a CPU is attention too.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={attention: _attention_flops})
    with mode, counter:
        torch.fx.Interpreter(form.module).run(*values, enable_io_processing=False)
    return int(counter.get_total_flops())


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]
