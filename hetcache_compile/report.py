"""What a run reports about itself."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def processor_name(device: str) -> str:
    """The name of the GPU, or of the CPU, that a run used."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
