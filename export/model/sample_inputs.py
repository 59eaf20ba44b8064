"""`sample_inputs/`: real inputs of each form, for trtexec, polygraphy and timing.

Random indices would be invalid, so these are the plan's. The cache is shipped where a check has computed it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...capture.rewrite import Forms
from ...engine.engine import BUDGETS
from ...engine.manifest import FormSpec
from . import load_samples

SAMPLES_FOLDER = "sample_inputs"
LOADER = "load.py"


def sample_tensors(forms: Forms, kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The model's inputs and the plan's indices, by name."""
    placeholders = [n.name for n in forms.program.module.graph.nodes if n.op == "placeholder"]
    values = forms.program.flat_inputs((), kwargs)
    tensors = {
        name: value
        for name, value in zip(placeholders, values, strict=True)
        if name in forms.program.inputs and isinstance(value, torch.Tensor)
    }
    indices = dict.fromkeys((*BUDGETS.values(), *(name for form in forms.by_kind.values() for name in form.indices)))
    return tensors | {name: torch.as_tensor(getattr(forms.plan, name)) for name in indices}


def write_samples(folder: Path, kind: str, form: FormSpec, tensors: Mapping[str, torch.Tensor]) -> None:
    """The inputs of one form that are in `tensors`, each as a raw file, and the script that reads them."""
    target = folder / SAMPLES_FOLDER / kind
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(load_samples.__file__, target.parent / LOADER)
    for spec in form.inputs:
        if spec.name in tensors:
            flat = tensors[spec.name].detach().cpu().contiguous().reshape(-1)
            flat.view(torch.uint8).numpy().tofile(target / f"{spec.name}.bin")


def read_samples(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """The sample inputs of one form of a finished export; cache tensors that it lacks are drawn at random."""
    arrays = load_samples.read(kind, folder / SAMPLES_FOLDER)
    return {name: torch.as_tensor(array) for name, array in arrays.items()}
