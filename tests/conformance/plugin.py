"""A pytest plugin that turns PEFT's tests on our method, without editing a file of theirs.

While a test is collected, its `parametrize` rows are replaced by `rows`; a test that makes a LoraConfig itself, and is
about any method, gets ours under that name while it runs. Each test that has neither is left out, with a reason.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import os
import re
import sys
from collections import defaultdict
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from conformance import left_out, rows
from conformance.known_as import known_as
from svdtune import SVDScaleShiftModel

torch.set_num_threads(1)
torch.set_flush_denormal(True)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = {}
    config.stash[OUTCOMES] = {"passed": [], "failed": [], "skipped": []}
    # PEFT's tests import these for what is left out here; they are large, or nothing else needs them.
    _stand_in_module("attr", dataclass=dataclasses.dataclass)
    _stand_in_module("datasets", load_dataset=_not_here, Dataset=type("Dataset", (), {}))
    _stand_in_module("diffusers", __version__="0", StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}))


# What skips a test for all methods but those that it names. The last one is meant for one method, and skips them all.
GATES = ("_skip_if_conv1d_not_supported", "_skip_if_not_conv1d_supported", "check_beft_config")
LEFT_OUT = pytest.StashKey[dict[str, str]]()
OUTCOMES = pytest.StashKey[dict[str, list[list[str]]]]()


def _not_here(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("The conformance tests run without data sets.")


def _stand_in_module(name: str, **content: Any) -> None:
    if importlib.util.find_spec(name) is None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        sys.modules[name] = module


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cls = metafunc.cls.__name__ if metafunc.cls else ""
    places = [metafunc.module.__name__.rpartition(".")[2], cls, metafunc.function.__name__]
    markers = metafunc.definition.own_markers
    for index, mark in enumerate(markers):
        if mark.name != "parametrize":
            continue
        names = mark.args[0]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        replaced = rows.rows(names, list(mark.args[1]), places)
        if replaced is not None:
            options = {name: value for name, value in mark.kwargs.items() if name != "ids"}
            markers[index] = pytest.mark.parametrize(mark.args[0], replaced, **options).mark


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _open_gates()
    kept = []
    for item in items:
        reason = left_out.reason(item.nodeid.partition("tests/")[2]) or _reason_without_ours(item)
        if reason is None:
            kept.append(item)
        else:
            config.stash[LEFT_OUT][item.nodeid] = reason
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _reason_without_ours(item: pytest.Item) -> str | None:
    """Why a test cannot be given our config, as a parameter or in place of LoRA's; None if it can."""
    if _takes_ours(item):
        return None
    callspec = getattr(item, "callspec", None)
    if callspec is not None and any(isinstance(value, (PeftConfig, type)) for value in callspec.params.values()):
        return left_out.OTHER_METHOD
    function = inspect.getsource(item.function)  # type: ignore[attr-defined]
    configs = set(re.findall(r"\b\w+Config(?=\()", function))
    if configs:
        return None if "LoraConfig" in configs else left_out.OTHER_METHOD
    # Its fixtures or helpers may make one.
    around = inspect.getsource(item.cls) if getattr(item, "cls", None) else ""
    return None if "LoraConfig(" in around else left_out.NO_METHOD


def _takes_ours(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and any(rows.is_ours(value) for value in callspec.params.values())


def _open_gates() -> None:
    """Removes what keeps a method that PEFT does not know by name out of tests that it would pass."""
    for name, module in list(sys.modules.items()):
        if name.startswith("tests."):
            for gate in GATES:
                if hasattr(module, gate):
                    setattr(module, gate, lambda *args: None)
            # Every model counts as in the hub's cache, where `models` has put it.
            if hasattr(module, "_HUB_MODEL_ACCESSES"):
                module._HUB_MODEL_ACCESSES = _Everything(int)


class _Everything(defaultdict):
    def __contains__(self, key: object) -> bool:
        return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Before any fixture, so that those with LoRA in them make ours, too."""
    module = item.module  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        name = known_as(item.nodeid)
        if name is not None:
            for place in (module, sys.modules["tests.testing_common"]):
                patch.setattr(place, name, rows.OURS, raising=False)
        elif not _takes_ours(item):
            patch.setattr(module, "LoraConfig", rows.InPlaceOfLora, raising=False)
        if "TestDefaultTargetModules" in item.nodeid:
            # The table of defaults that these tests write to. Ours is a copy of it, with more in it.
            table = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            patch.setattr(SVDScaleShiftModel, "target_module_mapping", table)
        return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcomes = _config.stash[OUTCOMES]
    if report.skipped:
        message = getattr(report, "wasxfail", None) or report.longrepr[2]  # type: ignore[index]
        outcomes["skipped"].append([report.nodeid, str(message).removeprefix("Skipped: ")])
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        outcomes["failed"].append([report.nodeid, crash.message if crash else str(report.longrepr)])
    elif report.when == "call":
        outcomes["passed"].append([report.nodeid, ""])


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    global _config
    _config = session.config


def pytest_testnodedown(node: Any, error: Any) -> None:
    """What a worker of pytest-xdist has left out; all of them collect the same."""
    _config.stash[LEFT_OUT].update(getattr(node, "workeroutput", {}).get("left_out", {}))


pytest_testnodedown = pytest.hookimpl(optionalhook=True)(pytest_testnodedown)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]
        return
    result = {**session.config.stash[OUTCOMES], "left_out": session.config.stash[LEFT_OUT]}
    with open(os.environ["CONFORMANCE_RESULT"], "w", encoding="utf-8") as file:
        json.dump(result, file)


_config: pytest.Config
