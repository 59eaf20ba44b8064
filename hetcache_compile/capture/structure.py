"""Whether a model is still the one that a graph was captured of, but for what its weights hold.

Dynamo guards what its graphs rely on. For a graph that was captured without it, this looks at what a model's code can
read: the modules, their attributes and those of their classes (a LoRA adapter's scale, the active adapter), what these
hold in turn, the numbers in closures of functions among that, the flags that the code reads of its Python modules, and
the kind of each weight. Not seen are other objects in closures, and arrays of NumPy that are written in place.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from .offloading import REGISTRY, comes_from, computes_as_written, only_offloads

SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
CONTAINERS = (list, tuple, dict, set, frozenset)
OPAQUE = (type, FunctionType, MethodType, ModuleType, Enum)
"""What is known by identity alone."""
OF_LIBRARIES = ("torch", "builtins", "logging", "threading", "weakref", "functools", "numpy")
"""Whose objects, and whose classes' attributes, say nothing of the model."""
TENSORS = ("_parameters", "_buffers")
OF_MODULES = frozenset({"training", "_modules", "_forward_hooks", "_forward_pre_hooks"})
"""What a call depends on among the attributes that every module has."""
NOT_COMPARED = frozenset({*vars(nn.Module()), "_hf_hook", "_old_forward", "_compiled_call_impl"}) - OF_MODULES
"""Attributes that hold weights, which may be others, or say where the model lies and who calls it."""


class Structure:
    """What `model` is now.

    Equal structures describe the same. To look whether nothing changed takes 3 ms for 1,100 modules: by identity, and
    only where something is another object, by what there is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._own = {id(module) for module in model.modules()}
        self._owners: list[Mapping[Any, Any]] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._slots: list[tuple[Any, str, Any]] = []
        self._namespaces: list[Mapping[Any, Any]] = []
        self._sequences: list[tuple[Any, tuple[Any, ...]]] = []
        self._plain_tensors: list[torch.Tensor] = []
        self._seen: dict[int, int] = {}
        self._weights: list[dict[str, torch.Tensor | None]] = []
        self._classes: dict[type, Any] = {}
        self._described = [self._describe(model), *self._classes.values()]
        self._sized = [*self._namespaces, *(sequence for sequence, _ in self._sequences)]
        self._sizes = list(map(len, self._sized))
        self._versions = list(map(_version, self._plain_tensors))
        self._facts = _facts_of(self._weights)

    def __eq__(self, other: object) -> bool:
        """Whether both describe the same."""
        return isinstance(other, Structure) and (self._described, self._facts) == (other._described, other._facts)

    __hash__ = None  # type: ignore[assignment]

    def holds(self) -> bool:
        """Whether the model is that still."""
        if self._is_untouched():
            return True
        now = Structure(self._model)
        if now != self:
            return False
        vars(self).update(vars(now))  # and look there from now on
        return True

    def _is_untouched(self) -> bool:
        now = [owner.get(key, _MISSING) for owner, key in zip(self._owners, self._keys, strict=True)]
        return (
            all(map(operator.is_, now, self._values))
            and list(map(len, self._sized)) == self._sizes
            and all(all(map(operator.is_, sequence, held)) for sequence, held in self._sequences)
            and all(getattr(holder, name, _MISSING) is held for holder, name, held in self._slots)
            and list(map(_version, self._plain_tensors)) == self._versions
            and _facts_of(self._weights) == self._facts
        )

    def _describe(self, value: Any) -> Any:
        """What a value is, in terms that can be compared; the way to look whether it changed is kept."""
        if isinstance(value, SCALARS):
            return type(value), value
        if id(value) in self._seen:
            return self._seen[id(value)]
        if isinstance(value, torch.Tensor):
            self._plain_tensors.append(value)
            return _Identity(value), _version(value)
        if isinstance(value, OPAQUE):
            return _Identity(value), self._describe_closure(value)
        self._seen[id(value)] = len(self._seen)
        if isinstance(value, dict):
            return type(value), self._describe_namespace(value, list(value))
        if isinstance(value, CONTAINERS):
            self._sequences.append((value, tuple(value)))
            return type(value), [self._describe(held) for held in value]
        if isinstance(value, nn.Module):
            if id(value) in self._own:
                self._weights += [vars(value)[name] for name in TENSORS]
        elif type(value).__module__.partition(".")[0] in OF_LIBRARIES:
            return _Identity(value)
        self._describe_class(type(value))
        held = vars(value) if hasattr(value, "__dict__") else {}
        as_written, moves = True, ""
        if isinstance(value, nn.Module) and only_offloads(held):
            as_written, moves = computes_as_written(value), comes_from(held)
            self._watch(held, ["forward"])
            self._namespaces.append(held[REGISTRY].hooks)  # others may come, which do more
        keys = [key for key in held if not _is_apart(held, key)]
        if isinstance(value, nn.Module) and id(value) not in self._own:  # in a list, say: a graph has copies of these
            keys += TENSORS
        slots = [name for name in _slots_of(type(value)) if hasattr(value, name)]
        self._slots += [(value, name, getattr(value, name)) for name in slots]
        return (
            _Identity(type(value)),
            as_written or _Identity(held["forward"]),
            moves,
            self._describe_namespace(held, keys),
            [(name, self._describe(getattr(value, name))) for name in slots],
        )

    def _describe_closure(self, value: Any) -> list[Any]:
        """The numbers and names that a function takes from where it was made."""
        cells = getattr(getattr(value, "__func__", value), "__closure__", None) or ()
        held = [(cell, getattr(cell, "cell_contents", _MISSING)) for cell in cells]
        known = [(cell, content) for cell, content in held if isinstance(content, SCALARS)]
        self._slots += [(cell, "cell_contents", content) for cell, content in known]
        return [(type(content), content) for _, content in known]

    def _describe_namespace(self, owner: Mapping[Any, Any], keys: Sequence[Any]) -> list[Any]:
        self._namespaces.append(owner)
        self._watch(owner, keys)
        return [(key if isinstance(key, SCALARS) else _Identity(key), self._describe(owner[key])) for key in keys]

    def _describe_class(self, cls: type) -> None:
        """The attributes of a class and of its bases, and the flags that its code reads of its Python module."""
        if cls in self._classes or cls.__module__.partition(".")[0] in OF_LIBRARIES:
            return
        self._classes[cls] = None
        for base in cls.__bases__:
            self._describe_class(base)
        own = vars(cls)
        names = {name for value in own.values() for name in _names_in(_code_of(value))}
        around = vars(sys.modules.get(cls.__module__, ModuleType("")))
        flags = sorted(name for name in names if isinstance(around.get(name, around), SCALARS))
        attributes = [name for name in own if not name.startswith(("__", "_abc_"))]
        self._classes[cls] = (
            self._describe_namespace(own, attributes),
            [(name, self._describe(around[name])) for name in flags],
        )
        self._watch(around, flags)

    def _watch(self, owner: Mapping[Any, Any], keys: Sequence[Any]) -> None:
        self._owners += [owner] * len(keys)
        self._keys += keys
        self._values += [owner.get(key, _MISSING) for key in keys]


_MISSING = object()


class _Identity:
    """Equal to itself alone; holds the object, so that no other one takes its address."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _is_apart(owner: Mapping[Any, Any], key: Any) -> bool:
    """Whether an attribute is not compared.

    Hooks of accelerate, which are renewed for each edit, and those of group offloading, some of which take themselves
    away, wrap `forward`.
    """
    if key in ("forward", REGISTRY):
        return "_hf_hook" in owner or only_offloads(owner)
    return key in NOT_COMPARED


def _facts_of(weights: Sequence[dict[str, torch.Tensor | None]]) -> list[Any]:
    """The kind of each weight, and which of them are one and the same."""
    first: dict[int, int] = {}
    return [
        (name, t)
        if t is None
        else (name, type(t), t.dtype, t.device, t.shape, t.stride(), first.setdefault(id(t), len(first)))
        for held in weights
        for name, t in held.items()
    ]


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written in place; tensors of inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _slots_of(cls: type) -> list[str]:
    """The attributes that instances have without a namespace."""
    found = [vars(base).get("__slots__", ()) for base in cls.__mro__]
    names = [name for slots in found for name in ([slots] if isinstance(slots, str) else slots)]
    return [name for name in names if not name.startswith("__")]


def _code_of(value: Any) -> CodeType | None:
    """The code of a method, a static method or a property."""
    function = getattr(value, "fget", getattr(value, "__func__", value))
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function.__code__ if isinstance(function, FunctionType) else None


def _names_in(code: CodeType | None) -> Iterator[str]:
    """What code calls by name, the functions in it too."""
    if code is not None:
        yield from code.co_names
        for constant in code.co_consts:
            yield from _names_in(constant if isinstance(constant, CodeType) else None)
