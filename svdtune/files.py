"""What an adapter's folder holds beside the values themselves."""

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

# Where the digests of a config hold the one of its own choices. Names of tensors have no such form.
CHOICES = CONFIG_NAME
MODEL_CARD = "README.md"
# A file system's clock may be that much behind.
CLOCK_SECONDS = 0.02
HOW_TO_LOAD = """
## How to load this adapter

Its method comes from the package `svdtune` (`{install}`); import it first, and PEFT knows the method.

```python
import svdtune  # registers SVD_SCALE_SHIFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path or name of this adapter")
```
"""


def check_config_file(folder: Path) -> None:
    """Makes sure that the config in a local adapter folder is a JSON object, where it is.

    Raises:
        ValueError: with the name of the file, if it is something else.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}). Copy or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object. Copy or download it again.")


def check_adapter_file(folder: Path, digests: Mapping[str, str]) -> bool:
    """Makes sure that the weights in a local adapter folder are whole, and those that were saved.

    Args:
        folder: The folder; nothing is checked where it holds no safetensors file.
        digests: Those of the config beside it; empty for adapters from before there were any.

    Returns:
        Whether there was a file to check.

    Raises:
        ValueError: with the name of the file, and of the tensor if it is one that is missing or has changed.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not os.path.lexists(path):
        return False
    if not path.is_file():
        raise ValueError(f"{path} is no file. Copy or download it again.")
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
    """Makes sure that tensors are those that were saved.

    Raises:
        ValueError: with ``source`` and the name of a tensor that has changed.
    """
    for name in found.keys() & digests.keys():
        if found[name] != digests[name]:
            raise ValueError(
                f"{source} is damaged: `{name}` has changed since it was saved. Copy or download it again; if it was "
                "changed on purpose, remove `digests` from adapter_config.json."
            )


def digests_to_save(folder: Path, measured: Measurement) -> dict[str, str]:
    """The digests of the weights that the config is saved with.

    PEFT's `PeftModel` writes them before the config, and may add embeddings to them; so may somebody by hand, in
    another dtype. Then the file is what counts. transformers writes them after the config, perhaps over older ones.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    with contextlib.suppress(SafetensorError, OSError, RuntimeError, ValueError):
        if path.stat().st_mtime > measured.time - CLOCK_SECONDS:
            return {**digests_of_file(path), CHOICES: measured.digests[CHOICES]}
    return {} if measured.is_stale() else measured.digests


def mention_plugin(folder: Path) -> None:
    """Adds to the folder's model card, or starts one, that loading needs this package."""
    path = folder / MODEL_CARD
    card = path.read_text(encoding="utf-8") if path.is_file() else "---\nlibrary_name: peft\ntags:\n- svdtune\n---\n"
    if "import svdtune" in card:
        return
    write_whole(path, (card.rstrip() + "\n" + HOW_TO_LOAD.format(install=how_to_install())).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it, which also replaces a link and not what it leads to."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # several processes may save at once
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_link(path: Path) -> None:
    """Removes a link, so that what is written next does not go where it leads."""
    if path.is_symlink():
        path.unlink()


def finish_adapter_files(folder: Path) -> None:
    """Gives the files the rights of the config, and has them written to the disk.

    The config was made by `open`, so it has the rights that the umask leaves; safetensors gives none to others.
    """
    mode = stat.S_IMODE((folder / CONFIG_NAME).stat().st_mode)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, MODEL_CARD):
        path = folder / name
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):  # it may be somebody else's
                path.chmod(mode)
                with path.open("rb") as file:
                    os.fsync(file.fileno())
