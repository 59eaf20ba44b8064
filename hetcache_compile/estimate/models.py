"""The models that `hetcache estimate` knows by name, and those of local folders, by their configs alone.

`models.json` holds the public configs with their sources, and for each class how deep a model has to be to show what
each of its blocks adds.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import EstimateError
from ..plan.partition import Grid

DATA = "models.json"
TRIPLES = ("token", "size")
"""What is a tuple, for which JSON has lists."""


@dataclass(frozen=True)
class KnownModel:
    """A transformer of diffusers, by its config, and how its pipeline calls it.

    Attributes:
        name: as users give it.
        class_name: the class in diffusers.
        config: its arguments.
        token: frames, rows and columns of pixels that make one token; the first frame has a token to itself.
        size: usual height, width and number of frames of a video, or of a picture.
        steps: usual number of denoising steps.
        branches: model calls in each step: 2 with classifier-free guidance.
        text_tokens: as the pipeline pads them.
        experts: models that share the steps; each has its cache.
        references: pictures of the same size whose tokens stand behind the latents'.
        time_per_token: whether each token is given a time of its own.
        source: where the numbers are from.
        depths: for each config entry that says how many blocks there are, the least that shows the usual ones.
    """

    name: str
    class_name: str
    config: Mapping[str, Any]
    token: tuple[int, int, int]
    size: tuple[int, int, int]
    steps: int
    branches: int
    text_tokens: int
    source: str
    depths: Mapping[str, int]
    experts: int = 1
    references: int = 0
    time_per_token: bool = False

    def grid_of(self, height: int, width: int, num_frames: int) -> Grid:
        """The token grid (T', H', W'), without references.

        Raises:
            EstimateError: the size is no multiple of what makes a token.
        """
        frames, rows, columns = self.token
        for name, value, factor in (("height", height, rows), ("width", width, columns)):
            if value % factor:
                raise EstimateError(f"{name} must be a multiple of {factor} for {self.name}, got {value}")
        if frames == 1 and num_frames != 1:
            raise EstimateError(f"{self.name} makes pictures: --num-frames must be 1, got {num_frames}")
        if num_frames % frames != 1 % frames:
            raise EstimateError(
                f"the number of frames must be one more than a multiple of {frames} for {self.name}, got {num_frames}"
            )
        return (num_frames - 1) // frames + 1, height // rows, width // columns

    def with_references(self, grid: Grid) -> Grid:
        """The grid of all tokens on the axis: those of references follow as frames."""
        return (grid[0] * (1 + self.references), *grid[1:])


@functools.cache
def known_models() -> Mapping[str, KnownModel]:
    """Every built-in model, by its name."""
    data = json.loads((resources.files(__package__) / DATA).read_text())
    found = {}
    for name, entry in data["models"].items():
        class_name = entry.pop("class")
        given: dict[str, Any] = {key: tuple(value) if key in TRIPLES else value for key, value in entry.items()}
        found[name] = KnownModel(name=name, class_name=class_name, depths=data["depths"][class_name], **given)
    return found


def find_model(name: str) -> KnownModel:
    """A built-in model by its name, or that of a local diffusers folder.

    A folder needs no weights: `config.json` of the transformer is enough. How it is called is taken from the built-in
    model of the same class whose config is most like its own.

    Raises:
        EstimateError: there is none.
    """
    known = known_models()
    folder = Path(name)
    if name.lower() in known:
        return known[name.lower()]
    if not folder.is_dir():
        raise EstimateError(f"{name} is neither a folder nor a known model: give one of {', '.join(known)}")
    inner = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config = read_config(inner / "config.json")
    class_name = config.get("_class_name")
    alike = [model for model in known.values() if model.class_name == class_name]
    if not alike:
        classes = dict.fromkeys(model.class_name for model in known.values())
        raise EstimateError(f"{inner} holds a {class_name}; estimates are made of {', '.join(classes)}")
    nearest = max(alike, key=lambda model: sum(config.get(key) == value for key, value in model.config.items()))
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    experts = 1 + (folder / "transformer_2").is_dir()
    return replace(nearest, name=name, config=own, experts=experts, source=f"{inner}, called like {nearest.name}")


def read_config(path: Path) -> dict[str, Any]:
    """A config of diffusers.

    Raises:
        EstimateError: there is none.
    """
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EstimateError(f"{path} cannot be read as a config of a diffusers transformer: {error}") from error
    if not isinstance(config, dict):
        raise EstimateError(f"{path} is no config of a diffusers transformer")
    return config
