"""The progress of a run: its step, losses and validations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sam_medical.common.values import is_number, is_whole
from sam_medical.evaluation.metrics import LabelScores


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        step: Number of updates so far.
        seconds: Training time, including the time before a resume.
        best_dice: The best validation score; minus infinity before the first validation.
        best_step: The step of the best validation.
        losses: The loss of each step.
        validations: The (step, score) pairs of the validations.
        label_scores: The scores by label of each validation.
    """

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
        """The losses, the validations, and their scores by label."""
        return {"losses": self.losses, "validations": self.validations, "label_scores": self.label_scores}

    def add_validation(self, dice: float, scores: Mapping[str, LabelScores]) -> bool:
        """Adds a validation at the current step. Returns whether it is the best so far."""
        self.validations.append((self.step, dice))
        self.label_scores.append({label: asdict(score) for label, score in scores.items()})
        if dice <= self.best_dice:
            return False
        self.best_dice, self.best_step = dice, self.step
        return True

    def as_json(self) -> dict[str, Any]:
        """Converts to JSON values. JSON has no infinity, so an undefined best score is None."""
        return {**asdict(self), "best_dice": self.best_dice if self.validations else None}

    @classmethod
    def from_json(cls, content: Any, labels: list[str]) -> Progress:
        """Restores the result of `as_json`.

        Args:
            content: The parsed JSON.
            labels: The labels of the run.

        Raises:
            ValueError: if a key is missing or unknown, or a value has the wrong type or range.
        """
        _require(isinstance(content, dict), "progress")
        _require(content.keys() == {field.name for field in fields(cls)}, "keys of progress")
        step, losses, validations = content["step"], content["losses"], content["validations"]
        _require(is_whole(step) and step >= 1, "step")
        _require(is_number(content["seconds"]) and content["seconds"] >= 0, "seconds")
        _require(isinstance(losses, list) and len(losses) == step and all(map(is_number, losses)), "losses")
        _require(isinstance(validations, list) and all(map(_is_validation, validations)), "validations")
        _require(all(1 <= validated <= step for validated, _ in validations), "validations")
        scores = content["label_scores"]
        _require(isinstance(scores, list) and len(scores) == len(validations), "label_scores")
        _require(all(_are_scores(by_label, labels) for by_label in scores), "label_scores")
        _require(is_whole(content["best_step"]), "best_step")
        # The first of equal scores, as in `add_validation`.
        best_step, best_dice = max(validations, key=lambda pair: pair[1], default=(0, None))
        _require((content["best_dice"], content["best_step"]) == (best_dice, best_step), "best_dice or best_step")
        pairs = [(validated, dice) for validated, dice in validations]
        best = float("-inf") if best_dice is None else best_dice
        return cls(**{**content, "validations": pairs, "best_dice": best})


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} cannot be")


def _is_validation(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and is_whole(pair[0]) and is_number(pair[1])


def _are_scores(by_label: Any, labels: list[str]) -> bool:
    names = {field.name for field in fields(LabelScores)}
    return (
        isinstance(by_label, dict)
        and list(by_label) == labels
        and all(isinstance(scores, dict) and scores.keys() == names for scores in by_label.values())
        and all(_is_score(name, value) for scores in by_label.values() for name, value in scores.items())
    )


def _is_score(name: str, value: Any) -> bool:
    return type(value) is bool if name == "trained" else value is None or is_number(value)
