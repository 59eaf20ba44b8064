"""What a result belongs to: the command, the versions and the machine."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import torch

__version__ = "0.1.0"


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


def command(arguments: list[str]) -> str:
    """A command line without the place that its result was written to, which means nothing on another machine."""
    words = [Path(arguments[0]).name, *arguments[1:]]
    places = [number for number, word in enumerate(words) if word in ("--out", "-o", "--result")]
    hidden = {number for place in places for number in (place, place + 1)}
    return " ".join(word for number, word in enumerate(words) if number not in hidden)


def provenance(device: str) -> dict[str, Any]:
    """The command, the versions and the processor that a result belongs to."""
    import diffusers

    return {
        "command": command(sys.argv),
        "versions": {
            "hetcache-compile": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "processor": processor_name(device),
        "threads": torch.get_num_threads(),
    }
