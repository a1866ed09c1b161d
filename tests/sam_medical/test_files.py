"""Atomic writes: files and folders are complete after a kill, and links are not followed."""

import errno
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from sam_medical.common import files
from sam_medical.common.errors import UserError
from sam_medical.common.files import (
    discard,
    folder_in,
    put_in_place,
    remove,
    replacing_file,
    replacing_folder,
    restore,
    whole_folder,
    write_text,
)

SCRIPTS = Path(__file__).parents[2] / "examples" / "sam_medical"


@contextmanager
def umask(mask):
    before = os.umask(mask)
    yield
    os.umask(before)


def mode(path):
    return path.stat().st_mode & 0o777


def fill(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_text(text)
    return folder


@pytest.mark.parametrize("mask, file_mode, folder_mode", [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770)])
def test_modes_follow_the_umask(mask, file_mode, folder_mode, tmp_path):
    with umask(mask):
        write_text(tmp_path / "file", "x")
        with replacing_folder(tmp_path / "folder") as folder:
            (folder / "private").touch(0o600)
    assert mode(tmp_path / "file") == file_mode and mode(tmp_path / "folder") == folder_mode
    assert mode(tmp_path / "folder" / "private") == file_mode


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path):
    write_text(tmp_path / "file", "old")
    fill(tmp_path / "folder", "old")
    for replacing, name in ((replacing_file, "file"), (replacing_folder, "folder")):
        with pytest.raises(ZeroDivisionError), replacing(tmp_path / name):
            raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "file").read_text() == "old"


def test_names_cannot_be_foreseen_and_end_as_the_files(tmp_path):
    names = set()
    for _ in range(3):
        with replacing_file(tmp_path / "scan.nii.gz") as temporary:
            names.add(temporary.name)
    assert len(names) == 3 and all(name.endswith(".nii.gz") for name in names)
    long = tmp_path / ("x" * 250 + ".png")
    write_text(long, "as long as a name can be")
    assert long.read_text()


def test_what_is_no_file_is_written_into(tmp_path):
    write_text(Path("/dev/null"), "nothing")
    assert Path("/dev/null").is_char_device()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        write_text(pipe, "through a pipe")
        assert reader.communicate()[0] == b"through a pipe" and pipe.is_fifo()
    script = "from sam_medical.common.files import *; print('first'); write_text(Path('/dev/stdout'), 'then')"
    with (tmp_path / "file").open("w") as file:
        subprocess.run([sys.executable, "-c", script], cwd=SCRIPTS, stdout=file, check=True)
    assert (tmp_path / "file").read_text() == "first\nthen"


def test_nothing_is_written_through_a_link(tmp_path):
    victim, run = fill(tmp_path / "victim", "keep me"), tmp_path / "run"
    run.mkdir()
    for name in ("file", "adapter"):
        (run / name).symlink_to(victim / "file" if name == "file" else victim)
    (run / ".old.adapter").symlink_to(victim)
    write_text(run / "file", "mine")
    with replacing_folder(run / "adapter") as folder:
        fill(folder, "mine")
    assert not (run / "file").is_symlink() and not (run / "adapter").is_symlink()
    assert (run / "file").read_text() == (run / "adapter" / "file").read_text() == "mine"
    (run / "overlays").symlink_to(victim)
    with pytest.raises(UserError, match=r"overlays is a link, and nothing is written through links"):
        folder_in(run, "overlays")
    with pytest.raises(UserError, match=r"overlays is a link"):
        folder_in(run, "overlays", "liver")
    remove(run / "overlays")
    discard(run / "adapter")
    assert [path.name for path in victim.iterdir()] == ["file"] and (victim / "file").read_text() == "keep me"
    (tmp_path / "named").symlink_to(run)
    assert folder_in(tmp_path / "named", "liver").is_dir() and (run / "liver").is_dir()


MOMENTS = ("discard", "rename", "rename", "discard")


@pytest.mark.parametrize("moment", range(len(MOMENTS)))
def test_killed_at_any_moment_one_of_two_folders_is_found(moment, tmp_path, monkeypatch):
    """A process that is ended before the first, second, third or fourth thing that `put_in_place` does."""
    fill(tmp_path / "adapter", "old")
    fill(tmp_path / ".old.adapter", "older")

    class Killed(BaseException):
        pass

    done = []

    def ending(function):
        def call(*arguments):
            if len(done) == moment:
                raise Killed
            done.append(function.__name__)
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(files, "discard", ending(discard))
        patch.setattr(Path, "rename", ending(Path.rename))
        with pytest.raises(Killed):
            put_in_place(fill(tmp_path / "temporary", "new"), tmp_path / "adapter")
    assert tuple(done) == MOMENTS[:moment]
    expected = "new" if moment == 3 else "old"
    assert (whole_folder(tmp_path / "adapter") / "file").read_text() == expected
    restore(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "file").read_text() == expected
    put_in_place(fill(tmp_path / "temporary", "newer"), tmp_path / "adapter")
    assert (tmp_path / "adapter" / "file").read_text() == "newer" and not (tmp_path / ".old.adapter").exists()


HALF_DONE = """
import os, sys
from sam_medical.common.files import *
with replacing_file(Path(sys.argv[1]) / "file") as file, unfinished_folder(Path(sys.argv[1])) as folder:
    file.write_text("half"), (folder / "file").write_text("half")
    {then}
"""


def test_what_a_killed_process_leaves_is_removed_and_what_a_living_one_makes_is_not(tmp_path):
    def start(then, **options):
        command = [sys.executable, "-c", HALF_DONE.format(then=then), tmp_path]
        return subprocess.Popen(command, cwd=SCRIPTS, text=True, stdout=subprocess.PIPE, **options)

    start("os.kill(os.getpid(), 9)").wait()
    assert len(list(tmp_path.iterdir())) == 2
    with start("print(flush=True); input()", stdin=subprocess.PIPE) as living:
        living.stdout.readline()
        assert len(list(tmp_path.iterdir())) == 2  # its own, in place of the killed one's
        write_text(tmp_path / "other", "whole")
        assert len(list(tmp_path.iterdir())) == 3
        living.communicate("\n")
        assert living.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("sync") or fsync(descriptor))
    monkeypatch.setattr(Path, "replace", lambda *paths: calls.append("rename") or replace(*paths))
    write_text(tmp_path / "file", "x")
    assert calls == ["sync", "rename", "sync"]


def test_a_full_disk_is_named_and_leaves_no_half_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.ENOSPC))):
        write_text(tmp_path / "file", "x")
    assert not list(tmp_path.iterdir())
