"""Regular expressions of a config: whether Python can compile them, and match them in bounded time.

PEFT matches expressions against the names of all modules with Python's `re`, which can take longer than anybody waits:
``(a+)+b`` takes twice as long for each further letter. An adapter of a stranger can hold such an expression. So every
expression that is not plainly harmless is first tried on the same names in a child process, which has a time limit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping

SECONDS = 5
# An expression with more than this is tried in the child process.
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
    """Makes sure that each expression is one.

    Args:
        expressions: What each is called, such as "`target_modules`", to the expression.

    Raises:
        ValueError: with what it is called, if Python cannot compile one.
    """
    for title, expression in expressions.items():
        if len(expression) > HARMLESS_LENGTH:  # compiling takes long, too
            check_time({title: expression}, [])
            continue
        try:
            re.compile(expression)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{title} is no regular expression: {error}.") from error


def check_time(expressions: Mapping[str, str], names: Iterable[str]) -> None:
    """Makes sure that matching the expressions against the names comes to an end soon.

    Args:
        expressions: What each is called to the expression, written as PEFT will match it.
        names: The names of the modules.

    Raises:
        ValueError: with what it is called, if one takes longer than `SECONDS`.
    """
    suspects = {title: text for title, text in expressions.items() if not _is_harmless(text)}
    slow = _slow_one(suspects, list(names)) if suspects else None
    if slow is not None:
        raise ValueError(
            f"{slow} takes more than {SECONDS} seconds to be matched against the names of this model's modules. Write "
            "it without repetitions inside of repetitions, or as a list of names."
        )


def _is_harmless(expression: str) -> bool:
    """Whether it repeats single characters alone, and that at most twice: then its time grows with the square of a
    name's length at most. Options such as ``(...)?`` double the time each."""
    repeats = sum(map(expression.count, "*+"))
    compound = re.search(r"\)[*+{]|\{|\\[1-9]|\(\?[^:P]|\(\?P[^<]", expression)
    options = expression.count("?")
    return (
        len(expression) <= HARMLESS_LENGTH
        and compound is None
        and repeats <= HARMLESS_REPEATS
        and options <= HARMLESS_OPTIONS
    )


def _slow_one(expressions: Mapping[str, str], names: list[str]) -> str | None:
    """Which of the expressions was being matched when the time was over; None if it was enough for all."""
    trial = json.dumps([(title, expression, names) for title, expression in expressions.items()])
    command = [sys.executable or "python3", "-I", "-S", "-c", TRIAL]
    try:
        subprocess.run(command, input=trial.encode(), capture_output=True, timeout=SECONDS, check=True)
    except subprocess.TimeoutExpired as expired:
        return ((expired.output or b"").decode().splitlines() or ["the first of the expressions"])[-1]
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or b"").decode(errors="replace").splitlines() or [str(error)]
        title = ((error.output or b"").decode().splitlines() or ["an expression"])[-1]
        raise ValueError(f"{title} is no regular expression: {reason[-1]}.") from error
    except OSError as error:
        raise ValueError(f"an expression could not be tried in a process of its own ({error}).") from error
    return None
