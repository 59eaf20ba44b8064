"""Whether a model is still the one that a graph was captured of, but for what its weights hold.

Dynamo guards what its graphs rely on. A graph that was captured without it relies on the same: which modules there are,
their attributes (a LoRA adapter's scale, the active adapter), and the type, device and shape of weights.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
CONTAINERS = (list, tuple, dict, set, frozenset)
OPAQUE = (type, FunctionType, MethodType, ModuleType, torch.Tensor, nn.Module)
"""What is known by identity alone."""
TENSORS = ("_parameters", "_buffers")
OF_MODULES = frozenset({"training", "_modules", "_forward_hooks", "_forward_pre_hooks"})
"""What a call depends on among the attributes that every module has."""
NOT_COMPARED = frozenset({*vars(nn.Module()), "_hf_hook", "_old_forward", "_compiled_call_impl"}) - OF_MODULES
"""Attributes that hold weights, which may be others, or say where the model lies and who calls it."""
DEPTH = 2
"""How far objects within objects are looked at: a module's processor, and what that holds."""

_facts = operator.attrgetter("dtype", "device", "shape")


class Structure:
    """What `model` is now; cheap to compare with what it is later."""

    def __init__(self, model: nn.Module) -> None:
        owners = list(_owners(model))
        places = [(owner, key) for owner in owners for key in owner if not _is_apart(owner, key)]
        self._owners = [owner for owner, _ in places]
        self._keys = [key for _, key in places]
        self._values = self._now()
        held = [value for value in self._values if isinstance(value, CONTAINERS)]
        self._contents = [(value, _frozen(value)) for value in held if value]
        self._sized = [*owners, *held]
        self._sizes = list(map(len, self._sized))
        self._tensors = [vars(module)[name] for module in model.modules() for name in TENSORS]
        self._facts = self._facts_now()

    def holds(self) -> bool:
        """Whether it is that still."""
        if list(map(len, self._sized)) != self._sizes:
            return False
        now = self._now()
        if not all(map(operator.is_, now, self._values)) and not all(map(_same, now, self._values)):
            return False
        return all(_frozen(value) == known for value, known in self._contents) and self._facts_now() == self._facts

    def _now(self) -> list[Any]:
        return [owner.get(key, _MISSING) for owner, key in zip(self._owners, self._keys, strict=True)]

    def _facts_now(self) -> list[Any]:
        return [(key, t if t is None else _facts(t)) for held in self._tensors for key, t in held.items()]


_MISSING = object()


def _owners(model: nn.Module) -> Iterator[Mapping[Any, Any]]:
    """The namespaces of modules, of the modules in them, and of plain objects that these hold."""
    seen: set[int] = set()
    for module in model.modules():
        yield vars(module)
        yield module._modules
        for key, value in vars(module).items():
            if not _is_apart(vars(module), key):
                yield from _objects(value, DEPTH, seen)


def _is_apart(owner: Mapping[Any, Any], key: Any) -> bool:
    """Whether an attribute is not compared. Hooks of accelerate, which are renewed for each edit, wrap `forward`."""
    return key in NOT_COMPARED or (key == "forward" and "_hf_hook" in owner)


def _objects(value: Any, depth: int, seen: set[int]) -> Iterator[Mapping[Any, Any]]:
    """The namespace of a plain object, and of those in it."""
    if not depth or isinstance(value, SCALARS + OPAQUE + CONTAINERS) or id(value) in seen:
        return
    held = getattr(value, "__dict__", None)
    if isinstance(held, dict):
        seen.add(id(value))
        yield held
        for inner in held.values():
            yield from _objects(inner, depth - 1, seen)


class _Identity:
    """Equal to itself alone; holds the object, so that no other one takes its address."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _frozen(value: Any) -> Any:
    """What a container holds now: scalars by value, anything else by identity."""
    if isinstance(value, SCALARS):
        return type(value), value
    if isinstance(value, dict):
        return [(key, _frozen(inner)) for key, inner in value.items()]
    if isinstance(value, CONTAINERS):
        return [_frozen(inner) for inner in value]
    return _Identity(value)


def _same(now: Any, known: Any) -> bool:
    """One object, or equal scalars."""
    if now is known:
        return True
    return isinstance(known, (*SCALARS, tuple)) and _frozen(now) == _frozen(known)
