"""Checks that the regular expressions of a config compile, and match within a time limit.

PEFT matches expressions against the names of all modules with Python's `re`. Matching can take exponential time: each
additional letter doubles the time of ``(a+)+b``. An untrusted adapter can contain such an expression. Unless an
expression is obviously fast, it is first matched against the same names in a child process with a time limit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping

SECONDS = 5
# An expression that exceeds one of these is tested in the child process.
HARMLESS_LENGTH = 1000
HARMLESS_REPEATS = 2
HARMLESS_OPTIONS = 4
TRIAL = """
import json, re, sys
for title, expression, names in json.load(sys.stdin):
    print(title, flush=True)
    compiled = re.compile(expression)
    for name in names:
        compiled.match(name)
        compiled.fullmatch(name)
"""


def check_expressions(expressions: Mapping[str, str]) -> None:
    """Checks that each expression is valid.

    Args:
        expressions: Expressions by their names in messages, such as "`target_modules`".

    Raises:
        ValueError: if Python cannot compile an expression. The message names it.
    """
    for title, expression in expressions.items():
        if len(expression) > HARMLESS_LENGTH:  # compiling may be slow, too
            check_time({title: expression}, [])
            continue
        try:
            re.compile(expression)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{title} is not a valid regular expression: {error}.") from error


def check_time(expressions: Mapping[str, str], names: Iterable[str]) -> None:
    """Checks that matching the expressions against the names takes less than `SECONDS`.

    Args:
        expressions: Expressions by their names in messages, in the form that PEFT matches.
        names: The names of the modules.

    Raises:
        ValueError: if an expression takes longer. The message names it.
    """
    suspects = {title: text for title, text in expressions.items() if not _is_harmless(text)}
    slow = _find_slow(suspects, list(names)) if suspects else None
    if slow is not None:
        raise ValueError(
            f"{slow} takes more than {SECONDS} seconds to be matched against the names of this model's modules. Write "
            "it without nested repetitions, or as a list of names."
        )


def _is_harmless(expression: str) -> bool:
    """Whether the expression repeats only single characters, at most twice.

    Its time is then at most quadratic in the length of a name. Each option such as ``(...)?`` doubles the time.
    """
    repeats = sum(map(expression.count, "*+"))
    compound = re.search(r"\)[*+{]|\{|\\[1-9]|\(\?[^:P]|\(\?P[^<]", expression)
    options = expression.count("?")
    return (
        len(expression) <= HARMLESS_LENGTH
        and compound is None
        and repeats <= HARMLESS_REPEATS
        and options <= HARMLESS_OPTIONS
    )


def _find_slow(expressions: Mapping[str, str], names: list[str]) -> str | None:
    """The name of the expression that was being matched at the timeout, or None without a timeout."""
    trial = json.dumps([(title, expression, names) for title, expression in expressions.items()])
    command = [sys.executable or "python3", "-I", "-S", "-c", TRIAL]
    try:
        subprocess.run(command, input=trial.encode(), capture_output=True, timeout=SECONDS, check=True)
    except subprocess.TimeoutExpired as expired:
        return ((expired.output or b"").decode().splitlines() or ["the first of the expressions"])[-1]
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or b"").decode(errors="replace").splitlines() or [str(error)]
        title = ((error.output or b"").decode().splitlines() or ["an expression"])[-1]
        raise ValueError(f"{title} is not a valid regular expression: {reason[-1]}.") from error
    except OSError as error:
        raise ValueError(f"an expression could not be tested in a child process ({error}).") from error
    return None
