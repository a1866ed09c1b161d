"""The install command of this package, for model cards and messages."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, metadata

PACKAGE = "svdtune"
# Usual labels of the repository under [project.urls] in pyproject.toml.
REPOSITORY = ("repository", "source", "source code", "github")


def how_to_install() -> str:
    """The install command: from the repository's address if the metadata contains it, otherwise from a checkout.

    It is not ``pip install svdtune``, because no package index has this package.
    """
    address = repository_address(_project_urls())
    return f'pip install "{PACKAGE} @ git+{address}"' if address else f"pip install . in a checkout of {PACKAGE}"


def repository_address(project_urls: Iterable[str]) -> str | None:
    """The repository's address among the ``Project-URL`` entries of package metadata ("label, address"), or None."""
    for entry in project_urls:
        label, _, address = entry.partition(",")
        if label.strip().lower() in REPOSITORY:
            return address.strip()
    return None


def _project_urls() -> list[str]:
    try:
        return metadata(PACKAGE).get_all("Project-URL") or []
    except PackageNotFoundError:  # the package runs from a checkout and is not installed
        return []
