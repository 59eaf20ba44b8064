"""The reference model distilled to 4 or 8 steps without guidance: a low-rank difference of weights, and a solver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

DIFFERENCE = Path(__file__).parent / "few_steps.safetensors"
"""Written by benchmarks/reference/distil.py, by the names that `load_lora_weights` of diffusers knows."""
SHIFT = 3.0


def few_steps_scheduler() -> Any:
    """Euler's steps, evenly spaced in time: DPM-Solver++ of order 1.

    The times of 8 steps contain those of 4. (`FlowMatchEulerDiscreteScheduler` would spend one of four steps on the
    last hundredth of the way.)
    """
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        solver_order=1, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )


@torch.no_grad()
def add_difference(model: torch.nn.Module, file: Path = DIFFERENCE) -> None:
    """Add a low-rank difference to the weights of linear layers."""
    tensors = load_file(file)
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            up = tensors[name.replace("lora_A", "lora_B")]
            weight = model.get_submodule(module).weight
            weight += (up.float() @ down.float()).to(weight)
