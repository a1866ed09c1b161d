"""Reading of untrusted JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sam_medical.common.errors import UserError


def read_json(content: bytes) -> Any:
    """Parses a JSON text.

    Raises:
        ValueError: if the text is not JSON, or is nested too deep.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """Reads a file that contains a JSON object.

    Args:
        path: The file.
        advice: The remedy, at the end of the error message.

    Raises:
        UserError: if the file contains anything else.
    """
    try:
        content = read_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON; {advice}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be JSON with keys and values; {advice}.")
    return content
