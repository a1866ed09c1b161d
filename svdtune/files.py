"""What an adapter's folder holds beside the values themselves."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

MODEL_CARD = "README.md"
HOW_TO_LOAD = """
## How to load this adapter

Its method comes from the package `svdtune` (`pip install svdtune`); import it first, and PEFT knows the method.

```python
import svdtune  # registers SVD_SCALE_SHIFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path or name of this adapter")
```
"""


def check_adapter_file(folder: Path) -> None:
    """Makes sure that the weights in a local adapter folder can be read, where they are.

    Raises:
        ValueError: with the name of the file, if it is truncated or something else.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). Copy or download it again.") from error


def mention_plugin(folder: Path) -> None:
    """Adds to the folder's model card, or starts one, that loading needs this package."""
    path = folder / MODEL_CARD
    card = path.read_text(encoding="utf-8") if path.is_file() else "---\nlibrary_name: peft\ntags:\n- svdtune\n---\n"
    if "import svdtune" in card:
        return
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")  # several processes may save at once
    temporary.write_text(card.rstrip() + "\n" + HOW_TO_LOAD, encoding="utf-8")
    os.replace(temporary, path)
