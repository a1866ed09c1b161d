"""Finds the images, volumes and DICOM series in a folder, and names them."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sam_medical.common.errors import UserError, first_line
from sam_medical.data.decoding import Scan, decode, is_dicom, suffix_of
from sam_medical.data.quiet import pydicom
from sam_medical.data.stacking import normal_of, order_of, problem_of

JUNK_FOLDERS = {"__macosx", "$recycle.bin", "#recycle", "#snapshot", "system volume information", "@eadir"}
JUNK_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r", "dicomdir", ".ds_store"}
# Raw pixel files of a header file, and header files of raw pixel files.
COMPANIONS = (".raw", ".zraw", ".raw.gz", ".hdr")
LOCALIZERS = "DICOM localizers"
# DICOM modalities without pixels of their own.
WITHOUT_PICTURES = ("SEG", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG")
HEADER_TAGS = (
    "SOPClassUID",
    "Modality",
    "SeriesInstanceUID",
    "SeriesNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "AcquisitionNumber",
    "ImageType",
)


@dataclass(frozen=True)
class Source:
    """A file or a DICOM series: one 2D image, stack or volume.

    Attributes:
        path: The file, or the folder of a series.
        name: The path relative to the searched folder, without extension. A mask has the same name.
        files: The files of a series in slice order.
        problem: Why the source cannot be read, if already known.
        left_out: Why the source is skipped: a DICOM localizer, or DICOM without pixels. Empty for all other sources.
        hint: Advice for the error message if the source has no mask.
    """

    path: Path
    name: str
    files: tuple[Path, ...] = ()
    problem: str = ""
    left_out: str = ""
    hint: str = ""

    @property
    def key(self) -> str:
        """The key by which images and masks are matched: Unicode-normalised and lower-case."""
        return plain(self.name).lower()

    @property
    def flat_name(self) -> str:
        return self.name.replace("/", "_")

    @property
    def folder(self) -> str:
        """The first folder of the name; empty if there is none."""
        return self.name.split("/")[0] if "/" in self.name else ""

    def decode(self) -> Scan:
        if self.problem:
            raise UserError(self.problem)
        return decode(self.path, self.files)


def plain(text: str) -> str:
    """Normalises Unicode to composed characters (NFC). macOS stores file names decomposed."""
    return unicodedata.normalize("NFC", text)


def is_junk(path: Path) -> bool:
    """Whether a path is a hidden or temporary file of an operating system or an editor."""
    name = path.name.lower()
    return name.startswith((".", "~$", "@")) or name in JUNK_FOLDERS or name in JUNK_FILES


def folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_junk(path))


def find_sources(folder: Path, skip: Sequence[Path] = ()) -> tuple[list[Source], list[Path]]:
    """Finds the sources in a folder, recursively.

    Args:
        folder: The folder to search.
        skip: Folders to leave out.

    Returns:
        The sources, sorted by key, and the files that are not images.

    Raises:
        UserError: if two sources have the same key.
    """
    sources: list[Source] = []
    unknown: list[Path] = []
    for inner, paths in _walk(folder, skip):
        dicom = []
        for path in paths:
            if is_dicom(path):
                dicom.append(path)
            elif suffix_of(path.name):
                sources.append(_single(path, folder))
            elif not path.name.lower().endswith(COMPANIONS):
                unknown.append(path)
        sources += _dicom_sources(inner, dicom, folder)
    return _without_twins(sources), unknown


def as_files(source: Source, folder: Path) -> list[Source]:
    """Returns each slice of a series as a separate source."""
    return [_single(path, folder) for path in sorted(source.files)]


def source_of_file(path: Path) -> Source:
    return _single(path, path.parent)


def by_key(sources: Sequence[Source]) -> dict[str, Source]:
    return {source.key: source for source in sources}


def _walk(folder: Path, skip: Sequence[Path]) -> Iterator[tuple[Path, list[Path]]]:
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        inner = Path(root)
        place = inner.resolve()
        if place in seen:  # a symbolic link to a folder above
            folders[:] = []
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not is_junk(inner / name) and inner / name not in skip)
        yield inner, sorted(inner / name for name in names if not is_junk(Path(name)))


def _single(path: Path, folder: Path) -> Source:
    place = path.relative_to(folder).as_posix()
    suffix = suffix_of(path.name)
    return Source(path, place[: -len(suffix)] if suffix else place)


def _without_twins(sources: list[Source]) -> list[Source]:
    seen: dict[str, Source] = {}
    for source in sources:
        other = seen.setdefault(source.key, source)
        if other is not source:
            raise UserError(
                f"{source.path.parent} holds both {other.path.name} and {source.path.name}; remove one of the two."
            )
    return sorted(sources, key=lambda source: source.key)


def _dicom_sources(inner: Path, paths: list[Path], folder: Path) -> list[Source]:
    """Returns one source per series of slices in a folder, and one per other DICOM file."""
    series: dict[Any, list[tuple[Path, Any]]] = defaultdict(list)
    singles: list[Source] = []
    unplaced = []
    for path in paths:
        header = _header(path)
        is_slice = header is not None and int(header.get("NumberOfFrames") or 1) == 1
        left_out = _why_left_out(header)
        if left_out and (len(paths) > 1 or left_out != LOCALIZERS):  # a localizer is kept if it is the only file
            singles.append(replace(_single(path, folder), left_out=left_out))
        elif len(paths) == 1:
            singles.append(_single(path, folder))
        elif is_slice and "ImagePositionPatient" in header:
            series[_series_key(header)].append((path, header))
        else:
            unplaced.append(_single(path, folder))
    singles += [replace(source, hint=_hint_on_places(inner, len(unplaced))) for source in unplaced]
    volumes = [slices for slices in series.values() if len(slices) > 1]
    singles += [_single(slices[0][0], folder) for slices in series.values() if len(slices) == 1]
    place = inner.relative_to(folder).as_posix()
    name = inner.resolve().name if place == "." else place
    many = len(volumes) > 1
    for number, slices in enumerate(volumes, start=1):
        series_number = slices[0][1].get("SeriesNumber")
        volume = _volume(inner, f"{name}_series{series_number or number}" if many else name, slices)
        singles.append(replace(volume, hint=_hint_on_series(inner, volumes) if many else ""))
    names = [source.key for source in singles]
    if len(set(names)) < len(names):  # two series have the same number
        singles = [
            replace(source, name=f"{source.name}_{place + 1}") if names.count(source.key) > 1 else source
            for place, source in enumerate(singles)
        ]
    return singles


def _why_left_out(header: Any) -> str:
    if header is None:
        return ""
    if "LOCALIZER" in (header.get("ImageType") or ()):
        return LOCALIZERS
    modality = str(header.get("Modality") or "")
    is_picture = "Rows" in header and modality not in WITHOUT_PICTURES
    return "" if is_picture or not modality else f"DICOM files of {modality}, which holds no picture,"


def notes_on_left_out(sources: Sequence[Source]) -> list[str]:
    kinds: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        if source.left_out:
            kinds[source.left_out].append(source)
    return [f"{len(some)} {kind} are left out, first {some[0].path}" for kind, some in kinds.items()]


def _hint_on_places(folder: Path, count: int) -> str:
    if count < 2:
        return ""
    return (
        f"the {count} DICOM files of {folder} have no position (ImagePositionPatient), so each is a separate image: "
        "give each a mask of its name, or save them as a volume, with dcm2niix for example."
    )


def _hint_on_series(folder: Path, volumes: Sequence[Sequence[tuple[Path, Any]]]) -> str:
    series_list = "; ".join(
        f"series {slices[0][1].get('SeriesNumber')}, {len(slices)} slices from {slices[0][0].name}"
        for slices in volumes
    )
    return (
        f"{folder} holds {len(volumes)} DICOM series ({series_list}): leave the one that was segmented there, and "
        "move the others."
    )


def _header(path: Path) -> Any:
    try:
        return pydicom().dcmread(path, stop_before_pixels=True, specific_tags=list(HEADER_TAGS), force=True)
    except Exception:
        return None  # decoding reports the error


def _series_key(header: Any) -> tuple[Any, ...]:
    orientation = [round(float(number), 3) for number in header.get("ImageOrientationPatient", [1, 0, 0, 0, 1, 0])]
    return (header.get("SeriesInstanceUID"), tuple(orientation), header.get("Rows"), header.get("Columns"))


def _volume(path: Path, name: str, slices: list[tuple[Path, Any]]) -> Source:
    """Returns a series with its slices sorted by position, and the problem with them, if there is one."""
    try:
        normal = normal_of(slices[0][1].get("ImageOrientationPatient", [1, 0, 0, 0, 1, 0]))
        places = np.array([header.ImagePositionPatient for _, header in slices], dtype=float)
        order = order_of(places, normal)
    except (ValueError, TypeError) as error:
        return Source(path, name, problem=f"{path} has slices without a position ({first_line(error)}); remove them.")
    files = tuple(slices[index][0] for index in order)
    problem = problem_of(places[order], normal, [file.name for file in files])
    return Source(path, name, files, f"{path} has {problem}" if problem else "")
