"""How a model is exported, and how the caller is told of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...errors import ExportError
from ...plan.plan import Plan

FIRST_OPSET, LAST_OPSET = 20, 25
FIRST_FUSED_OPSET = 23
"""From here on ONNX has Attention, RMSNormalization and RotaryEmbedding."""
Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`."""


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        dtype: fp32, fp16 or bf16.
        opset: 20 or later; None chooses 20, or 23 for bf16, which older opsets lack.
        baseline: export the unmodified model too, to measure against.
        dynamic_active: smallest, usual and largest M, or None for the plan's M only.
    """

    dtype: str = "fp32"
    opset: int | None = None
    baseline: bool = True
    dynamic_active: tuple[int, int, int] | None = None

    @property
    def actual_opset(self) -> int:
        """The opset, chosen by the type where it is not given."""
        return self.opset or (FIRST_FUSED_OPSET if self.dtype == "bf16" else FIRST_OPSET)

    def check(self, plan: Plan) -> None:
        """Raise `ExportError` for what ONNX cannot express, and what engines cannot do."""
        if plan.selects_at_run_time:
            raise ExportError(
                f"engines keep their active tokens: make the plan with selection=uniform, not {plan.selection}"
            )
        if plan.form_options.cached_by == "attention":
            raise ExportError("engines cannot choose what they cache: make the plan with cached_by=distance")
        if self.dynamic_active and plan.context_motion:
            raise ExportError("--dynamic-active needs cached tokens as they are: make the plan with context_motion=0")
        if self.dynamic_active and plan.num_merged < plan.num_context:
            raise ExportError("--dynamic-active needs all cached tokens: make the plan with merged_ratio=1")
        if not FIRST_OPSET <= self.actual_opset <= LAST_OPSET:
            raise ExportError(f"opset must be from {FIRST_OPSET} to {LAST_OPSET}, got {self.opset}")
        if self.dtype == "bf16" and self.actual_opset < FIRST_FUSED_OPSET:
            raise ExportError(f"bf16 needs opset {FIRST_FUSED_OPSET} or later: leave --opset at auto")
