"""How this package is installed, as model cards and messages say it."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, metadata

PACKAGE = "svdtune"
# Which of the addresses under [project.urls] in pyproject.toml, by the names that they usually have there.
REPOSITORY = ("repository", "source", "source code", "github")


def how_to_install() -> str:
    """What to run: with the repository's address if the package was built with it, otherwise in a checkout.

    No index of packages has this one, so ``pip install svdtune`` is not it.
    """
    address = repository_address(_project_urls())
    return f'pip install "{PACKAGE} @ git+{address}"' if address else f"pip install . in a checkout of {PACKAGE}"


def repository_address(project_urls: Iterable[str]) -> str | None:
    """The repository's address among ``Project-URL`` entries of a package's metadata, "label, address"."""
    for entry in project_urls:
        label, _, address = entry.partition(",")
        if label.strip().lower() in REPOSITORY:
            return address.strip()
    return None


def _project_urls() -> list[str]:
    try:
        return metadata(PACKAGE).get_all("Project-URL") or []
    except PackageNotFoundError:  # run from a checkout that is not installed
        return []
