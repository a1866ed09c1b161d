"""The record of a finished run, metrics.json: results, options and environment, enough to reproduce the run."""

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
# Increased when older readers would misread the file. The oldest files have no format number.
FORMAT = 2
# Options of the local machine, without influence on the results.
OF_THE_MACHINE = ("output_dir", "data_root", "resume", "overwrite")


@dataclass(frozen=True)
class RunRecord:
    """The configuration and the results of a finished run.

    Attributes:
        test: Scores of the test images from `scores_as_json`: ``mean_dice``, and the scores per label in ``labels``.
        best_dice: The validation score that chose the adapter.
        best_step: The step of that validation.
        trainable_parameters: Number of trained values.
        seconds: Training time.
        peak_memory_bytes: Peak memory; None if the system does not report it.
        data: Per split, the number of images and their digest, from `check_images`; empty in old files.
        weights: The digest of the pretrained weights; empty without pretrained weights, and in old files.
        environment: Versions and device.
        processes: Number of processes that trained together.
        options: The options without local paths; see `portable_options`.
        history: Losses, validations and scores per label, from `Progress.history`.
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
        """Writes the file atomically."""
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
        """Reads the record of a finished run of this version or an older one.

        Raises:
            UserError: if the file is not such a record.
        """
        try:
            return cls._checked(read_json(path.read_bytes()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path} is not what a finished run writes; remove {path.parent}, and repeat the command."
            ) from error

    @classmethod
    def _checked(cls, content: Any) -> RunRecord:
        """Parses a record. Raises a ValueError, TypeError, KeyError or AttributeError if the JSON is not a record."""
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
    """Builds the record of a finished run. The keywords are the remaining attributes of `RunRecord`."""
    return RunRecord(
        best_dice=progress.best_dice,
        best_step=progress.best_step,
        seconds=round(progress.seconds, 1),
        options=portable_options(options),
        history=progress.history,
        **measured,
    )


def portable_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options without local paths, and with the fold separate from the dataset's name."""
    kept = {name: value for name, value in options.items() if name not in OF_THE_MACHINE}
    for name in ("backbone", "text_encoder"):
        if isinstance(kept.get(name), str):
            kept[name] = own_name(kept[name])
    if isinstance(kept.get("dataset"), str):
        kept["dataset"], fold = dataset_and_fold(kept["dataset"], kept.get("fold"))
        kept = {**kept, "fold": fold} if fold is not None or "fold" in kept else kept
    return kept
