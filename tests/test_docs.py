"""The pages: every public name has a reference entry, links lead somewhere, and what they tell the reader to run runs.

Each Python block and each command is run, unless a comment directly before its fence says why not:

    <!-- not run: needs your images -->

The Python blocks of a page run one after the other in one namespace, which begins with `docs_stand_ins`. A comment
``<!-- setup: ... -->`` is Python that runs before the next block, hidden from the reader. Every option of a command
must exist in the command's help, and every path in the repository.
"""

from __future__ import annotations

import functools
import io
import os
import re
import runpy
import shlex
import shutil
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the pages use transformers")

import svdtune

ROOT = Path(__file__).parents[1]
EXAMPLE = "examples/sam_medical"
PAGES = [ROOT / "README.md", ROOT / EXAMPLE / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What runs `sam-medical COMMAND`, as `python -m sam_medical` does.
SAM_MEDICAL = f"{EXAMPLE}/sam_medical/__main__.py"
# Commands that take no options.
WITHOUT_OPTIONS = ((SAM_MEDICAL, "made-up"),)
# Places that a command makes, or that are a reader's own; everything else with a slash must be in the repository.
NOT_IN_REPOSITORY = re.compile(r"(runs|made-up)/|DATA\b|FOLDER\b|OTHER\b|\$|facebook/|openai/|/")
# Those that would install, download or test for a long time: their arguments are checked, they are never run.
NEVER_RUN = ("make", "pip", "accelerate", "mkdocs")

FENCE = re.compile(
    r"(?P<comments>(?:^<!--(?:(?!-->)[\s\S])*-->\n)*)^```(?P<language>bash|python)\n(?P<code>[\s\S]*?)^```$",
    re.MULTILINE,
)
COMMENT = re.compile(r"<!-- ?(not run|setup):([\s\S]*?)-->")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")


@dataclass
class Block:
    page: Path
    line: int
    language: str
    code: str
    setup: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in FENCE.finditer(text):
        notes = COMMENT.findall(match["comments"])
        setup = "\n".join(code.strip() for kind, code in notes if kind == "setup")
        reasons = [reason.strip() for kind, reason in notes if kind == "not run"]
        line = text[: match.start("language")].count("\n") + 1
        blocks.append(Block(page, line, match["language"], match["code"], setup, reasons[0] if reasons else None))
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [
    (block, command)
    for block in BLOCKS
    if block.language == "bash"
    for command in block.code.replace("\\\n", " ").splitlines()
    if command.split("#")[0].strip()
]


def test_every_fence_is_understood():
    for page in PAGES:
        fences = re.findall(r"^```(?:bash|python)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == len(blocks_of(page)), page


@pytest.mark.parametrize("name", svdtune.__all__)
def test_every_public_name_has_a_reference_entry(name):
    entries = [
        entry
        for page in (ROOT / "docs" / "reference").glob("*.md")
        for entry in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert f"svdtune.{name}" in entries


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = re.sub(r"^```[\s\S]*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for target in LINK.findall(text):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in navigation


@pytest.mark.parametrize("block, command", COMMANDS, ids=[f"{block}-{command[:40]}" for block, command in COMMANDS])
def test_a_command_exists_with_its_options_and_paths(block, command):
    program, *arguments = words_of(command)
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert arguments[0] in targets
        return
    if program == "pip":
        check_installation(arguments)
        return
    if program == "export":
        return
    script, arguments = script_of(program, arguments)
    command = arguments[:1] if script == SAM_MEDICAL else []
    known = set() if (script, *command) in WITHOUT_OPTIONS else options_of(script, *command)
    assert (ROOT / script).is_file()
    for flag in FLAG.findall(" ".join(arguments)):
        assert flag in known, f"{script} has no {flag}"
    for argument in arguments:
        if "/" in argument and not NOT_IN_REPOSITORY.match(argument) and not re.search(r"[\\*|()]", argument):
            assert (ROOT / argument).exists(), argument


@pytest.mark.parametrize(
    "page", sorted({block.page for block in BLOCKS}), ids=lambda page: str(page.relative_to(ROOT))
)
def test_what_a_page_shows_runs(page, tmp_path, monkeypatch):
    blocks = [block for block in blocks_of(page) if not block.not_run]
    if not any(block.language == "python" or commands_to_run(block) for block in blocks):
        pytest.skip("nothing on this page is run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVDTUNE_CACHE", "")
    if any(commands_to_run(block) for block in blocks):
        shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    namespace = {"__name__": "page"}
    exec("from docs_stand_ins import *", namespace)
    for block in blocks:
        if block.language == "python":
            # Blank lines put an error's line number where it is on the page.
            exec(compile(block.setup, f"{block} (setup)", "exec"), namespace)
            exec(compile("\n" * block.line + block.code, str(block.page), "exec"), namespace)
        for command in commands_to_run(block):
            script, arguments = script_of(*command)
            status, output = run_script(script, arguments)
            assert status == 0, f"{block}: {output}"


def commands_to_run(block: Block) -> list[tuple[str, list[str]]]:
    if block.language != "bash" or block.not_run:
        return []
    found = [words_of(command) for one, command in COMMANDS if str(one) == str(block)]
    return [(program, arguments) for program, *arguments in found if program not in (*NEVER_RUN, "export")]


def words_of(command: str) -> list[str]:
    """A command's words, without comment and variables set before it."""
    words = shlex.split(command, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def script_of(program: str, arguments: list[str]) -> tuple[str, list[str]]:
    """The script in the repository that a command runs, and the script's arguments."""
    if program == "sam-medical":
        return SAM_MEDICAL, arguments
    if program == "accelerate":
        start = next(index for index, word in enumerate(arguments) if word.endswith(".py"))
        return arguments[start], arguments[start + 1 :]
    assert program == "python", f"{program} is no command of the pages"
    return arguments[0], arguments[1:]


@functools.cache
def options_of(script: str, *command: str) -> set[str]:
    status, output = run_script(script, [*command, "--help"])
    assert status == 0, output
    return set(FLAG.findall(output))


def run_script(script: str, arguments: list[str]) -> tuple[int, str]:
    """Runs a script in this process, where its imports are made once for all of them; its status and output."""
    output, argv, columns = io.StringIO(), sys.argv, os.environ.get("COLUMNS")
    sys.argv, os.environ["COLUMNS"] = [script, *arguments], "200"
    try:
        with redirect_stdout(output), redirect_stderr(output), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_path(str(ROOT / script), run_name="__main__")
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            output.write(end.code)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = argv
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return status, output.getvalue()


def check_installation(arguments: list[str]) -> None:
    """What ``pip install`` names: a folder that can be installed, its extras, or a version of a package."""
    assert arguments[0] == "install"
    for argument in arguments[1:]:
        name, _, extras = argument.partition("[")
        if argument in ("-c", "-e", "--no-deps", "constraints.txt"):
            continue
        if "==" in argument:
            assert argument in (ROOT / "Makefile").read_text(encoding="utf-8"), argument
            continue
        assert (ROOT / name).is_dir(), argument
        project = ROOT / name / "pyproject.toml"
        if extras:
            known = re.findall(r"^([a-z-]+) = \[", project.read_text(encoding="utf-8"), re.MULTILINE)
            assert set(extras.rstrip("]").split(",")) <= set(known)
