"""Matching of untrusted regular expressions, with a time limit against catastrophic backtracking."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from sam_medical.common.errors import UserError

SECONDS = 10
TRIAL = """
import json, re, sys
expression, names = json.load(sys.stdin)
print(any([re.fullmatch(expression, name) for name in names]))
"""


def matches_any(expression: str, names: Sequence[str]) -> bool:
    """Whether an expression fully matches one of the names. A subprocess does the matching, so it can be killed.

    Raises:
        UserError: if the expression is invalid, or takes more than `SECONDS` seconds.
    """
    try:
        re.compile(expression)
        answer = subprocess.run(
            [sys.executable, "-I", "-c", TRIAL],
            input=json.dumps([expression, names]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"target_modules {expression!r}: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"target_modules {expression!r}: it takes more than {SECONDS} seconds to match; give a simpler one."
        ) from error
    return answer.stdout.strip() == "True"
