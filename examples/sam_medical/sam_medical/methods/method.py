"""A method as data: the model that it starts from, and what tunes it.

To add a method, write a `Method` in a module of your own and give its place, ``--method package.module:NAME``. To add
it here, write a file in this package and name its place in `sam_medical.methods.METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from sam_medical.methods.tuners import InPlaceTuner, Tuner
from sam_medical.models import prompts
from sam_medical.models.prompts import PromptKind


@dataclass(frozen=True)
class PromptedBackbone:
    """A pretrained backbone, which the user chooses, and its prompts.

    Attributes:
        prompt: How the decoder is prompted.
        mask_per_label: Whether a single prompt gives one mask per label.
    """

    prompt: PromptKind = prompts.LABELS
    mask_per_label: bool = False


@dataclass(frozen=True)
class Network:
    """A network that starts from random weights.

    Attributes:
        make: The network for a number of labels and images of a side: (B, 3, S, S) to logits (B, K, S, S).
    """

    make: Callable[[int, int], nn.Module]


@dataclass(frozen=True)
class Method:
    """One way to segment.

    Attributes:
        title: As tables and plots name it.
        source: The paper or package that it is from.
        model: What it starts from.
        tuner: What learns, and how that is saved.
        departs: What differs from the source; empty if nothing does.
        loss: A name in `sam_medical.training.losses`.
        learning_rate: The peak, if none is given.
    """

    title: str
    source: str
    model: PromptedBackbone | Network = field(default_factory=PromptedBackbone)
    tuner: Tuner = field(default_factory=InPlaceTuner)
    departs: str = ""
    loss: str = "focal-dice"
    learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        if not isinstance(self.tuner, Tuner):
            raise TypeError(f"a method's tuner must be a Tuner, and {self.title}'s is {type(self.tuner).__name__}")

    @property
    def is_sam(self) -> bool:
        return isinstance(self.model, PromptedBackbone)

    @property
    def prompt(self) -> PromptKind | None:
        """How a backbone is prompted; None for a network."""
        return self.model.prompt if isinstance(self.model, PromptedBackbone) else None

    @property
    def needs_text(self) -> bool:
        return self.prompt is not None and self.prompt.from_labels

    @property
    def needs_expert(self) -> bool:
        """Whether somebody must point at what is to be segmented, in every image."""
        return self.prompt is not None and self.prompt.from_expert

    @property
    def learns(self) -> bool:
        return self.tuner.learns

    @property
    def is_random(self) -> bool:
        """Whether a seed makes a difference. It does for frozen text prompts, too: their layer is random."""
        return self.learns or self.needs_text

    @property
    def takes_target_modules(self) -> bool:
        return self.tuner.takes_target_modules
