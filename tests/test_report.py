"""The page of an edit: whole, valid, on its own, and true to the frames, the plan and the calls."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import tomllib
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hetcache_compile import Plan
from hetcache_compile.edit import page, report
from hetcache_compile.edit.editing import EditRequest, Run
from hetcache_compile.edit.metrics import psnr
from hetcache_compile.plan.partition import to_token_grid
from hetcache_compile.plan.schedule import StepKind
from hetcache_compile.sessions.stats import Stats

FRAMES, HEIGHT, WIDTH, GRID = 9, 24, 40, (3, 3, 5)
FOUND = filter(None, map(shutil.which, ("google-chrome", "chromium")))
CHROMIUM = next((path for path in FOUND if not path.startswith("/snap/")), None)
"""One in a snap may not read the folders of tests."""
VOID = {"meta", "input", "br", "img", "link"}


class Edit:
    """A made-up edit: which values the page gets, and the page."""

    def __init__(self, frames: int = FRAMES, baseline: bool = True, branches: int = 2, prompt: str = "a cat") -> None:
        generator = np.random.default_rng(0)
        video, uncached = generator.integers(0, 256, (2, frames, HEIGHT, WIDTH, 3), dtype=np.uint8)
        mask = np.zeros((frames, HEIGHT, WIDTH), dtype=np.bool_)
        mask[:, :8, :8] = True
        cached = uncached.copy()
        cached[mask] = np.clip(cached[mask].astype(int) + generator.integers(-9, 10, (mask.sum(), 3)), 0, 255)
        grid = (1 if frames == 1 else GRID[0], *GRID[1:])
        self.request = EditRequest(video, mask, prompt, num_inference_steps=4)
        self.plan = Plan.from_mask(
            mask, grid, num_inference_steps=4, schedule="FPR", margin=1.0, cached_ratio=0.5, multiple=1
        )
        kinds = [kind for kind in self.plan.steps for _ in range(branches)]
        seconds = [round(0.5 / (1 + kind) + 0.01 * number, 3) for number, kind in enumerate(kinds)]
        watches: Any = [SimpleNamespace(seconds=second) for second in seconds]
        self.cached = Run(cached, seconds, Stats(kinds, watches, 1.0, 2**20))
        self.uncached = Run(uncached, [0.6] * len(kinds)) if baseline else None

    def report(self) -> dict[str, Any]:
        return report.make_report(self.request, self.plan, self.cached, self.uncached, None, "cpu")

    def html(self) -> str:
        made = self.report()
        words = page.Words(report.headline(made), report.table_rows(made), report.busy_machine_warning(made))
        return page.render_page(made, words, self.request, self.plan, self.cached, self.uncached)


class Elements(HTMLParser):
    """What a page is made of; a tag that is closed out of turn is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(attributes) == len(dict(attributes)), f"an attribute twice in {tag}"
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(text)

    def values(self, name: str) -> list[str]:
        """Every value of an attribute."""
        return [value for _, attributes in self.found if (value := attributes.get(name)) is not None]


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def pixels(address: str | None) -> np.ndarray[Any, Any]:
    """A picture that stands in its own address; RGBA if parts of it are transparent."""
    assert address is not None
    picture = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    array = np.asarray(picture.convert("RGBA"))
    return array[..., :3] if (array[..., 3] == 255).all() else array


def tiles(data: dict[str, Any], name: str) -> np.ndarray[Any, Any]:
    """The frames of a sheet, cut out as the script does it."""
    address = data["sheets"][name]
    assert address.startswith("data:image/webp;base64,")
    sheet = pixels(address)
    height, width, columns = data["height"], data["width"], data["columns"]
    corners = [(f // columns * height, f % columns * width) for f in range(data["frames"])]
    return np.stack([sheet[y : y + height, x : x + width] for y, x in corners])


@pytest.fixture(scope="module")
def edit() -> Edit:
    return Edit()


@pytest.fixture(scope="module")
def text(edit: Edit) -> str:
    return edit.html()


def test_the_page_is_valid_and_its_labels_lead_somewhere(text: str) -> None:
    elements = Elements(text)
    ids = elements.values("id")
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    referred = {*elements.values("for"), *elements.values("aria-labelledby")}
    referred |= set(re.findall(r'find\("([\w-]+)"\)', text))
    assert referred - set(ids) == set()
    labelled = set(elements.values("for"))
    for tag, attributes in elements.found:
        if tag == "canvas" or (tag == "input" and attributes["type"] == "range"):
            assert attributes.get("aria-label") or attributes.get("id") in labelled, attributes


def test_the_page_needs_no_other_file(text: str) -> None:
    elements = Elements(text)
    assert [*elements.values("src"), *elements.values("href"), *elements.values("srcset")] == []
    assert {tag for tag, _ in elements.found} & {"link", "img", "video", "iframe", "object", "base"} == set()
    code = re.sub(r"data:image/webp;base64,[\w+/=]*", "", text)
    assert set(re.findall(r"\w+://[^\"\s]*", code)) == {"http://www.w3.org/2000/svg"}  # a name, nothing is loaded
    assert re.findall(r"url\(|@import|@font-face|\bimport\b|\bfetch\(", code) == []
    assert any("default-src 'none'" in policy for policy in elements.values("content"))


def test_the_page_has_every_part(edit: Edit, text: str) -> None:
    elements = Elements(text)
    shown = set(elements.values("data-shows"))
    assert shown == {"input", "uncached", "cached", "wipe", "difference", "plan"}
    assert {"play", "frame", "wipe", "psnr", "show-tokens", "tokens-chart", "totals", "calls", "step"} <= set(
        elements.values("id")
    )
    cells = [text.strip() for text in elements.texts["td"]]
    assert [value for _, value in report.table_rows(edit.report())] == cells
    assert elements.values("class")[0] == "compared clip"


def test_pictures_of_a_small_clip_are_exact(edit: Edit, text: str) -> None:
    data = data_of(text)
    for name, frames in (
        ("input", edit.request.video), ("cached", edit.cached.frames), ("uncached", edit.uncached.frames),
    ):  # fmt: skip
        assert np.array_equal(tiles(data, name), frames), name
    assert np.array_equal(tiles(data, "mask")[..., 3] > 0, edit.request.mask)


def test_the_difference_map_shows_what_differs(edit: Edit, text: str) -> None:
    data = data_of(text)
    levels = np.abs(edit.cached.frames.astype(int) - edit.uncached.frames).max(axis=-1)
    shown = tiles(data, "difference").sum(axis=-1)
    assert np.array_equal(shown > 0, levels > 0)
    assert [int(shown[levels == level].min()) for level in (1, 4, 9)] == sorted(
        int(shown[levels == level].max()) for level in (1, 4, 9)
    )
    assert data["difference"]["largest"] == levels.max() == 9


def test_a_few_pixels_do_not_set_the_scale_of_the_map() -> None:
    levels = np.zeros((1, 100, 100), dtype=np.uint8)
    levels[0, :, :50] = 20
    levels[0, 0, 0] = 255
    assert page.largest_told_apart(levels) == 20


def test_psnr_is_that_of_each_frame(edit: Edit) -> None:
    result, reference, mask = edit.cached.frames.copy(), edit.uncached.frames, edit.request.mask.copy()
    result[1] = reference[1]
    mask[2] = False
    found = page.psnr_by_frame(result, reference, mask)
    assert found[1:3] == ["identical", "empty"]
    assert found[3] == pytest.approx(psnr(result[3:4], reference[3:4], mask[3:4]), abs=0.01)


def test_tokens_are_those_of_the_plan(edit: Edit) -> None:
    found = page.tokens_by_frame(edit.plan, FRAMES)
    roles = np.array([[int(role) for role in frame] for frame in found["tokens"]]).ravel()
    assert np.flatnonzero(roles < found["num_active_roles"]).tolist() == edit.plan.active_index.tolist()
    assert np.flatnonzero(roles == page.ROLES.index("read from the cache")).tolist() == edit.plan.context_index.tolist()
    assert (roles == page.ROLES.index("left out")).any()
    assert np.array_equal(np.flatnonzero(roles == 0), np.flatnonzero(edit.plan.token_kind == 0))


def test_a_frame_lies_in_the_latent_frame_that_its_mask_goes_to(edit: Edit) -> None:
    latent_of = page.tokens_by_frame(edit.plan, FRAMES)["latent_of"]
    for frame, latent in enumerate(latent_of):
        mask = np.zeros((FRAMES, 3, 5), dtype=np.bool_)
        mask[frame] = True
        assert to_token_grid(mask, GRID)[latent].all(), frame


def test_each_step_has_its_calls(edit: Edit) -> None:
    steps = page.calls_by_step(edit.plan, edit.cached)
    assert [[call["kind"] for call in step] for step in steps] == [[kind.name] * 2 for kind in edit.plan.steps]
    assert [call["seconds"] for step in steps for call in step] == edit.cached.seconds
    odd = Run(None, edit.cached.seconds[:3], Stats([StepKind.FULL, StepKind.FULL, StepKind.REUSE]))
    assert [len(step) for step in page.calls_by_step(edit.plan, odd)] == [1, 1, 1]
    refused = replace(edit.cached, stats=Stats())
    assert {call["kind"] for step in page.calls_by_step(edit.plan, refused) for call in step} == {"FULL"}


def test_a_still_or_an_edit_alone_leaves_parts_out() -> None:
    still = Edit(frames=1).html()
    assert Elements(still).values("class")[0] == "compared still"
    assert data_of(still)["columns"] == 1
    alone = Edit(baseline=False).html()
    assert Elements(alone).values("class")[0] == "alone clip"
    assert set(data_of(alone)["sheets"]) == {"input", "mask", "cached"}
    assert "<dd>not" not in alone  # the headline has only what was measured


def test_words_of_the_user_stay_words() -> None:
    prompt = "</script><script>alert('$style & \"x\"')</script>"
    elements = Elements(Edit(prompt=prompt).html())
    assert [tag for tag, _ in elements.found].count("script") == 2
    assert f"“{prompt}”" in "".join(elements.texts["p"])


def test_a_large_clip_is_shown_smaller(edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = page.Sheet((81, 480, 832))
    assert 0.9 * page.MOST_PIXELS < sheet.frames * sheet.height * sheet.width <= page.MOST_PIXELS
    assert not sheet.exact
    monkeypatch.setattr(page, "MOST_PIXELS", FRAMES * HEIGHT * WIDTH // 4)
    monkeypatch.setattr(page, "MOST_EXACT_PIXELS", 0)
    data = data_of(edit.html())
    assert (data["height"], data["width"], data["exact"], data["full_size"]) == (HEIGHT // 2, WIDTH // 2, False, False)
    assert tiles(data, "cached").shape == (FRAMES, HEIGHT // 2, WIDTH // 2, 3)


def test_what_the_page_is_made_of_is_installed() -> None:
    root = Path(__file__).parent.parent
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    beside = {
        path.name for path in (root / "hetcache_compile/edit").iterdir() if path.suffix in (".html", ".css", ".js")
    }
    assert set(listed["hetcache_compile.edit"]) == beside != set()


DRIVER = """<script>
const move = (id, value) => {
  const slider = document.getElementById(id);
  slider.value = value;
  slider.dispatchEvent(new Event("input"));
};
const drive = () => {
  if (!document.body.dataset.ready) return;
  document.getElementById("play").click();
  move("frame", 5);
  move("wipe", 10);
  move("step", 1);
  for (const canvas of document.querySelectorAll("canvas")) canvas.dataset.pixels = canvas.toDataURL();
};
drive();  // the page may be ready already, or not yet
new MutationObserver(drive).observe(document.body, { attributeFilter: ["data-ready"] });
</script></body>"""
"""Moves every slider once the page is ready, and leaves what the pictures show in the page."""


def opened(folder: Path) -> Elements:
    """The page of a folder, once its script has run. A busy machine may stop the browser before: it is asked again."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
        (folder / "report.html").as_uri(),
    ]  # fmt: skip
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert "CONSOLE" not in done.stderr, done.stderr
        elements = Elements(done.stdout)
        if "data-ready" in dict(elements.found)["body"]:
            return elements
    pytest.fail(f"the page was never ready: {done.stderr}")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize("kind", ["clip", "still", "alone"])
def test_the_script_runs(kind: str, tmp_path: Path) -> None:
    edit = Edit(frames=1 if kind == "still" else FRAMES, baseline=kind != "alone")
    (tmp_path / "report.html").write_text(edit.html().replace("</body>", DRIVER), "utf-8")
    elements = opened(tmp_path)
    names = Counter(name for value in elements.values("class") for name in value.split())
    assert names["call"] == 2 * len(edit.plan.steps)
    assert names["line-mask"] == (1 if kind == "alone" else 2)  # the key, and the curve
    frame = 0 if kind == "still" else 5
    outputs = "".join(elements.texts["output"])
    assert f"{frame + 1} of {len(edit.request.video)}" in outputs
    first, second = edit.cached.seconds[2:4]
    assert f"2 of 4: PARTIAL in {first:.3g} s, PARTIAL in {second:.3g} s" in outputs
    canvases = {a["data-shows"]: a["data-pixels"] for tag, a in elements.found if tag == "canvas"}
    assert np.array_equal(pixels(canvases["cached"]), edit.cached.frames[frame])
    if edit.uncached is not None:
        wiped = edit.cached.frames[frame].copy()
        wiped[:, : WIDTH // 10] = edit.uncached.frames[frame, :, : WIDTH // 10]
        assert np.array_equal(pixels(canvases["wipe"]), wiped)
