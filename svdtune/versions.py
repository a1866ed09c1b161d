"""Checks that the installed versions of PEFT and transformers work with this package and with each other."""

from __future__ import annotations

import warnings
from importlib.metadata import version

from packaging.version import Version

# Keep in sync with pyproject.toml. `make conformance PEFT=...` tests another version of PEFT.
PEFT = (Version("0.21"), Version("0.22"))
# The first version of transformers that requires a newer PEFT.
TRANSFORMERS_BELOW = Version("5.24")
REMEDY = f'pip install "peft>={PEFT[0]},<{PEFT[1]}" "transformers<{TRANSFORMERS_BELOW}"'


def check_versions() -> None:
    """Compares the installed versions with the supported ones.

    Warns:
        UserWarning: if PEFT is newer than the tested versions, or too old for ``load_adapter`` of transformers.

    Raises:
        ImportError: if PEFT is older than this package requires.
    """
    peft, required = Version(version("peft")), _required_by_transformers()
    problem = describe_problem(peft, required)
    if problem is None:
        return
    message = f"svdtune: {problem} Run: {REMEDY}"
    if peft.release < PEFT[0].release:
        raise ImportError(message)
    warnings.warn(message, stacklevel=3)


def describe_problem(peft: Version, required: Version | None) -> str | None:
    """Describes a problem with a version of PEFT, or returns None.

    Args:
        peft: The installed version of PEFT.
        required: The lowest version that transformers requires, if known.
    """
    if not PEFT[0].release <= peft.release < PEFT[1].release:
        return f"peft {peft} is installed, but svdtune is tested with versions from {PEFT[0]} to below {PEFT[1]}."
    if required is not None and peft.release < required.release:
        return (
            f"peft {peft} is installed, but the installed transformers requires {required}, so add_adapter and "
            "load_adapter of its models fail."
        )
    return None


def _required_by_transformers() -> Version | None:
    try:
        from transformers.integrations.peft import MIN_PEFT_VERSION
    except ImportError:  # another version of transformers, or one that cannot be imported here
        return None
    return Version(MIN_PEFT_VERSION)
