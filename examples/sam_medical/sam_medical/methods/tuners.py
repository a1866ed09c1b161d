"""What tunes a model: through PEFT, in place, or as a whole. Each knows what learns and how that is saved."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from sam_medical.common.errors import UserError
from sam_medical.common.expressions import matches_any
from sam_medical.common.files import write_tensors
from sam_medical.common.json_files import read_object
from sam_medical.common.tensors import check_like
from sam_medical.common.values import shortened
from sam_medical.models.backbone import Backbone, Part

CONFIG_FILE = "adapter_config.json"
ADVICE = "give the folder that train.py wrote, RUN/adapter"
# The keys of an adapter's configuration that are not the same for every adapter of a method on a model.
FREE_CONFIG_KEYS = {
    "auto_mapping",
    "digests",
    "fingerprints",
    "format_version",
    "inference_mode",
    "peft_version",
}


class Tuner(ABC):
    """Turns a frozen model into one in which something learns, and back from files into the trained model.

    Attributes:
        weights_file: Name of the file of learned tensors in an adapter's folder.
        other_files: Names of further files that it writes there.
        learns: Whether anything learns.
        takes_target_modules: Whether it works at the layers of an expression.
    """

    weights_file: ClassVar[str]
    other_files: ClassVar[tuple[str, ...]] = ()

    @property
    def learns(self) -> bool:
        return True

    @property
    def takes_target_modules(self) -> bool:
        return False

    @abstractmethod
    def apply(self, model: nn.Module, target_modules: str) -> nn.Module:
        """The model with its learning parts; everything else stays frozen.

        Raises:
            UserError: if the expression is invalid, or matches no layer that can be tuned.
        """

    @abstractmethod
    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """All tensors of a tuned model that are not those of the pretrained model, by name."""

    @abstractmethod
    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Puts tensors that `state` gave into a model to which the tuner has been applied."""

    @abstractmethod
    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes the tuner's files into a folder."""

    @abstractmethod
    def restore(self, model: nn.Module, target_modules: str, folder: Path, state: Mapping[str, Tensor]) -> nn.Module:
        """The trained model, from a model that is not tuned yet and what `save` wrote.

        Args:
            model: As `apply` takes it.
            target_modules: As `apply` takes it.
            folder: The folder that `save` filled.
            state: The tensors of its weights file.

        Raises:
            UserError: if the files are damaged or do not fit the model.
        """


@dataclass(frozen=True)
class PeftTuner(Tuner):
    """An adapter of PEFT's, and parts of the model that are trained whole through ``modules_to_save``.

    Attributes:
        config: PEFT's configuration for a model and the expression of the layers to tune.
        parts: Parts that are trained whole.
    """

    config: Callable[[Backbone, str], PeftConfig]
    parts: tuple[Part, ...] = ()

    weights_file: ClassVar[str] = "adapter_model.safetensors"
    other_files: ClassVar[tuple[str, ...]] = (CONFIG_FILE,)

    @property
    def takes_target_modules(self) -> bool:
        return True

    def apply(self, model: nn.Module, target_modules: str) -> nn.Module:
        backbone = cast(Backbone, model)
        check_target_modules(backbone, target_modules)
        with naming_target_modules(target_modules):
            return get_peft_model(backbone, self.full_config(backbone, target_modules))

    def full_config(self, backbone: Backbone, target_modules: str) -> PeftConfig:
        """PEFT's configuration with the parts that are trained whole."""
        config = self.config(backbone, target_modules)
        cast(Any, config).modules_to_save = backbone.names_of(self.parts)
        return config

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        return get_peft_model_state_dict(cast(PeftModel, model))

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        set_peft_model_state_dict(cast(PeftModel, model), dict(state))

    def save(self, model: nn.Module, folder: Path) -> None:
        cast(PeftModel, model).save_pretrained(str(folder))

    def restore(self, model: nn.Module, target_modules: str, folder: Path, state: Mapping[str, Tensor]) -> nn.Module:
        backbone = cast(Backbone, model)
        check_target_modules(backbone, target_modules)
        _check_config(folder / CONFIG_FILE, self.full_config(backbone, target_modules))
        try:
            tuned = PeftModel.from_pretrained(backbone, str(folder))
        except Exception as error:  # PEFT and the methods raise any type for what may be in a file
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{folder} is damaged ({reason}); train again, or download the whole folder again."
            ) from error
        check_like(folder / self.weights_file, state, self.state(tuned))
        return tuned


@dataclass(frozen=True)
class InPlaceTuner(Tuner):
    """Modules inserted into the model, parts that are trained whole, and biases; without any of them nothing learns.

    Attributes:
        insert: Inserts modules into a model, given the expression of the layers to tune, and lets them learn. It runs
            before the parts are looked up.
        at_targets: Whether ``insert`` works at the layers of the expression.
        parts: Parts that are trained whole.
        biases: Whether the encoder's biases learn.
    """

    insert: Callable[[Backbone, str], None] | None = None
    at_targets: bool = False
    parts: tuple[Part, ...] = ()
    biases: bool = False

    weights_file: ClassVar[str] = "trained.safetensors"

    @property
    def learns(self) -> bool:
        return bool(self.insert or self.parts or self.biases)

    @property
    def takes_target_modules(self) -> bool:
        return self.at_targets

    def apply(self, model: nn.Module, target_modules: str) -> nn.Module:
        backbone = cast(Backbone, model)
        if self.at_targets:
            check_target_modules(backbone, target_modules)
        if self.insert:
            with naming_target_modules(target_modules):
                self.insert(backbone, target_modules)
        for name in backbone.names_of(self.parts):
            backbone.get_submodule(name).requires_grad_(True)
        if self.biases:
            for name, parameter in backbone.image_encoder.named_parameters():
                if name.endswith("bias"):
                    parameter.requires_grad_(True)
        return backbone

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        # Prompts are kept even if they do not learn, because their initial values are random.
        return _tensors_that_learn(model, also_below="prompts.")

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        model.load_state_dict(state, strict=False)

    def save(self, model: nn.Module, folder: Path) -> None:
        write_tensors(folder / self.weights_file, self.state(model))

    def restore(self, model: nn.Module, target_modules: str, folder: Path, state: Mapping[str, Tensor]) -> nn.Module:
        tuned = self.apply(model, target_modules)
        check_like(folder / self.weights_file, state, self.state(tuned))
        self.load(tuned, state)
        return tuned


class WholeModel(InPlaceTuner):
    """All that is not frozen already learns: a network that starts from random weights."""

    @property
    def learns(self) -> bool:
        return True

    def apply(self, model: nn.Module, target_modules: str) -> nn.Module:
        return model


def _tensors_that_learn(model: nn.Module, also_below: str) -> dict[str, Tensor]:
    """Parameters that learn, buffers beside them (statistics of norms), and all tensors below a prefix."""
    names = set()
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        learns = any(parameter.requires_grad for parameter in own.values())
        for name in [*own, *dict(module.named_buffers(recurse=False))]:
            is_kept = own[name].requires_grad if name in own else learns
            if is_kept or module_name.startswith(also_below):
                names.add(f"{module_name}.{name}".removeprefix("."))
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


@contextmanager
def naming_target_modules(target_modules: str) -> Iterator[None]:
    """Turns an error about the layers to tune into a `UserError` that names the option."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(f"target_modules {target_modules!r}: {error}") from error


def check_target_modules(backbone: Backbone, target_modules: str) -> None:
    """Raises a `UserError` if an expression is invalid, matches no layer, or takes too long to match."""
    names = [name for name, _ in backbone.named_modules()]
    if not matches_any(target_modules, names):
        example = next((name for name in names if re.fullmatch(backbone.target_modules, name)), names[-1])
        raise UserError(f"target_modules {target_modules!r}: matches no layer; their names are like {example}")


def _check_config(path: Path, expected: PeftConfig) -> None:
    """Raises a `UserError` if a configuration is not the one that the method has on this model.

    It is compared and not tried out: an expression in a stranger's file could take longer to match than anybody waits.
    """
    config = read_object(path, ADVICE)
    wanted = expected.to_dict()
    for key in sorted({"peft_type", "target_modules"} - config.keys()):
        raise UserError(f"{path} lacks the key {key!r}; {ADVICE}.")
    for key in sorted(config.keys() & wanted.keys() - FREE_CONFIG_KEYS):
        if _plain(config[key]) != _plain(wanted[key]):
            raise UserError(
                f"{path}: {key} is {shortened(config[key])}, and for this task it is {shortened(wanted[key])}; fetch "
                "the whole folder again."
            )


def _plain(value: Any) -> str:
    """As JSON, with lists sorted, since some were sets."""
    if isinstance(value, (list, set, tuple)):
        value = sorted(map(_plain, cast(Sequence[Any], value)))
    return json.dumps(value, sort_keys=True, default=str)
