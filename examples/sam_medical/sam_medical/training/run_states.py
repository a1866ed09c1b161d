"""Saved states of a run, from which an interrupted run resumes exactly.

Each state is a folder ``step-N``. The two newest are kept. The manifest of a state contains the digests of all its
files and of itself. If the newest state is damaged, the run resumes from the one before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from sam_medical.adapters.task import Task
from sam_medical.common.errors import USER_ERROR_STATUS, UserError, describe
from sam_medical.common.files import (
    UNFINISHED,
    bring_to_disk,
    discard,
    folder_in,
    naming,
    refuse_link,
    unfinished_folder,
)
from sam_medical.common.json_files import read_json
from sam_medical.options.commands import TrainOptions
from sam_medical.training.progress import Progress
from sam_medical.training.run_state import (
    SHARED_FILES,
    DamagedError,
    Training,
    Unpacked,
    as_json,
    pack,
    pack_random,
    put_back,
    put_back_random,
    random_file,
    unpack,
    unpack_random,
)

CHECKPOINT = "checkpoint"
RUN_FILE = "run.json"
MANIFEST_FILE = "manifest.json"
FORMAT = 1
GENERATIONS = 2
# Options that may change when a run is resumed.
FREE_OPTIONS = (
    "output_dir",
    "data_root",
    "backbone",
    "num_workers",
    "overlays",
    "report_to",
    "resume",
    "overwrite",
    "extensions",
)


class Checkpoints:
    """Saves and restores the states of one run. All of its processes must call the methods together."""

    def __init__(self, accelerator: Accelerator, output: Path, run: dict[str, Any], training: Training) -> None:
        self._accelerator = accelerator
        self._output = output
        self._folder = output / CHECKPOINT
        self._run = run
        self._training = training

    def save(self, progress: Progress) -> None:
        """Saves the state of all processes, and removes all but the two newest states.

        Raises:
            UserError: if the state cannot be written.
        """
        accelerator = self._accelerator
        with self._shared_folder() as folder:
            together(accelerator, self._folder, lambda: self._write_random(folder))
            together(accelerator, self._folder, lambda: self._complete(folder, progress))

    def resume(self, steps: int) -> Progress | None:
        """Restores the newest intact state.

        Args:
            steps: The total number of steps of the run.

        Returns:
            The progress; None if no state was saved.

        Raises:
            UserError: if the state belongs to another run, or all states are damaged.
        """
        answer: list[Any] = [self._choose(steps) if self._accelerator.is_main_process else None]
        step, problem = broadcast_object_list(answer)[0]
        if problem:
            raise_on_main(self._accelerator, problem)
        if step is None:
            return None
        files = read_state(self._folder / name_of(step))
        state = self._unpack(files, steps)
        put_back(state, self._training)
        put_back_random(files, random_file(self._accelerator.process_index), self._accelerator.device)
        return state.progress

    def _choose(self, steps: int) -> tuple[int | None, str]:
        """Returns the step of the newest intact state, and an error message if there is none."""
        damages = []
        try:
            for step in steps_in(self._folder):
                try:
                    files = read_state(self._folder / name_of(step))
                    check_same_run(self._folder, read_json(files[RUN_FILE]), self._run)
                    self._unpack(files, steps)
                except DamagedError as error:
                    damages.append(_damage_message(self._folder / name_of(step), error))
                    continue
                for damage in damages:
                    print(f"{damage}; going on from the state before it.", flush=True)
                return step, ""
        except UserError as error:
            return None, str(error)
        return None, _none_is_whole(self._folder, damages) if damages else ""

    def _unpack(self, files: Mapping[str, bytes], steps: int) -> Unpacked:
        names = [random_file(process) for process in range(self._accelerator.num_processes)]
        if files.keys() != {RUN_FILE, *SHARED_FILES, *names}:
            raise DamagedError(MANIFEST_FILE, "its files are not those of a run with this number of processes")
        for name in names:
            unpack_random(files, name)
        return unpack(files, self._training, steps)

    @contextmanager
    def _shared_folder(self) -> Iterator[Path]:
        """Yields the same empty folder on every process."""
        with ExitStack() as stack:
            answer: list[Any] = [None, ""]
            if self._accelerator.is_main_process:
                try:
                    answer[0] = stack.enter_context(unfinished_folder(folder_in(self._output, CHECKPOINT)))
                except (OSError, UserError) as error:
                    answer[1] = _message(error)
            folder, problem = broadcast_object_list(answer)
            if problem:
                raise_on_main(self._accelerator, problem)
            yield folder

    def _write_random(self, folder: Path) -> None:
        accelerator = self._accelerator
        (folder / random_file(accelerator.process_index)).write_bytes(pack_random(accelerator.device))

    def _complete(self, temporary: Path, progress: Progress) -> None:
        """Writes the shared files, renames the folder to the newest state, and removes old states."""
        if not self._accelerator.is_main_process:
            return
        contents = {RUN_FILE: as_json(self._run), **pack(self._training, progress)}
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        (temporary / MANIFEST_FILE).write_bytes(_manifest(temporary, progress.step))
        bring_to_disk(temporary)
        folder = self._folder / name_of(progress.step)
        discard(folder)  # an existing state of this step is damaged
        temporary.rename(folder)
        bring_to_disk(self._folder)
        # Newer states are damaged ones that `resume` skipped.
        kept = [step for step in steps_in(self._folder) if step <= progress.step][:GENERATIONS]
        for step in steps_in(self._folder):
            if step not in kept:
                discard(self._folder / name_of(step))


def together(accelerator: Accelerator, place: Path, action: Callable[[], None]) -> None:
    """Runs an action that writes to a path. If it fails on one process, all processes end.

    Raises:
        UserError: on the main process, if the action fails.
        SystemExit: on the other processes.
    """
    problem = ""
    try:
        with naming(place):
            action()
    except (OSError, UserError) as error:
        problem = _message(error)
    problems = [text for text in gather_object([problem]) if text]
    if problems:
        raise_on_main(accelerator, f"{problems[0]}; put that right, and repeat the command with --resume to go on.")


def raise_on_main(accelerator: Accelerator, problem: str) -> None:
    """Raises a `UserError` on the main process, and ends the others silently."""
    if accelerator.is_main_process:
        raise UserError(problem)
    raise SystemExit(USER_ERROR_STATUS)


def name_of(step: int) -> str:
    return f"step-{step}"


def steps_in(folder: Path) -> list[int]:
    """Returns the steps of the states in a checkpoint folder, newest first.

    Raises:
        UserError: if the folder contains anything else.
    """
    refuse_link(folder)
    steps = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = re.fullmatch(r"step-([1-9]\d{0,11})", path.name, re.ASCII)
        if match and path.is_dir() and not path.is_symlink():
            steps.append(int(match[1]))
        elif not path.name.startswith(UNFINISHED):
            raise UserError(_unknown(path, folder))
    return sorted(steps, reverse=True)


def check_states(folder: Path) -> None:
    """Checks the states of a run before anything else is read.

    Raises:
        UserError: if the folder contains anything but states, or all states are damaged.
    """
    damages = []
    for step in steps_in(folder):
        try:
            read_state(folder / name_of(step))
            return
        except DamagedError as error:
            damages.append(_damage_message(folder / name_of(step), error))
    if damages:
        raise UserError(_none_is_whole(folder, damages))


def read_state(folder: Path) -> dict[str, bytes]:
    """Reads the files of a state, by name, and verifies their digests.

    Raises:
        DamagedError: if a file is missing or damaged.
        UserError: if the folder contains other files.
    """
    names = {path.name for path in folder.iterdir()}
    try:
        manifest = read_json(_read(folder, MANIFEST_FILE))
    except ValueError as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(MANIFEST_FILE, "it is not JSON") from error
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != _digest(as_json(manifest)):
        raise DamagedError(MANIFEST_FILE, "it is not what was saved")
    if manifest.get("format") != FORMAT or f"step-{manifest.get('step')}" != folder.name:
        raise DamagedError(MANIFEST_FILE, "it is of another state")
    expected = manifest.get("files")
    if not isinstance(expected, dict) or not all(map(_is_known, expected)):
        raise DamagedError(MANIFEST_FILE, "it names files that no run saves")
    for name in sorted(names):
        refuse_link(folder / name)
        if name != MANIFEST_FILE and name not in expected:
            raise UserError(_unknown(folder / name, folder.parent))
    contents = {}
    for name in expected:
        contents[name] = _read(folder, name)
        if _digest(contents[name]) != expected[name]:
            raise DamagedError(name, "it is not what was saved")
    return contents


def description_of_run(
    options: TrainOptions, task: Task, data: Mapping[str, Mapping[str, Any]], processes: int
) -> dict[str, Any]:
    """Returns everything that must be equal when a run is resumed. ``data`` is the result of `check_images`."""
    run = {name: value for name, value in asdict(options).items() if name not in FREE_OPTIONS}
    facts = {"labels": list(task.labels), "weights": task.backbone_digest, "processes": processes}
    return {**run, **facts, **{f"{split} images": dict(summary) for split, summary in data.items()}}


def check_same_run(folder: Path, saved: Any, run: Mapping[str, Any]) -> None:
    """Raises a `UserError` if a saved state belongs to another run."""
    if not isinstance(saved, dict):
        raise DamagedError(RUN_FILE, "it describes no run")
    for name, value in run.items():
        if saved.get(name) != value:
            raise UserError(
                f"{folder.parent} cannot go on: its {name} was {saved.get(name)!r} and is now {value!r}; repeat the "
                f"first command, or remove {folder} to start anew."
            )


def _is_known(name: str) -> bool:
    return name in (RUN_FILE, *SHARED_FILES) or re.fullmatch(r"random-\d{1,6}\.json", name, re.ASCII) is not None


def _manifest(folder: Path, step: int) -> bytes:
    files = {path.name: _digest(path.read_bytes()) for path in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "step": step, "files": files}
    return as_json({**manifest, "digest": _digest(as_json(manifest))})


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(folder: Path, name: str) -> bytes:
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise DamagedError(name, "it is missing")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedError(name, error.strerror) from error


def _message(error: OSError | UserError) -> str:
    return describe(error) if isinstance(error, OSError) else str(error)


def _damage_message(folder: Path, error: DamagedError) -> str:
    name, reason = error.args
    return f"{folder / name} is damaged ({reason})"


def _none_is_whole(folder: Path, damages: list[str]) -> str:
    return f"{damages[0]}, and no state before it is whole; remove {folder} to start anew."


def _unknown(path: Path, folder: Path) -> str:
    if path.suffix in (".pkl", ".bin", ".pt", ".pth"):
        return (
            f"{path} may be of an older version, whose states can run code when they are read, and is not read; "
            f"remove {folder} to start anew."
        )
    return f"{path} is nothing that a run saves; remove it, or remove {folder} to start anew."
