"""The state of a run, from which an interrupted one goes on as if nothing had happened."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from ssam.adapter import Task
from ssam.errors import UserError
from ssam.files import make_empty, new_name, put_in_place, write_json
from ssam.metrics import LabelScores
from ssam.options import TrainOptions
from ssam.tuning import kept_tensors, load_kept_tensors

ADAPTER_FILE = "adapter.safetensors"
RUN_FILE = "run.json"
# What may differ when a run goes on.
FREE_OPTIONS = (
    "output_dir",
    "data_root",
    "backbone",
    "num_workers",
    "overlays",
    "report_to",
    "resume",
    "overwrite",
)


@dataclass
class Progress:
    """Where a run stands. Saved with the optimizer by accelerate, through ``state_dict``."""

    step: int = 0
    seconds: float = 0.0
    best_dice: float = float("-inf")
    best_step: int = 0
    losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    label_scores: list[dict[str, dict[str, Any]]] = field(default_factory=list)

    def add_step(self, loss: float) -> None:
        self.step += 1
        self.losses.append(loss)

    @property
    def history(self) -> dict[str, Any]:
        """Every step's loss; every validation's step and Dice, and its scores by label."""
        return {"losses": self.losses, "validations": self.validations, "label_scores": self.label_scores}

    def add_validation(self, dice: float, scores: Mapping[str, LabelScores]) -> bool:
        """Notes a validation after the latest step; whether it was the best so far."""
        self.validations.append((self.step, dice))
        self.label_scores.append({label: asdict(score) for label, score in scores.items()})
        if dice <= self.best_dice:
            return False
        self.best_dice, self.best_step = dice, self.step
        return True

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class Interruption:
    """While entered, takes note of the first Ctrl-C or SIGTERM, so that the step at hand is finished and saved.

    A second one ends the program at once.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interruption:
        self.previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def save_adapter_only(accelerator: Accelerator) -> None:
    """Makes accelerate's states hold the adapter in place of the whole model."""

    def save(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        if accelerator.is_main_process:
            for model in models:
                tensors = kept_tensors(accelerator.unwrap_model(model))
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(folder) / ADAPTER_FILE)
        weights.clear()

    def load(models: list[nn.Module], folder: str) -> None:
        while models:
            model = accelerator.unwrap_model(models.pop())
            load_kept_tensors(model, load_file(Path(folder) / ADAPTER_FILE))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_state(accelerator: Accelerator, folder: Path, run: dict[str, Any]) -> None:
    """Saves the state of all processes, in place of an older one, with the description of the run."""
    temporary = new_name(folder)
    if accelerator.is_main_process:
        make_empty(temporary)
        write_json(temporary / RUN_FILE, run)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        put_in_place(temporary, folder)
    accelerator.wait_for_everyone()


def description_of_run(
    options: TrainOptions, task: Task, data: Mapping[str, Mapping[str, Any]], processes: int
) -> dict[str, Any]:
    """All that must be the same when a run goes on; data are what `ssam.record.check_images` says of the splits."""
    run = {name: value for name, value in asdict(options).items() if name not in FREE_OPTIONS}
    facts = {"labels": list(task.labels), "weights": task.backbone_digest, "processes": processes}
    return {**run, **facts, **{f"{split} images": dict(summary) for split, summary in data.items()}}


def check_same_run(folder: Path, run: dict[str, Any]) -> None:
    """Raises a `UserError` where the state in a folder is of another run."""
    saved = json.loads((folder / RUN_FILE).read_text())
    for name, value in run.items():
        if saved.get(name) != value:
            raise UserError(
                f"{folder.parent} cannot go on: its {name} was {saved.get(name)!r} and is now {value!r}; repeat the "
                f"first command, or remove {folder} to start anew."
            )
