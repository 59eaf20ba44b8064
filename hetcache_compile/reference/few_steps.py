"""The reference model in few steps: a solver that spends none of them near the end, and low-rank differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

SHIFT = 3.0
DIFFERENCE = Path(__file__).with_name("few_steps.safetensors")
"""The weights of the distilled model, less those of the other."""


def few_steps_scheduler() -> Any:
    """Euler's steps, evenly spaced in time: DPM-Solver++ of order 1.

    `FlowMatchEulerDiscreteScheduler` spends its last step on the last hundredth of the way. The times of 8 steps
    contain those of 4.
    """
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        solver_order=1, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )


@torch.no_grad()
def add_difference(model: torch.nn.Module, file: Path = DIFFERENCE) -> None:
    """Add what benchmarks/reference/distil.py wrote, a low-rank difference, to the weights of linear layers."""
    tensors = load_file(file)
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            up = tensors[name.replace("lora_A", "lora_B")]
            weight = model.get_submodule(module).weight
            weight += (up.float() @ down.float()).to(weight)
