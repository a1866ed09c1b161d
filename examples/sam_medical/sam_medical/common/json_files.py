"""JSON that somebody else may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sam_medical.common.errors import UserError


def read_json(content: bytes) -> Any:
    """What a JSON text stands for.

    Raises:
        ValueError: if it is not JSON, or nested too deep.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        UserError: if it holds anything else; the message ends with the advice.
    """
    try:
        content = read_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON; {advice}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be JSON with keys and values; {advice}.")
    return content
