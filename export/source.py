"""What is exported: a model from a diffusers folder or a factory, and one sample call of it.

Shapes of the call follow from the plan's grid and the model's config; the values only matter for tests and timing.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ExportError
from ..manifest import ModelSpec
from ..plan import Plan

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """A model and the keyword arguments of one call of it."""

    model: nn.Module
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class CallShape:
    """What a call's shapes depend on besides the model."""

    plan: Plan
    batch: int = 1
    text_tokens: int = 512
    seed: int = 0


def load_source(model: str, shape: CallShape, dtype: str, component: str = "transformer") -> Source:
    """The model that MODEL names, in eval mode, with a sample call.

    Args:
        model: a local diffusers pipeline or model folder, or `package.module:factory`. A factory is called with
            the plan and returns a module, or a module and the keyword arguments of a call: this runs its code.
        shape: what the call's shapes depend on.
        dtype: fp32, fp16 or bf16; modules that diffusers keeps in float32 stay in it.
        component: which of a pipeline's models.

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
    return Source(module, kwargs if kwargs is not None else sample_call(module, shape, DTYPES[dtype]))


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


def sample_call(model: nn.Module, shape: CallShape, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of one call, by diffusers' names of inputs (`INPUTS`).

    Raises:
        ExportError: the model needs an input that `INPUTS` does not know.
    """
    generator = torch.Generator().manual_seed(shape.seed)
    context = InputContext(getattr(model, "config", {}), shape, dtype, generator)
    kwargs: dict[str, Any] = {}
    unknown = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name in INPUTS and _is_used(name, context.config):
            kwargs[name] = INPUTS[name](context)
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            unknown.append(name)
    if unknown or not kwargs:
        raise ExportError(
            f"no sample call is known for {type(model).__name__} (inputs {', '.join(unknown) or 'none'}): "
            "give package.module:factory, a function that takes the plan and returns (model, kwargs)"
        )
    return kwargs


@dataclass(frozen=True)
class InputContext:
    """What an input of `INPUTS` may look at."""

    config: Mapping[str, Any]
    shape: CallShape
    dtype: torch.dtype
    generator: torch.Generator

    def randn(self, *sizes: int) -> torch.Tensor:
        """Standard normal values."""
        return torch.randn(*sizes, generator=self.generator).to(self.dtype)

    def latents(self, channels: str) -> torch.Tensor:
        """`[B, channels, T, H, W]`, so that patches make the plan's grid."""
        sizes = [g * p for g, p in zip(self.shape.plan.grid, self.config["patch_size"], strict=True)]
        return self.randn(self.shape.batch, int(self.config[channels]), *sizes)

    def text(self) -> torch.Tensor:
        """`[B, text tokens, text width]`."""
        return self.randn(self.shape.batch, self.shape.text_tokens, int(self.config["text_dim"]))

    def timestep(self) -> torch.Tensor:
        """`[B]` float32, between 0 and 1000."""
        first = float(self.shape.plan.timesteps[0]) if self.shape.plan.timesteps.size else 500.0
        return torch.full((self.shape.batch,), first)


def _is_used(name: str, config: Mapping[str, Any]) -> bool:
    """Inputs whose sizes the config does not give are optional ones that this model does without."""
    return all(config.get(key) is not None for key in NEEDS.get(name, ()))


def describe_model(model: nn.Module) -> ModelSpec:
    """Class and config of a model, with a hash that tells configs apart."""
    config = json.loads(json.dumps(dict(getattr(model, "config", {})), default=str, sort_keys=True))
    config = {key: value for key, value in config.items() if key != "_name_or_path"}
    text = json.dumps(config, sort_keys=True)
    return ModelSpec(type(model).__name__, config, hashlib.sha256(text.encode()).hexdigest())


NEEDS: dict[str, tuple[str, ...]] = {
    "hidden_states": ("in_channels", "patch_size"),
    "encoder_hidden_states": ("text_dim",),
    "control_hidden_states": ("vace_in_channels", "patch_size"),
    "control_hidden_states_scale": ("vace_layers",),
}
"""The config entries that an input's shape depends on."""

INPUTS: dict[str, Callable[[InputContext], torch.Tensor]] = {
    "hidden_states": lambda context: context.latents("in_channels"),
    "timestep": InputContext.timestep,
    "encoder_hidden_states": InputContext.text,
    "control_hidden_states": lambda context: context.latents("vace_in_channels"),
    "control_hidden_states_scale": lambda context: torch.ones(len(context.config["vace_layers"]), dtype=context.dtype),
}
"""How to make each input up, by the names diffusers gives them."""
