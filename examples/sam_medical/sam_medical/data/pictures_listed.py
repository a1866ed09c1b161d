"""Finds the images that a JSON file names, even if the files were moved since it was written."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from sam_medical.data.parts import IMAGE_FOLDERS, MASK_FOLDERS
from sam_medical.data.sources import find_sources, plain

# Folder names of labelme files, in addition to those of masks.
JSON_FOLDERS = (*MASK_FOLDERS, "json", "jsons", "labelme")


class Pictures:
    """The images in a folder, recursively."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = [source.path for source in find_sources(folder)[0]]

    def listed(self, name: str) -> list[Path]:
        """Returns the images that a name in a COCO file may refer to.

        A bare name matches any image of that name. A name with folders matches the end of a path. If its folders are
        those of another machine, it must end with the image's path relative to this folder.
        """
        parts = _parts(name)
        called = [path for path in self.paths if plain(path.name) == parts[-1]]
        if len(parts) == 1:
            return [path for path in called if path.parent == self.folder] or called
        exact = [path for path in called if self._place(path) == parts]
        return exact or [path for path in called if self._is_meant(path, parts)]

    def of_labelme(self, file: Path, name: str) -> Path | None:
        """Returns the image of a labelme file: at the stated path, beside the file, or at its place among the images.

        Args:
            file: The labelme file.
            name: Its ``imagePath``.

        Returns:
            The image; None if there is none, or more than one candidate.
        """
        for other in (name, PurePosixPath(name).name):
            path = Path(os.path.normpath(file.parent / other))
            if path.is_file():
                return path
        place = _without(self._place(file)[:-1], JSON_FOLDERS)
        like = [path for path in self.paths if _without(self._place(path)[:-1], IMAGE_FOLDERS) == place]
        called = [path for path in like if plain(path.name) == PurePosixPath(name).name]
        found = called or [path for path in like if plain(path.stem) == plain(file.stem)]
        return found[0] if len(found) == 1 else None

    def _place(self, path: Path) -> tuple[str, ...]:
        return tuple(plain(part) for part in path.relative_to(self.folder).parts)

    def _is_meant(self, path: Path, parts: tuple[str, ...]) -> bool:
        place = self._place(path)
        whole = tuple(plain(part) for part in path.absolute().parts)
        return whole[-len(parts) :] == parts or (len(place) > 1 and parts[-len(place) :] == place)


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(name).parts if part not in ("..", "/"))


def _without(parts: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part for part in parts if part.lower() not in names)
