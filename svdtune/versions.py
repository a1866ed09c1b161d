"""Whether PEFT and transformers are versions that this package, and they themselves, work with."""

from __future__ import annotations

import warnings
from importlib.metadata import version

from packaging.version import Version

# As in pyproject.toml. `make conformance PEFT=...` is the trial of another PEFT.
PEFT = (Version("0.21"), Version("0.22"))
# The first transformers that asks for a PEFT beyond that.
TRANSFORMERS_BELOW = Version("5.24")
REMEDY = f'pip install "peft>={PEFT[0]},<{PEFT[1]}" "transformers<{TRANSFORMERS_BELOW}"'


def check_versions() -> None:
    """Compares the installed versions with those that work together.

    Warns:
        UserWarning: if PEFT is newer than tried, or than transformers accepts for its own ``load_adapter``.

    Raises:
        ImportError: if PEFT is older than this package needs.
    """
    peft, asked_for = Version(version("peft")), _asked_for_by_transformers()
    problem = problem_of(peft, asked_for)
    if problem is None:
        return
    message = f"svdtune: {problem} Run: {REMEDY}"
    if peft.release < PEFT[0].release:
        raise ImportError(message)
    warnings.warn(message, stacklevel=3)


def problem_of(peft: Version, asked_for: Version | None) -> str | None:
    """What is wrong with a version of PEFT, where transformers asks for at least ``asked_for``; None if nothing."""
    if not PEFT[0].release <= peft.release < PEFT[1].release:
        return f"peft {peft} is installed; tried are the versions from {PEFT[0]} to below {PEFT[1]}."
    if asked_for is not None and peft.release < asked_for.release:
        return (
            f"peft {peft} is installed, and the installed transformers asks for {asked_for}, so that add_adapter and "
            "load_adapter of its own models fail."
        )
    return None


def _asked_for_by_transformers() -> Version | None:
    try:
        from transformers.integrations.peft import MIN_PEFT_VERSION
    except ImportError:  # it keeps the version elsewhere, or is too new for what is installed beside it
        return None
    return Version(MIN_PEFT_VERSION)
