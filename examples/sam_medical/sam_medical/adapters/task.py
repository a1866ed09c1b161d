"""The task of an adapter (dataset, labels, model, preprocessing), and its file task.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from sam_medical.common.choices import FITS, INTENSITY_FORMS, LEAST_TILE, OFFSET_FORMS, PLANES, PROMPTS, Fit, Prompt
from sam_medical.common.errors import UserError
from sam_medical.common.files import whole_folder, write_json
from sam_medical.common.json_files import read_object
from sam_medical.common.values import LARGEST_IMAGE, LONGEST_TEXT, is_whole, shortened
from sam_medical.data.base import require_label_names
from sam_medical.data.geometry import STORED
from sam_medical.data.intensity import LEGACY, is_intensity
from sam_medical.data.loading import Framing
from sam_medical.data.offset import AUTO as AUTO_OFFSET
from sam_medical.data.offset import BY_IMAGE, is_offset
from sam_medical.data.reading import Reading
from sam_medical.methods import METHODS
from sam_medical.methods.tuners import ADVICE

TASK_FILE = "task.json"
TEXT_FILE = "text_embeddings.safetensors"
MOST_FOLDS = 10**4


class TaskOptions(Protocol):
    """The options that define a task."""

    dataset: str
    fold: int | None
    backbone: str
    image_size: int
    text_encoder: str
    target_modules: str | None
    fit: Fit
    tile: int | None
    prompt: Prompt


@dataclass(frozen=True)
class Task:
    """The task of an adapter.

    Attributes:
        dataset: The training dataset, a name in `sam_medical.data.DATASETS`.
        labels: Names of the labels, in the order of the model's masks.
        backbone: The pretrained model; see `load_backbone`.
        image_size: Side of the model's square input, in pixels.
        text_encoder: The text encoder; see `encode_labels`.
        backbone_digest: Digest of the pretrained weights. The adapter works with these weights only.
        method: The training method, a name in `sam_medical.methods.METHODS`.
        target_modules: Regular expression of the tuned layers; None for the backbone's default.
        intensity: How images are read, like `offset` and `plane`; see `sam_medical.data.reading.Reading`. The three
            defaults are those of older adapters, which did not store these settings.
        offset: See `intensity`.
        plane: See `intensity`.
        fit: How images are mapped to the model's input, like `tile`; see `sam_medical.data.loading.Framing`.
        tile: See `fit`.
        prompt: "text", or "learned" for one learned token per label instead of its text embedding.
        absent: Labels that no training image had. They are excluded from means.
        fold: The fold of the dataset, starting at 1; None if it has no folds.
    """

    dataset: str
    labels: tuple[str, ...]
    backbone: str
    image_size: int
    text_encoder: str
    backbone_digest: str = ""
    method: str = "s-sam"
    target_modules: str | None = None
    intensity: str = LEGACY
    offset: str = BY_IMAGE
    plane: str = STORED
    fit: str = "stretch"
    tile: int | None = None
    prompt: str = "text"
    absent: tuple[str, ...] = ()
    fold: int | None = None

    @classmethod
    def from_options(cls, options: TaskOptions, method: str, labels: Sequence[str], reading: Reading) -> Task:
        """Creates the task from the options of a command.

        Args:
            options: The options of data, model and input.
            method: The training method.
            labels: The names of the dataset's labels, in its order.
            reading: How images are read, with ``auto`` resolved; see `settle_reading`.
        """
        return cls(
            dataset=options.dataset,
            fold=options.fold,
            labels=tuple(labels),
            backbone=options.backbone,
            image_size=options.image_size,
            text_encoder=options.text_encoder,
            method=method,
            target_modules=options.target_modules,
            intensity=reading.intensity,
            offset=reading.offset,
            plane=reading.plane,
            fit=options.fit,
            tile=options.tile,
            prompt=options.prompt,
        )

    @property
    def uses_text(self) -> bool:
        return METHODS[self.method].needs_text and self.prompt == "text"

    @property
    def reading(self) -> Reading:
        return Reading(self.intensity, self.plane, offset=self.offset)

    @property
    def framing(self) -> Framing:
        return Framing(self.image_size, self.fit, self.tile)


def files_of(task: Task) -> list[str]:
    """Returns the files that an adapter's folder must contain in addition to the task."""
    tuner = METHODS[task.method].tuner
    return [tuner.weights_file, *tuner.other_files, *([TEXT_FILE] if task.uses_text else [])]


def write_task(task: Task, folder: Path) -> None:
    """Writes the task with digests of itself and of the other files, which must exist already."""
    values = {name: value for name, value in asdict(task).items() if name != "fold" or value is not None}
    content = {**values, "files": {name: _digest(folder / name) for name in files_of(task)}}
    write_json(folder / TASK_FILE, {**content, "digest": _digest_of(content)})


def read_task(folder: Path) -> Task:
    """Reads the task of an adapter, and verifies the digests of its files.

    Old adapters have no digests. For them, only the values are checked.

    Raises:
        UserError: if a file is missing or has changed, or a value is invalid.
    """
    folder = whole_folder(folder)
    path = folder / TASK_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {TASK_FILE}; {ADVICE}.")
    content = read_object(path, ADVICE)
    has_digests = "files" in content or "digest" in content
    if has_digests and content.pop("digest", None) != _digest_of(content):
        raise UserError(f"{path} is damaged: it is not what was written; fetch the whole folder again.")
    files = content.pop("files", {})
    task = _checked(content, path)
    for name in files_of(task):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}; {ADVICE}.")
        if has_digests and (not isinstance(files, dict) or files.get(name) != _digest(folder / name)):
            raise UserError(
                f"{folder / name} is damaged or another adapter's: it is not what {TASK_FILE} was written with; fetch "
                "the whole folder again."
            )
    return task


def _checked(content: dict[str, Any], path: Path) -> Task:
    """Returns the task in a file after checking every value.

    Raises:
        UserError: if a key is missing or unknown, or a value is invalid.
    """
    needed = {"dataset", "labels", "backbone", "image_size", "text_encoder"}
    for key in sorted(needed - content.keys()):
        raise UserError(f"{path} lacks the key {key!r}; {ADVICE}.")
    for key in sorted(content.keys() - RULES.keys()):
        raise UserError(f"{path} has the unknown key {key!r}; {ADVICE}.")
    method: Any = content.get("method")
    if _is_text(method) and ":" in method and method not in METHODS:
        raise UserError(f"{path}: {METHODS.unknown(method)}")
    for key, value in content.items():
        holds, rule = RULES[key]
        if not holds(value):
            raise UserError(f"{path}: {key} is {shortened(value)}, but it must be {rule}; {ADVICE}.")
    require_label_names(content["labels"], path)
    absent = content.get("absent", [])
    if not set(absent) <= set(content["labels"]):
        raise UserError(f"{path}: absent is {shortened(absent)}, but it must be some of the labels; {ADVICE}.")
    return Task(**{**content, "labels": tuple(content["labels"]), "absent": tuple(absent)})


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_TEXT and value.isprintable()


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) in (0, 16) and set(value) <= set("0123456789abcdef")


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "dataset": (_is_text, "a dataset's name"),
    "labels": (_are_texts, "a list of names"),
    "backbone": (_is_text, "a name or path"),
    "image_size": (
        lambda value: is_whole(value) and 1 <= value <= LARGEST_IMAGE,
        f"a whole number from 1 to {LARGEST_IMAGE}",
    ),
    "text_encoder": (_is_text, "a name or path"),
    "backbone_digest": (_is_digest, "sixteen hexadecimal digits"),
    "method": (lambda value: isinstance(value, str) and value in METHODS, f"one of {', '.join(METHODS)}"),
    "target_modules": (lambda value: value is None or _is_text(value), "a regular expression or null"),
    "intensity": (lambda value: _is_text(value) and is_intensity(value), INTENSITY_FORMS),
    "offset": (lambda value: _is_text(value) and is_offset(value) and value != AUTO_OFFSET, OFFSET_FORMS),
    "plane": (lambda value: value in PLANES, f"one of {', '.join(PLANES)}"),
    "fit": (lambda value: value in FITS, f"one of {', '.join(FITS)}"),
    "tile": (
        lambda value: value is None or (is_whole(value) and LEAST_TILE <= value <= LARGEST_IMAGE),
        f"null, or a whole number from {LEAST_TILE} to {LARGEST_IMAGE}",
    ),
    "prompt": (lambda value: value in PROMPTS, f"one of {', '.join(PROMPTS)}"),
    "fold": (lambda value: is_whole(value) and 1 <= value <= MOST_FOLDS, f"a whole number from 1 to {MOST_FOLDS}"),
    "absent": (
        lambda value: isinstance(value, list) and all(isinstance(label, str) for label in value),
        "a list of names",
    ),
}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _digest_of(content: dict[str, Any]) -> str:
    """Returns the digest of all values. The order of keys does not matter, the order of labels does."""
    try:
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    except (TypeError, ValueError, RecursionError):
        return ""
