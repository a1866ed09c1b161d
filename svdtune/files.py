"""Checks and writes the files of an adapter folder: config, model card and file permissions."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError

from svdtune.digests import Measurement, digests_of_file
from svdtune.installing import how_to_install

# The key in `digests` of the digest of the config's own fields. No tensor has such a name.
CHOICES = CONFIG_NAME
MODEL_CARD = "README.md"
# The clock of a file system may lag by this many seconds.
CLOCK_LAG = 0.02
HOW_TO_LOAD = """
## How to load this adapter

The package `svdtune` (`{install}`) provides the method. Import it before loading, so that PEFT knows the method.

```python
import svdtune  # registers SVD_SCALE_SHIFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path or name of this adapter")
```
"""


def check_config_file(folder: Path) -> None:
    """Checks that the config in a local adapter folder, if there is one, is a JSON object.

    Raises:
        ValueError: if it is not. The message names the file.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Copy or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object. Copy or download it again.")


def check_adapter_file(folder: Path, digests: Mapping[str, str]) -> bool:
    """Checks the weights in a local adapter folder against their digests.

    Args:
        folder: The folder. Without a safetensors file, nothing is checked.
        digests: Digests from the config, by tensor name. Older adapters have none.

    Returns:
        Whether there was a file to check.

    Raises:
        ValueError: if the file is incomplete, or if a tensor is missing or has changed. The message names it.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not os.path.lexists(path):
        return False
    if not path.is_file():
        raise ValueError(f"{path} is not a file. Copy or download it again.")
    try:
        found = digests_of_file(path)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). Copy or download it again.") from error
    for name in digests:
        if name != CHOICES and name not in found:
            raise ValueError(f"{path} is damaged: `{name}` is missing. Copy or download it again.")
    check_digests(str(path), found, digests)
    return True


def check_digests(source: str, found: Mapping[str, str], digests: Mapping[str, str]) -> None:
    """Compares digests of tensors with the saved ones.

    Args:
        source: The file or adapter, for the message.
        found: Digests of the tensors that were read, by name.
        digests: The saved digests, by name.

    Raises:
        ValueError: if a tensor has changed. The message names it and ``source``.
    """
    for name in found.keys() & digests.keys():
        if found[name] != digests[name]:
            raise ValueError(
                f"{source} is damaged: `{name}` has changed since it was saved. Copy or download it again; if it was "
                "changed on purpose, remove `digests` from adapter_config.json."
            )


def digests_to_save(folder: Path, measured: Measurement) -> dict[str, str]:
    """The digests to save in the config.

    `PeftModel` writes the weights before the config. It may add embeddings, and a user may have changed the dtype, so
    the digests come from the file. transformers writes the weights after the config, perhaps over an older file. Then
    the digests come from ``measured``, unless a tensor has changed since.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    with contextlib.suppress(SafetensorError, OSError, RuntimeError, ValueError):
        if path.stat().st_mtime > measured.time - CLOCK_LAG:
            return {**digests_of_file(path), CHOICES: measured.digests[CHOICES]}
    return {} if measured.is_stale() else measured.digests


def complete_model_card(folder: Path) -> None:
    """Adds a section on loading to the folder's model card, and creates the card if necessary."""
    path = folder / MODEL_CARD
    card = path.read_text(encoding="utf-8") if path.is_file() else "---\nlibrary_name: peft\ntags:\n- svdtune\n---\n"
    if "import svdtune" in card:
        return
    write_whole(path, (card.rstrip() + "\n" + HOW_TO_LOAD.format(install=how_to_install())).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file atomically, by renaming a temporary file. A symbolic link is replaced, not followed."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # several processes may save at once
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_link(path: Path) -> None:
    """Removes ``path`` if it is a symbolic link, so that the next write does not follow it."""
    if path.is_symlink():
        path.unlink()


def finish_adapter_files(folder: Path) -> None:
    """Gives all files the permissions of the config, and flushes them to disk.

    `open` created the config, so its permissions follow the umask. safetensors makes files readable by the owner only.
    """
    mode = stat.S_IMODE((folder / CONFIG_NAME).stat().st_mode)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, MODEL_CARD):
        path = folder / name
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):  # another user may own it
                path.chmod(mode)
                with path.open("rb") as file:
                    os.fsync(file.fileno())
