"""The lock of an output folder, also after a kill."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sam_medical.common.errors import UserError
from sam_medical.common.lock import command_in, only_command_in

SCRIPTS = Path(__file__).parents[2] / "examples" / "sam_medical"

HOLD = """
import os, sys, time
from multiprocessing import get_context
from sam_medical.common.lock import *

with only_command_in(Path(sys.argv[1])):
    reader = get_context("fork").Process(target=time.sleep, args=(60,))  # as a DataLoader's worker
    reader.start()
    print(reader.pid, flush=True)
    input()
    reader.kill()
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLD, tmp_path / "run"]
    with subprocess.Popen(command, cwd=SCRIPTS, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.reader = int(process.stdout.readline())
        yield process
        process.kill()
        with suppress(ProcessLookupError):
            os.kill(process.reader, signal.SIGKILL)


def take(folder):
    """In a process of its own."""
    code = "import sys; from sam_medical.common.lock import *\nwith only_command_in(Path(sys.argv[1])): pass"
    process = subprocess.run([sys.executable, "-c", code, folder], cwd=SCRIPTS, capture_output=True, text=True)
    return process.stderr.strip().splitlines()[-1:] if process.returncode else []


def test_a_second_command_is_told_who_is_at_work_and_since_when(holder, tmp_path):
    today = time.strftime("%Y-")
    message = rf"run is in use by process {holder.pid} on .* since {today}.*; wait for it"
    with pytest.raises(UserError, match=message), only_command_in(tmp_path / "run"):
        pass
    assert f"process {holder.pid} " in command_in(tmp_path / "run")
    holder.communicate("\n")
    assert not (tmp_path / "run").exists()


def test_a_killed_command_holds_nothing_although_its_readers_live(holder, tmp_path):
    holder.kill()
    holder.wait()
    os.kill(holder.reader, 0)
    assert command_in(tmp_path / "run") is None
    assert take(tmp_path / "run") == []
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_was_there_stays_and_links_are_not_followed(tmp_path):
    with only_command_in(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        assert "is in use by process" in take(tmp_path)[0]
    assert take(tmp_path) == [] and list(tmp_path.iterdir()) == []
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="symbolic links"), only_command_in(tmp_path):
        pass
    assert not (tmp_path / "victim").exists()


def test_of_several_processes_of_a_launcher_the_first_holds_it(holder, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with only_command_in(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()
    assert (tmp_path / "run" / ".lock").exists()
