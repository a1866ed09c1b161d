"""The state of a run as JSON and safetensors, formats that cannot contain code.

A saved state is validated against the run before any part of it is used.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sam_medical.common.json_files import read_json
from sam_medical.common.values import is_number
from sam_medical.methods.tuners import Tuner
from sam_medical.training.progress import Progress

STATE_FILE = "state.json"
ADAPTER_FILE = "adapter.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
SHARED_FILES = (STATE_FILE, ADAPTER_FILE, OPTIMIZER_FILE)
# The tensors that AdamW keeps for each parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
SCHEDULER_NUMBERS = ("last_epoch", "_step_count")
SCALER_NUMBERS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


@dataclass
class Training:
    """The model and the objects that train it, without accelerate's wrappers."""

    model: nn.Module
    tuner: Tuner
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: GradScaler | None
    labels: list[str]


class DamagedError(ValueError):
    """Raised if a file of a state is damaged. The arguments are the file's name and the reason."""


def random_file(process: int) -> str:
    """Returns the name of the file with a process's random state."""
    return f"random-{process}.json"


def pack(training: Training, progress: Progress) -> dict[str, bytes]:
    """Returns the files of a state that all processes share, by name."""
    optimizer = training.optimizer.state_dict()
    state = {
        "progress": progress.as_json(),
        "rates": [group["lr"] for group in optimizer["param_groups"]],
        "scheduler": {name: training.scheduler.state_dict()[name] for name in (*SCHEDULER_NUMBERS, "_last_lr")},
        "scaler": training.scaler.state_dict() if training.scaler else {},
    }
    moments = {
        f"{index}.{name}": tensor for index, state in optimizer["state"].items() for name, tensor in state.items()
    }
    return {
        STATE_FILE: as_json(state),
        ADAPTER_FILE: save(_on_cpu(training.tuner.state(training.model))),
        OPTIMIZER_FILE: save(_on_cpu(moments)),
    }


@dataclass
class Unpacked:
    """A validated state."""

    progress: Progress
    rates: list[float]
    scheduler: dict[str, Any]
    scaler: dict[str, Any]
    adapter: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]


def unpack(files: Mapping[str, bytes], training: Training, steps: int) -> Unpacked:
    """Parses and validates the files of `pack`.

    Args:
        files: The files of the state, by name.
        training: The run that the state must fit.
        steps: The total number of steps of the run.

    Raises:
        DamagedError: if a file is invalid or does not fit the run.
    """
    state = _read_json(files, STATE_FILE, ("progress", "rates", "scheduler", "scaler"))
    try:
        progress = Progress.from_json(state["progress"], training.labels)
    except ValueError as error:
        raise DamagedError(STATE_FILE, str(error)) from error
    adapter = _read_tensors(files, ADAPTER_FILE)
    _check_like(ADAPTER_FILE, adapter, training.tuner.state(training.model))
    scheduler = state["scheduler"]
    groups = training.optimizer.param_groups
    _check(STATE_FILE, "step", progress.step <= steps)
    _check(STATE_FILE, "rates", _are_numbers(state["rates"], len(groups)))
    _check(STATE_FILE, "scheduler", isinstance(scheduler, dict))
    _check(STATE_FILE, "scheduler", scheduler.keys() == {*SCHEDULER_NUMBERS, "_last_lr"})
    _check(STATE_FILE, "scheduler", scheduler["last_epoch"] == progress.step)
    _check(STATE_FILE, "scheduler", scheduler["_step_count"] == progress.step + 1)
    _check(STATE_FILE, "scheduler", _are_numbers(scheduler["_last_lr"], len(groups)))
    _check(STATE_FILE, "scaler", _is_scaler(state["scaler"], training.scaler))
    moments = _moments_by_parameter(_read_tensors(files, OPTIMIZER_FILE), training.optimizer)
    return Unpacked(progress, state["rates"], scheduler, state["scaler"], adapter, moments)


def put_back(state: Unpacked, training: Training) -> None:
    """Loads a state into the model, optimizer, scheduler and scaler of the run."""
    training.tuner.load(training.model, state.adapter)
    groups = training.optimizer.state_dict()["param_groups"]
    groups = [{**group, "lr": rate} for group, rate in zip(groups, state.rates, strict=True)]
    training.optimizer.load_state_dict({"state": state.optimizer, "param_groups": groups})
    training.scheduler.load_state_dict({**training.scheduler.state_dict(), **state.scheduler})
    if training.scaler:
        training.scaler.load_state_dict(state.scaler)


def pack_random(device: torch.device) -> bytes:
    """Returns the random state of this process as JSON."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    numbers = np.asarray(keys, dtype="<u4").tobytes().hex()
    device_state = None if device.type == "cpu" else _hex(getattr(torch, device.type).get_rng_state())
    return as_json(
        {
            "python": random.getstate(),
            "numpy": [numbers, int(position), int(has_gauss), float(gauss)],
            "torch": _hex(torch.get_rng_state()),
            "device": [device.type, device_state],
        }
    )


def put_back_random(files: Mapping[str, bytes], name: str, device: torch.device) -> None:
    """Restores the random state of `pack_random`.

    Raises:
        DamagedError: if the file is invalid.
    """
    python, numpy, cpu, device_state = unpack_random(files, name)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if device_state[0] == device.type and device_state[1] is not None:
        getattr(torch, device.type).set_rng_state(device_state[1])


def unpack_random(files: Mapping[str, bytes], name: str) -> tuple[Any, Any, Tensor, tuple[str, Tensor | None]]:
    """Parses the random states of Python, NumPy and torch, and the device's type and state.

    Raises:
        DamagedError: if the file is invalid.
    """
    state = _read_json(files, name, ("python", "numpy", "torch", "device"))
    try:
        version, numbers, gauss = state["python"]
        python = (version, tuple(numbers), gauss)
        keys, *rest = state["numpy"]
        numpy = ("MT19937", np.frombuffer(bytes.fromhex(keys), dtype="<u4"), *rest)
        cpu = _from_hex(state["torch"])
        device_type, on_device = state["device"]
        # Validate all states here, before any of them is restored.
        random.Random().setstate(python)
        np.random.RandomState().set_state(numpy)
        torch.Generator().set_state(cpu)
        return python, numpy, cpu, (device_type, None if on_device is None else _from_hex(on_device))
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise DamagedError(name, "it holds no state of random numbers") from error


def as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _read_json(files: Mapping[str, bytes], name: str, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        content = read_json(files[name])
    except ValueError as error:
        raise DamagedError(name, "it is not JSON") from error
    _check(name, "keys", isinstance(content, dict) and content.keys() == set(keys))
    return content


def _read_tensors(files: Mapping[str, bytes], name: str) -> dict[str, Tensor]:
    try:
        return load(files[name])
    except (SafetensorError, KeyError, ValueError) as error:
        raise DamagedError(name, "it is not safetensors") from error


def _moments_by_parameter(tensors: Mapping[str, Tensor], optimizer: Optimizer) -> dict[int, dict[str, Tensor]]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_parameter: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(parameters):
        like = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        names = {f"{index}.{moment}": like[moment] for moment in MOMENTS}
        if names.keys() & tensors.keys():
            _check_like(OPTIMIZER_FILE, {name: tensors[name] for name in names if name in tensors}, names)
            by_parameter[index] = {moment: tensors[f"{index}.{moment}"] for moment in MOMENTS}
    _check(OPTIMIZER_FILE, "tensors", len(tensors) == len(MOMENTS) * len(by_parameter))
    return by_parameter


def _check_like(name: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    _check(name, "tensors", tensors.keys() == expected.keys())
    for key, tensor in tensors.items():
        same = tensor.shape == expected[key].shape and tensor.dtype == expected[key].dtype
        _check(name, key, same)


def _check(name: str, what: str, holds: bool) -> None:
    if not holds:
        raise DamagedError(name, f"its {what} cannot be of this run")


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(_is_size, values))


def _is_size(value: Any) -> bool:
    return is_number(value) and value >= 0


def _is_scaler(state: Any, scaler: GradScaler | None) -> bool:
    if not scaler or not scaler.is_enabled():
        return state == {}
    return isinstance(state, dict) and state.keys() == set(SCALER_NUMBERS) and all(map(_is_size, state.values()))


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _hex(state: Tensor) -> str:
    return bytes(state.numpy()).hex()


def _from_hex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
