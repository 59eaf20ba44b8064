"""Models that Dynamo cannot follow to the end: captured whole, cached as planned, and never stale."""

from __future__ import annotations

import gc
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from backend_checks import CountingInner, Kwargs, check, compiled, expected, plan_of, run, tiny_calls
from models import TEXT_TOKENS, TinyDiT
from test_offload import ELSEWHERE
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile.capture.structure import Structure
from hetcache_compile.errors import HetCacheWarning
from hetcache_compile.runtime.whole import model as model_in_parts
from hetcache_compile.sessions.session import Session

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Padded(TinyDiT):
    """Drops padded text by the value of a mask, makes a table on a device by name, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.table: torch.Tensor | None = None
        self.gains = {"default": 1.0}

    def forward(self, latents: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            with torch.device("cpu"):
                self.table = torch.linspace(0.5, 1, 13)
        words = text[:, : int(text_mask.sum())] * self.table * self.gains["default"]
        return super().forward(latents, words)


class Looping(Padded):
    """Breaks in a loop: Dynamo leaves its forward to Python, and compiles what that calls."""

    def forward(self, latents: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        for sample in text_mask:
            text = self.embed_text(text)[:, : int(sample.sum())].mean(2, keepdim=True) * text[:, : int(sample.sum())]
        return super().forward(latents, text, text_mask[:, : text.shape[1]])


def calls_of(steps: str, words: int = 7, first: int = 0) -> list[Kwargs]:
    mask = torch.arange(TEXT_TOKENS)[None] < words
    return [{**kwargs, "text_mask": mask.clone()} for kwargs in tiny_calls(steps, first)]


def letters(session: Session) -> str:
    return "".join(kind.letter for kind in session.stats.kinds)


def beside(model: Any) -> Any:
    return compiled(model)


def in_place(model: Any) -> Any:
    model.compile(backend="hetcache", options={"inner": "eager"})
    return model


def truths_of(model: Any, steps: str, calls: list[Kwargs]) -> list[torch.Tensor]:
    return expected(hetcache.rewrite(model, plan_of(steps), (), calls[0]), steps, calls)


@pytest.mark.parametrize("way", [beside, in_place])
@pytest.mark.parametrize("build", [Padded, Looping])
def test_it_is_cached(build: Callable[[], Any], way: Callable[[Any], Any]) -> None:
    """From the first call of the first session on; what was compiled is called outside as it was before."""
    steps, model = "FPRPF", build()
    calls = calls_of(steps)
    truths, plain = truths_of(model, steps, calls), run(build(), calls)
    fast = way(model)
    for _ in range(2):
        with warnings.catch_warnings(), hetcache.session(plan_of(steps), strict=True) as session:
            warnings.simplefilter("error", HetCacheWarning)
            outputs = run(fast, calls)
        assert letters(session) == steps
        check(outputs, truths)
        check(run(fast, calls), plain)


def test_after_it_was_compiled_outside() -> None:
    steps, model, inner = "FPR", Padded(), CountingInner()
    calls = calls_of(steps)
    fast = compiled(model, inner)
    run(fast, calls[:1])
    of_parts = inner.graphs
    assert of_parts
    with hetcache.session(plan_of(steps), strict=True) as session:
        check(run(fast, calls), truths_of(model, steps, calls))
    assert letters(session) == steps
    assert fast.forward.compiled is not fast.forward
    of_forms = inner.graphs - of_parts
    run(fast, calls[:1])
    assert inner.graphs == of_parts + of_forms


def test_guidance_with_masks_of_its_own() -> None:
    """A capture for each length of text; they are found again in later edits."""
    steps, model = "FPRF", Padded()
    fast, texts = compiled(model), {"cond": calls_of(steps), "uncond": calls_of(steps, words=3, first=100)}
    for kwargs, other in zip(texts["uncond"], texts["cond"], strict=True):
        kwargs["latents"] = other["latents"]
    truths = {name: truths_of(model, steps, calls) for name, calls in texts.items()}
    outputs: dict[str, list[torch.Tensor]] = {}
    for _ in range(3):
        outputs = {name: [] for name in texts}
        with hetcache.session(plan_of(steps), strict=True) as session:
            for step in range(len(steps)):
                for name, calls in texts.items():
                    outputs[name] += run(fast, [calls[step]])
        assert letters(session) == "FFPPRRFF"
    for name, truth in truths.items():
        check(outputs[name], truth)
    assert len(fast.forward._captures) == 2


def doubled(model: Any) -> None:
    model.gains["default"] = 2.0


class Nested(Padded):
    """Reads numbers from everywhere."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.parts = [Part(), {"of": (Part(),)}]
        self.deep = Part()
        self.deep.inner = Part()
        self.deep.inner.inner = Part()
        self.tensor = {"adapter": torch.ones(())}
        self.layers = [nn.Linear(13, 13)]
        self.first, self.second = nn.Linear(13, 13), nn.Linear(13, 13)
        self.second.weight = self.first.weight

    def forward(self, latents: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        factor = self.scale * self.parts[0].scale * self.parts[1]["of"][0].scale * self.deep.inner.inner.scale * FLAG
        words = text[:, : int(text_mask.sum())] * factor * self.tensor["adapter"]
        words = words + self.layers[0](words) + self.second(self.first(words))
        return super().forward(latents, words, text_mask[:, : words.shape[1]])


class Part:
    """A plain object; one of its attributes has no namespace."""

    __slots__ = ("__dict__", "scale")

    def __init__(self) -> None:
        self.scale = 1.0


FLAG = 1.0
NESTED: dict[str, Callable[[Any], Any]] = {
    "in a list": lambda m: setattr(m.parts[0], "scale", 3.0),
    "in a tuple in a dict in a list": lambda m: setattr(m.parts[1]["of"][0], "scale", 3.0),
    "deep": lambda m: setattr(m.deep.inner.inner, "scale", 3.0),
    "of the class": lambda m: setattr(type(m), "scale", 3.0),
    "of the Python module": lambda m: globals().update(FLAG=3.0),
    "a plain tensor in place": lambda m: m.tensor["adapter"].fill_(3.0),
    "a module in a list": lambda m: setattr(m.layers[0], "weight", nn.Parameter(m.layers[0].weight * 3)),
    "a module in a list, in place": lambda m: m.layers[0].weight.mul_(3),
    "untied": lambda m: setattr(m.second, "weight", nn.Parameter(m.first.weight * 3)),
}


@pytest.mark.parametrize("change", NESTED.values(), ids=NESTED)
def test_a_change_anywhere_is_seen(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Nested, "scale", 1.0)
    monkeypatch.setitem(globals(), "FLAG", 1.0)
    model, calls = Nested(), calls_of("FPP")
    fast = compiled(model)
    with hetcache.session(plan_of("FPP"), strict=True) as session:
        run(fast, calls[:2])
        before = run(model, calls[2:])
        change(model)
        truth = run(model, calls[2:])
        assert (truth[0] - before[0]).abs().max() > 0.1
        check(run(fast, calls[2:]), truth)
    assert letters(session) == "FPF"


def rescaled(model: Any) -> None:
    model.embed_text.weight.mul_(2)


def another_weight(model: Any) -> None:
    model.embed_text.weight = nn.Parameter(model.embed_text.weight * 2)


def another_layer(model: Any) -> None:
    model.embed_text = nn.Sequential(model.embed_text, nn.LayerNorm(22))


@pytest.mark.parametrize("change", [doubled, rescaled, another_weight, another_layer])
def test_a_changed_model_is_seen(change: Callable[[Any], None]) -> None:
    model, calls = Padded(), calls_of("FPPP")
    fast = compiled(model)
    with hetcache.session(plan_of("FPPP"), strict=True) as session:
        run(fast, calls[:2])
        change(model)
        outputs = run(fast, calls[2:])
        check(outputs[:1], run(model, calls[2:3]))
    assert letters(session) == "FPFP"


@pytest.mark.parametrize("way", ["before", "after", "in place"])
def test_a_model_that_moves_before_each_call(way: str) -> None:
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    steps, model = "FPRPF", Padded()
    calls = calls_of(steps)
    truths = truths_of(model, steps, calls)
    if way == "before":
        cpu_offload_with_hook(model, ELSEWHERE)
    fast = in_place(model) if way == "in place" else compiled(model)
    hooked = fast if way == "after" else model
    captured = None
    for edit in range(3):
        if edit or way != "before":  # pipelines renew hooks at the end of each edit
            remove_hook_from_module(hooked)
            cpu_offload_with_hook(hooked, ELSEWHERE)
        with hetcache.session(plan_of(steps), strict=True) as session:
            outputs = run(fast, calls)
        if edit:
            assert letters(session) == steps
            check(outputs, truths)
        slot = fast.forward if isinstance(fast, torch._dynamo.OptimizedModule) else fast._compiled_call_impl
        taken = slot if isinstance(slot, model_in_parts.WholeModel) else fast._old_forward
        assert len(taken._captures) == 1
        captured = captured or taken._captures[0]
        assert taken._captures[0] is captured, "captured anew"


class Numpy(nn.LayerNorm):
    """What no capture can follow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * int(np.abs(x.mean((0, 1)).numpy()).argmax())


class Broken(nn.LayerNorm):
    """Breaks the graph in the middle of the model, so that no part is a model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


class Hooked(Broken):
    """A hook of torch: what it does is not known."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_forward_pre_hook(lambda *_: None)


class Asking(Padded):
    """Branches on what is another in each call."""

    def forward(self, latents: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        return super().forward(latents * float(latents.sum().sin()), text, text_mask)


WHOLE = "Dynamo hands this model over in parts.*as a whole either.*"


@pytest.mark.parametrize(
    ("build", "norm", "why"),
    [
        (Padded, Numpy, WHOLE + "numpy"),
        (Asking, Broken, WHOLE + "depends on the values of .*latents.*, which are others in each call"),
        (Padded, Hooked, "Dynamo hands over a part of a model"),
    ],
)
def test_what_is_refused_whole_too(
    build: Callable[[], Any], norm: Callable[..., Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs as it was compiled, part by part, and the reason is said once."""
    monkeypatch.setattr(model_in_parts, "MOST_UNUSED", 2)
    model, inner = build(), CountingInner()
    model.norm = norm(22)
    calls = calls_of("FPPPPP")
    plain, fast = run(model, calls), compiled(model, inner)
    with warnings.catch_warnings(record=True) as caught, hetcache.session(plan_of("FPPPPP")) as session:
        warnings.simplefilter("always")
        check(run(fast, calls), plain)
    texts = [str(warning.message) for warning in caught if "parts" in str(warning.message) or "part " in str(warning)]
    assert len(texts) == 1, texts
    assert re.search(why, texts[0], re.DOTALL), texts
    assert letters(session) == ("FF" if build is Asking else "")
    of_edit = inner.graphs
    check(run(fast, calls), plain)
    assert inner.graphs == of_edit, "its parts were not compiled in the session"
    with (
        pytest.raises(hetcache.SessionError, match=r"in parts|a part"),
        hetcache.session(plan_of("FPPPPP"), strict=True),
    ):
        run(fast, calls)
    check(run(fast, calls), plain)


class Counts(Padded):
    """Each call changes what the next one computes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, latents: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(latents, text * self.calls, text_mask)


def test_a_model_that_counts_its_calls_runs_as_it_is() -> None:
    model, calls = Counts(), calls_of("FPPF")
    plain = run(Counts(), calls)
    fast = compiled(model)
    with pytest.warns(HetCacheWarning, match="each call changes what it is"), hetcache.session(plan_of("FFFF")):
        check(run(fast, calls), plain)
    assert model.calls == 4


def test_a_change_at_each_call_is_forgotten_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_in_parts, "MOST_UNUSED", 2)
    model, calls = Padded(), calls_of("FPRF")
    fast = compiled(model)
    with warnings.catch_warnings(record=True) as caught, hetcache.session(plan_of("FPRF")):
        warnings.simplefilter("always")
        for number, kwargs in enumerate(calls):
            model.gains["default"] = 1.0 + number
            check(run(fast, [kwargs]), run(model, [kwargs]))
    assert any("its attributes are others in each call" in str(warning.message) for warning in caught)
    with hetcache.session(plan_of("FPRF"), strict=True) as session:
        run(fast, calls)
    assert letters(session) == "FPRF"


def test_a_list_made_anew_is_no_change() -> None:
    model, calls = Padded(), calls_of("FPRF")
    fast = compiled(model)
    with hetcache.session(plan_of("FPRF"), strict=True) as session:
        for kwargs in calls:
            model.sizes = [1, 2, {"of": "three"}]
            run(fast, [kwargs])
    assert letters(session) == "FPRF"
    assert len(fast.forward._captures) == 1


def scaled_by(factor: float) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[float], None]]:
    """A function, and what changes the number that it takes from here."""

    def change(to: float) -> None:
        nonlocal factor
        factor = to

    return lambda x: x * factor, change


class Activated(Padded):
    """Holds a function, and makes numbers of the usual type in each call."""

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, latents: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        out = super().forward(latents, self.act(text), text_mask)
        return out + torch.linspace(0, 1, out.shape[-1])


def test_a_number_in_a_closure_is_seen() -> None:
    act, change = scaled_by(0.5)
    model, calls = Activated(act), calls_of("FPP")
    fast = compiled(model)
    with hetcache.session(plan_of("FPP"), strict=True) as session:
        run(fast, calls[:2])
        change(2.0)
        check(run(fast, calls[2:]), run(model, calls[2:]))
    assert letters(session) == "FPF"


@pytest.mark.parametrize("mode", ["autocast", "the usual type"])
def test_what_changes_types_is_seen(mode: str) -> None:
    """Each call is what the model gives under the same mode, in the same type."""
    model, calls = Activated(torch.sin), calls_of("FFF")
    run(model, calls)  # its table is of the usual type
    fast = compiled(model)

    @contextmanager
    def changed(there: bool) -> Iterator[None]:
        if mode == "autocast":
            with torch.autocast("cpu", torch.bfloat16, enabled=there):
                yield
            return
        torch.set_default_dtype(torch.float64 if there else torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    with hetcache.session(plan_of("FFF"), strict=True):
        for there, kwargs in zip((True, False, True), calls, strict=True):
            with changed(there):
                (own,), (cached,) = run(model, [kwargs]), run(fast, [kwargs])
            assert cached.dtype == own.dtype
            torch.testing.assert_close(cached, own)
    assert len(fast.forward._captures) == 2, "one for each mode"


@pytest.mark.skipif(torch.__version__ < "2.12", reason="with torch 2.11 something, not of Python, keeps them")
def test_a_refused_call_lets_its_arguments_go() -> None:
    """What is kept of the refusal, and of its error, holds no latents."""
    model = Padded()
    model.norm = Numpy(22)
    fast, (kwargs,) = compiled(model), calls_of("F")
    held = weakref.ref(kwargs["latents"])
    with warnings.catch_warnings(), hetcache.session(plan_of("FF")):
        warnings.simplefilter("ignore")
        fast(**kwargs)
        del kwargs
        gc.collect()
        assert held() is None


def test_masks_that_are_filled_anew_in_inference_mode() -> None:
    model, calls = Padded(), calls_of("FF")
    fast = compiled(model)
    with torch.inference_mode():
        mask = torch.arange(TEXT_TOKENS)[None] < 7
        for words in (7, 4):
            mask[:, words:] = False
            with hetcache.session(plan_of("FF"), strict=True):
                given = [{**kwargs, "text_mask": mask} for kwargs in calls]
                check(run(fast, given), run(model, given))


def test_another_thread_captures() -> None:
    model = Padded()
    fast = compiled(model)
    kinds: list[str] = []
    errors: list[BaseException] = []

    def edit(words: int) -> None:
        try:
            with torch.no_grad(), hetcache.session(plan_of("FPRF"), strict=True) as session:
                run(fast, calls_of("FPRF", words))
            kinds.append(letters(session))
        except BaseException as error:
            errors.append(error)

    edit(7)
    busy = threading.Thread(target=lambda: [edit(words) for words in (3, 4, 5)])
    busy.start()
    while busy.is_alive():
        edit(7)
    assert errors == []
    assert set(kinds) <= {"FPRF", "FFRF"}, "more than one call that was not planned to be is FULL"


class Lengths(TinyDiT):
    """Writes into a small input, or into a table, before it asks for a number."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, latents: torch.Tensor, text: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        length = length.clone() if self.way != "a table" else torch.zeros(1, dtype=torch.int64).add_(length)
        part = length[:1]
        if self.way == "a view":
            part += 4
        elif self.way == "an entry":
            length[0] = 7
        else:
            length += 4
        return super().forward(latents, text[:, : int(length.sum())])


@pytest.mark.parametrize("way", ["in place", "an entry", "a view", "a table"])
def test_numbers_that_are_written_in_place(way: str) -> None:
    model, calls = Lengths(way), [{**kwargs, "length": torch.tensor([3])} for kwargs in tiny_calls("FFF")]
    fast = compiled(model)
    with warnings.catch_warnings(), hetcache.session(plan_of("FFF")):
        warnings.simplefilter("ignore")
        check(run(fast, calls), run(model, calls))


def test_an_error_leaves_what_was_compiled() -> None:
    model, (kwargs,) = Padded(), calls_of("F")
    fast = compiled(model)
    before = fast.forward
    with pytest.raises(hetcache.NonFiniteError), hetcache.session(plan_of("FP")):
        fast(**{**kwargs, "latents": kwargs["latents"] * torch.nan})
    assert fast.forward is before
    with hetcache.session(plan_of("FP"), strict=True) as session:
        run(fast, calls_of("FP"))
    assert letters(session) == "FP"


def test_a_structure() -> None:
    """Weights may hold anything, and be others of the same kind; all else that a call depends on may not change."""
    model = Padded()
    model.table = torch.ones(3)
    model.extra = type("Extra", (), {})()
    model.extra.scale = 1.0
    known = Structure(model)
    rescaled(model)
    another_weight(model)
    model.gains["default"] = float("1.0")
    assert known.holds()
    changes: list[Callable[[], Any]] = [
        lambda: setattr(model.extra, "scale", True),
        lambda: setattr(model, "table", torch.ones(3)),
        lambda: model.table.mul_(2),
        lambda: setattr(model.out, "weight", nn.Parameter(model.out.weight.t().contiguous().t())),
        lambda: setattr(model.out, "weight", type("Own", (nn.Parameter,), {})(model.out.weight)),
        lambda: model.gains.update(other=1.0),
        lambda: doubled(model),
        lambda: setattr(model, "more", None),
        lambda: model.double(),
        lambda: model.norm.train(),
        lambda: model.norm.register_forward_hook(lambda *_: None),
        lambda: another_layer(model),
        lambda: model.register_parameter("another", None),
        lambda: model.register_buffer("also", torch.ones(2)),
    ]
    for number, change in enumerate(changes):
        known = Structure(model)
        assert known.holds()
        change()
        assert not known.holds(), number
