"""What is exported: a model from a diffusers folder or a factory, and one sample call of it."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...capture.rewrite import Forms, rewrite
from ...engine.manifest import ModelSpec
from ...errors import ExportError, Refusal, UnsupportedGraphError
from ...passes.analysis.inputs import TokenInputs
from ...plan.plan import Plan
from .sample_call import REMEDY, CallShape, read_call, sample_call

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """A model and the keyword arguments of one call of it; `made_up` ones follow from its config only."""

    model: nn.Module
    kwargs: Mapping[str, Any]
    made_up: bool = False


def load_source(
    model: str, shape: CallShape, dtype: str, component: str = "transformer", call: Path | None = None
) -> Source:
    """The model that MODEL names, in eval mode, with a sample call.

    Args:
        model: a local diffusers pipeline or model folder, or `package.module:factory`. A factory is called with
            the plan and returns a module, or a module and the keyword arguments of a call: this runs its code.
        shape: what the call's shapes depend on.
        dtype: fp32, fp16 or bf16; modules that diffusers keeps in float32 stay in it.
        component: which of a pipeline's models.
        call: a recorded call, in place of the factory's or of one made up.

    Raises:
        ExportError: nothing there, or no call can be made up for it.
    """
    if dtype not in DTYPES:
        raise ExportError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    folder = Path(model)
    if folder.is_dir():
        module, kwargs = load_diffusers(folder, component, DTYPES[dtype]), None
    elif ":" in model:
        module, kwargs = call_factory(model, shape.plan, DTYPES[dtype])
    else:
        raise ExportError(f"{model} is no folder; give a diffusers folder or package.module:factory")
    module = module.eval().requires_grad_(False)
    if call is not None:
        kwargs = read_call(call)
    if kwargs is not None:
        return Source(module, kwargs)
    return Source(module, sample_call(module, shape, DTYPES[dtype]), made_up=True)


def load_diffusers(folder: Path, component: str, dtype: torch.dtype) -> nn.Module:
    """A model of a local diffusers checkpoint: `folder` is the pipeline's or the model's own."""
    import diffusers

    inner = folder / component if (folder / "model_index.json").is_file() else folder
    if not (inner / "config.json").is_file():
        raise ExportError(f"{inner} is no diffusers model: it has no config.json")
    diffusers.utils.logging.disable_progress_bar()
    try:
        model = diffusers.AutoModel.from_pretrained(str(inner), torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise ExportError(f"{inner} cannot be loaded: {str(error).splitlines()[0]}") from error
    assert isinstance(model, nn.Module)
    return model


def call_factory(name: str, plan: Plan, dtype: torch.dtype) -> tuple[nn.Module, Mapping[str, Any] | None]:
    """The module that a factory makes, and its call if it gives one."""
    module_name, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: modules beside the user's work are found
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise ExportError(f"{name} cannot be imported: {error}") from error
    made = factory(plan)
    model, kwargs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise ExportError(f"{name} must return a torch.nn.Module, it returned {type(model).__name__}")
    return cast_like_diffusers(model, dtype), kwargs


def cast_like_diffusers(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast weights as `from_pretrained` does: modules that a diffusers class keeps in float32 stay in it."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    return model


def rewrite_source(source: Source, plan: Plan, token_inputs: TokenInputs | None = None) -> Forms:
    """The forms of a model; where its call was made up, an error says that this may be the reason.

    Raises:
        UnsupportedGraphError: with every reason why the graph cannot be rewritten.
        GridMismatchError: the plan is for another grid.
    """
    try:
        return rewrite(source.model, plan, kwargs=source.kwargs, token_inputs=token_inputs)
    except UnsupportedGraphError as error:
        if not source.made_up:
            raise
        names = ", ".join(source.kwargs)
        hint = f"the sample call ({names}) was made up from the model's config: if it is not how the model is called"
        raise UnsupportedGraphError([*error.reasons, Refusal(hint, help=REMEDY)]) from error


def describe_model(model: nn.Module) -> ModelSpec:
    """Class and config of a model, with a hash that tells configs apart.

    What diffusers notes for itself is left out: paths, versions, and which arguments had their defaults, a list whose
    order is another one in each process.
    """
    config = json.loads(json.dumps(dict(getattr(model, "config", {})), default=str, sort_keys=True))
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    text = json.dumps(config, sort_keys=True)
    return ModelSpec(type(model).__name__, config, hashlib.sha256(text.encode()).hexdigest())
