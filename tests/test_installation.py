"""Installed files, version checks and the install command in messages."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from peft import get_peft_model
from torch import nn

from svdtune import SVDScaleShiftConfig, installing, versions

ROOT = Path(__file__).parents[1]


def test_the_ranges_are_those_of_the_package():
    listed = re.search(r"^dependencies = (\[.*\])$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    ranges = {one.name: one.specifier for one in map(Requirement, re.findall('"(.*?)"', listed[1]))}
    assert ranges["peft"] == Requirement(f"peft>={versions.PEFT[0]},<{versions.PEFT[1]}").specifier
    assert ranges["transformers"] == Requirement(f"transformers<{versions.TRANSFORMERS_BELOW}").specifier


@pytest.mark.parametrize(
    "peft, asked_for, problem",
    [
        ("0.21.2", "0.20.0", None),
        ("0.21.0", None, None),
        ("0.21.2", "0.22.0", "the installed transformers requires 0.22.0"),
        ("0.22.0.dev0", "0.20.0", r"peft 0\.22\.0\.dev0 is installed, but svdtune is tested with versions from 0\.21"),
        ("0.20.0", "0.18.0", r"peft 0\.20\.0 is installed"),
    ],
)
def test_versions_that_do_not_go_together_are_told(peft, asked_for, problem, monkeypatch, recwarn):
    monkeypatch.setattr(versions, "version", lambda name: {"peft": peft}[name])
    monkeypatch.setattr(versions, "_required_by_transformers", lambda: asked_for and Version(asked_for))
    if problem is None:
        versions.check_versions()
        assert not recwarn
    elif Version(peft) < versions.PEFT[0]:
        with pytest.raises(ImportError, match=rf"{problem}.*pip install"):
            versions.check_versions()
    else:
        with pytest.warns(UserWarning, match=rf"{problem}.*pip install"):
            versions.check_versions()


@pytest.mark.parametrize(
    "urls, command",
    [
        ([], "`pip install . in a checkout of svdtune`"),
        (["Documentation, https://host.example/docs"], "`pip install . in a checkout of svdtune`"),
        (["Repository, https://host.example/svdtune.git"], "git+https://host.example/svdtune.git"),
    ],
)
def test_the_model_card_names_an_installation_that_works(urls, command, monkeypatch, tmp_path):
    package = importlib.metadata.metadata("svdtune")
    del package["Project-URL"]
    for url in urls:
        package["Project-URL"] = url
    monkeypatch.setattr(installing, "metadata", lambda name: package)
    get_peft_model(nn.Sequential(nn.Linear(4, 4)), SVDScaleShiftConfig(target_modules=["0"])).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert command in card and "pip install svdtune" not in card
    with pytest.raises(ValueError, match=re.escape(installing.how_to_install())):
        SVDScaleShiftConfig(format_version=99)
