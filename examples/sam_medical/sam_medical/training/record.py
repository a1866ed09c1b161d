"""The record of a finished run, metrics.json: enough to do it again, or to see why it came out otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam_medical.common.errors import UserError
from sam_medical.common.files import write_json
from sam_medical.common.json_files import read_json
from sam_medical.common.paths import own_name
from sam_medical.common.values import is_number, is_whole
from sam_medical.data import dataset_and_fold
from sam_medical.training.progress import Progress

RECORD_FILE = "metrics.json"
# Raised when a reader of older versions would misread the file. Files from before there was a number have none.
FORMAT = 2
# Options that say where and how a run was started, and not what it was.
OF_THE_MACHINE = ("output_dir", "data_root", "resume", "overwrite")


@dataclass(frozen=True)
class RunRecord:
    """What a finished run was, and what it gave.

    Attributes:
        test: Scores of the test images, as `scores_as_json` gives them: ``mean_dice``, and each label's in ``labels``.
        best_dice, best_step: The validation that chose the adapter.
        trainable_parameters: How many values learn.
        seconds: Time of training.
        peak_memory_bytes: The most memory in use; None where the system does not tell.
        data: For each split its number of images and their digest, as `check_images` gives them; empty in old files.
        weights: The digest of the pretrained weights; empty without any, and in old files.
        environment: Versions and device.
        processes: How many trained together.
        options: The run's options, without a place of the machine; see `portable_options`.
        history: Losses, validations and each label's scores, as `Progress.history` gives them.
    """

    test: dict[str, Any]
    best_dice: float
    best_step: int
    trainable_parameters: int
    seconds: float
    peak_memory_bytes: int | None
    data: dict[str, dict[str, Any]]
    weights: str
    environment: dict[str, str]
    processes: int
    options: dict[str, Any]
    history: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        """The labels in the dataset's order."""
        return list(self.test["labels"])

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        content = {
            "format": FORMAT,
            "test": self.test,
            "validation": {"best_dice": self.best_dice, "best_step": self.best_step},
            "trainable_parameters": self.trainable_parameters,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "data": self.data,
            "weights": self.weights,
            "environment": self.environment,
            "processes": self.processes,
            "options": self.options,
            "history": self.history,
        }
        write_json(path, content)

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Reads what a finished run of this or an older version has written.

        Raises:
            UserError: if the file holds anything else.
        """
        try:
            return cls._checked(read_json(path.read_bytes()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path} is not what a finished run writes; remove {path.parent}, and repeat the command."
            ) from error

    @classmethod
    def _checked(cls, content: Any) -> RunRecord:
        """The record in a file's JSON; raises a ValueError, TypeError, KeyError or AttributeError if it is none."""
        if not 1 <= content.get("format", 1) <= FORMAT:
            raise ValueError("it is of a later version")
        validation, test, memory = content["validation"], content["test"], content["peak_memory_bytes"]
        history = {"label_scores": [], **content["history"]}
        numbers = (validation["best_dice"], test["mean_dice"], content["seconds"], *history["losses"])
        counts = (validation["best_step"], content["trainable_parameters"], content["processes"], memory or 0)
        if not all(map(is_number, numbers)) or not all(map(is_whole, counts)):
            raise ValueError("a number is none")
        return cls(
            test={**test, "labels": dict(test["labels"])},
            best_dice=float(validation["best_dice"]),
            best_step=validation["best_step"],
            trainable_parameters=content["trainable_parameters"],
            seconds=float(content["seconds"]),
            peak_memory_bytes=memory,
            data=dict(content.get("data") or {}),
            weights=content.get("weights") or "",
            environment=dict(content["environment"]),
            processes=content["processes"],
            options=portable_options(dict(content["options"])),
            history={**history, "validations": [(step, float(dice)) for step, dice in history["validations"]]},
        )


def record_of_run(progress: Progress, options: Mapping[str, Any], **measured: Any) -> RunRecord:
    """The record of a run that has come to its end; what is measured goes by the attributes' names."""
    return RunRecord(
        best_dice=progress.best_dice,
        best_step=progress.best_step,
        seconds=round(progress.seconds, 1),
        options=portable_options(options),
        history=progress.history,
        **measured,
    )


def portable_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without places of the machine, and with the fold beside the dataset's name instead of in it."""
    kept = {name: value for name, value in options.items() if name not in OF_THE_MACHINE}
    for name in ("backbone", "text_encoder"):
        if isinstance(kept.get(name), str):
            kept[name] = own_name(kept[name])
    if isinstance(kept.get("dataset"), str):
        kept["dataset"], fold = dataset_and_fold(kept["dataset"], kept.get("fold"))
        kept = {**kept, "fold": fold} if fold is not None or "fold" in kept else kept
    return kept
