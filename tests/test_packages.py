"""Both packages build as wheel and source archive, and what is in them runs without the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECTS = {"svdtune": ROOT, "sam_medical": ROOT / "examples" / "sam_medical"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """For each package the folder with its source archive, and the wheel that was built from that."""
    folders = {}
    for package, project in PROJECTS.items():
        folders[package] = tmp_path_factory.mktemp(package)
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folders[package], project]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    return folders


@pytest.fixture(params=PROJECTS)
def package(request):
    return request.param


@pytest.fixture
def archives(package, built):
    return built[package]


def test_the_wheel_holds_every_module(package, archives):
    (wheel,) = archives.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    source = PROJECTS[package] / package
    assert {f"{package}/{path.relative_to(source).as_posix()}" for path in source.rglob("*.py")} <= set(names)
    assert f"{package}/py.typed" in names
    assert not [
        name for name in names if name.split("/")[0] not in (package, wheel.name.split("-py")[0] + ".dist-info")
    ]


def test_the_source_archive_builds_by_itself(package, archives):
    (archive,) = archives.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = [name.partition("/")[2] for name in content.getnames()]
    assert "pyproject.toml" in names and "README.md" in names and f"{package}/__init__.py" in names
    assert not [name for name in names if name.startswith((".venv", "runs", "results", "adapters"))]


def test_the_metadata_tells_a_stranger_what_it_is(package, archives):
    (wheel,) = archives.glob("*.whl")
    content = zipfile.ZipFile(wheel)
    (name,) = (name for name in content.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(content.read(name).decode())
    assert metadata["Summary"] and metadata["License-Expression"] == "Apache-2.0" and metadata["Keywords"]
    assert metadata.get_all("Classifier") and metadata.get_all("Project-URL")


def test_what_is_in_the_wheels_runs_without_the_checkout(built, tmp_path):
    wheels = [next(folder.glob("*.whl")) for folder in built.values()]
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, *wheels]
    subprocess.run(install, check=True, capture_output=True)

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(target)}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    places = run("-c", "import sam_medical, svdtune; print(svdtune.__file__, sam_medical.__file__)").split()
    assert all(Path(place).is_relative_to(target) for place in places)
    few = ["--image-size", "32", "--steps", "2", "--validation-images", "1", "--output-dir", "run"]
    assert "white matter" in run("-m", "sam_medical", "train", "--config", "demo", *few)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
