"""Fetches PEFT's tests, runs them against our method, and says of each one that did not run why.

    make conformance                the installed PEFT
    make conformance PEFT=0.21.0    another one, in a folder of its own beside the installed one

Everything fetched or made lies in .venv/conformance. The table of skipped and left-out tests is written there, too.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

from conformance.files import FILES, OTHER_FILES
from conformance.known_as import KNOWN_AS

HERE = Path(__file__).parent
CACHE = Path(sys.prefix) / "conformance"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", default="", help="version of PEFT; the installed one if not given")
    parser.add_argument("--workers", default="2", help="processes to run the tests in")
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, such as -k merge")
    arguments = parser.parse_args()
    installed = importlib.metadata.version("peft")
    version = arguments.peft or installed

    CACHE.mkdir(parents=True, exist_ok=True)
    suite = fetch_suite(version)
    environment = {
        **os.environ,
        "CONFORMANCE_RESULT": str(CACHE / f"result-{version}.json"),
        "HF_HUB_CACHE": str(CACHE / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *([] if version == installed else [str(overlay(version))])]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    make_models(environment)
    started = time.monotonic()
    code = run_suite(suite, arguments.workers, arguments.pytest, environment)
    result_file = Path(environment["CONFORMANCE_RESULT"])
    if not result_file.is_file():
        return code or 1
    result = json.loads(result_file.read_text(encoding="utf-8"))
    table = report(version, suite, result, (time.monotonic() - started) / 60)
    (CACHE / f"table-{version}.md").write_text(table + "\n", encoding="utf-8")
    print("\n" + table)
    return code or int("NOT COLLECTED" in table)


def fetch_suite(version: str) -> Path:
    """The folder of a version's source distribution, which alone holds the tests."""
    folder = CACHE / f"peft-{version}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=CACHE) as download:
            pip("download", "--no-binary", ":all:", "--no-deps", "--dest", download, f"peft=={version}")
            with tarfile.open(next(Path(download).glob("peft-*.tar.gz"))) as archive:
                archive.extractall(download, filter="data")
            # The archive leaves out the empty file that makes the tests a package, as they are in the repository.
            (Path(download) / folder.name / "tests" / "__init__.py").touch()
            (Path(download) / folder.name).rename(folder)
    return folder


def overlay(version: str) -> Path:
    """A folder with another PEFT than the environment's, to be put before it on the path."""
    folder = CACHE / f"overlay-{version}"
    if not folder.is_dir():
        pip("install", "--no-deps", "--target", str(folder), f"peft=={version}")
    return folder


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def make_models(environment: dict[str, str]) -> None:
    """Builds the models again where what they are made of has changed."""
    source = (HERE / "models.py").read_text(encoding="utf-8")
    state = hashlib.sha256(f"{source}{importlib.metadata.version('transformers')}".encode()).hexdigest()
    mark = CACHE / "hub" / "built-from"
    if not mark.is_file() or mark.read_text() != state:
        command = [sys.executable, "-m", "conformance.models", environment["HF_HUB_CACHE"]]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        mark.write_text(state)


def run_suite(suite: Path, workers: str, arguments: list[str], environment: dict[str, str]) -> int:
    """Runs the collected files with PEFT's own settings of pytest, but for its coverage."""
    files = [f"tests/{name}" for name in FILES if (suite / "tests" / name).is_file()]
    command = [sys.executable, "-m", "pytest", *files, "--numprocesses", workers, "-p", "conformance.plugin"]
    command += ["-p", "no:cacheprovider", "-c", "pyproject.toml", "--rootdir", ".", "--override-ini", "addopts="]
    # PEFT's settings turn deprecations in transformers into errors: newer ones, of functions that PEFT itself calls.
    command += ["--override-ini", "filterwarnings="]
    command += ["--quiet", "--tb=short", "--disable-warnings", "--no-header", *arguments]
    Path(environment["CONFORMANCE_RESULT"]).unlink(missing_ok=True)
    return subprocess.run(command, cwd=suite, env=environment, check=False).returncode


def report(version: str, suite: Path, result: dict, minutes: float) -> str:
    """The table: each skipped test and each one left out, with its reason, and how many share it."""
    skipped = Counter((reason, file_of(test)) for test, reason in result["skipped"])
    left_out = Counter((reason, file_of(test)) for test, reason in result["left_out"].items())
    lines = ["| tests | | file | reason |", "|---:|---|---|---|"]
    for kind, counter in (("skipped", skipped), ("left out", left_out)):
        for reason, tests in grouped(counter):
            files = ", ".join(sorted(tests))
            lines.append(f"| {sum(tests.values())} | {kind} | {files} | {one_line(reason)} |")
    for pattern, name, reason in KNOWN_AS:
        count = sum(bool(re.search(pattern, test)) for test, _ in result["passed"])
        lines.append(f"| {count} | passed as {name} | {one_line(f'`{pattern}`')} | {reason} |")
    for reason, names in OTHER_FILES.items():
        present = [name for name in names if (suite / "tests" / name).is_file()]
        lines.append(f"| all | not collected | {', '.join(present)} | {reason} |")
    known = {*FILES, *(name for names in OTHER_FILES.values() for name in names)}
    for path in sorted((suite / "tests").glob("test_*.py")):
        if path.name not in known:
            lines.append(f"| all | NOT COLLECTED | {path.name} | none: name it in conformance/files.py |")
    heading = f"PEFT {version}, its own tests with SVDScaleShiftConfig, {minutes:.1f} minutes"
    return "\n".join([heading, "", *lines, "", totals(result)])


def grouped(counter: Counter) -> list[tuple[str, dict[str, int]]]:
    """Reasons, the most frequent first, each with its files and how many tests of them."""
    reasons: dict[str, dict[str, int]] = {}
    for (reason, file), count in counter.items():
        reasons.setdefault(reason, {})[file] = count
    return sorted(reasons.items(), key=lambda entry: -sum(entry[1].values()))


def totals(result: dict) -> str:
    return ", ".join(f"{len(result[outcome])} {outcome}" for outcome in ("passed", "failed", "skipped"))


def file_of(test: str) -> str:
    return test.partition("::")[0].rpartition("/")[2]


def one_line(reason: str) -> str:
    return " ".join(reason.replace("|", "\\|").split())


if __name__ == "__main__":
    sys.exit(main())
