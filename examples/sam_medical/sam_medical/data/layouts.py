"""Folder layouts of images and masks, and their detection.

Each layout's reader returns a `Part`: the labels, and every image with its annotation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sam_medical.common.errors import UserError
from sam_medical.data.annotations import CocoAnnotations, LabelMaps, LabelmeShapes, MaskOfEach
from sam_medical.data.base import require_label_names
from sam_medical.data.decoding import PICTURES, TIFF, suffix_of
from sam_medical.data.label_names import LabelNames, label_names, read_json, read_label_names
from sam_medical.data.matching import CHANNEL, channels_of, is_mask_name, match
from sam_medical.data.parts import (
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    Pair,
    Part,
    folder_named,
    notes_on,
    notes_on_other_masks,
    notes_on_unused,
)
from sam_medical.data.patients import patient_folders, read_patients
from sam_medical.data.pictures_listed import Pictures
from sam_medical.data.sources import (
    Source,
    as_files,
    by_key,
    find_sources,
    folders_in,
    is_junk,
    notes_on_left_out,
    plain,
    source_of_file,
)
from sam_medical.data.splits import SPLIT_NAMES, are_splits, is_called

LABELS_FILE = "labels.json"
NNUNET_FILE = "dataset.json"
# In nnU-Net, a colour image in one file has the three channels red, green and blue.
IN_COLOUR = (*PICTURES, *TIFF)
COCO_KEYS = {"images", "annotations", "categories"}


def read_part(folder: Path, root: Path, all_folders: Sequence[Path]) -> Part:
    """Detects the layout of a folder and reads it.

    Args:
        folder: The folder with images and masks.
        root: The data folder, where ``labels.json`` may be if it is not in ``folder``.
        all_folders: The folders of all splits. A single split may lack a label.

    Raises:
        UserError: if there are no images, or an image has no masks.
    """
    if (folder / NNUNET_FILE).is_file() and (folder / "imagesTr").is_dir():
        return _nnunet(folder)
    if coco_files(folder):
        return _coco(folder, coco_files(folder), [path for other in all_folders for path in coco_files(other)])
    if not _holds_masks(folder_named(folder, MASK_FOLDERS)):
        shapes = _labelme_files(folder)
        if shapes:
            return _labelme(folder, shapes, [path for other in all_folders for path in _labelme_files(other)])
    if folder_named(folder, IMAGE_FOLDERS) is None and folder.is_dir():
        if patient_folders(folder):
            return read_patients(folder, _names_beside(folder, root), all_folders)
        beside = _masks_beside(folder, _names_beside(folder, root))
        if beside:
            return beside
    return _two_folders(folder, root, all_folders)


def _holds_masks(folder: Path | None) -> bool:
    return folder is not None and bool(find_sources(folder)[0])


def coco_split(folder: Path, split: str) -> Part | None:
    """Reads one split of a COCO folder with one file per split, such as instances_train.json.

    Returns:
        The split; None if the files are not named after splits.

    Raises:
        UserError: if other splits have a file, but this one does not.
    """
    files = coco_files(folder)
    by_split = {name: [path for path in files if is_called(path.stem, name)] for name in SPLIT_NAMES}
    if sum(map(bool, by_split.values())) < 2:
        return None
    if not by_split[split]:
        raise UserError(f"{folder} has COCO's files for its splits, but none for {split}; add instances_{split}.json.")
    return _coco(folder, by_split[split], files, split)


def has_images(folder: Path) -> bool:
    """Whether a folder that has the name of a split contains images."""
    found = coco_files(folder) or _labelme_files(folder) or patient_folders(folder)
    return folder_named(folder, IMAGE_FOLDERS) is not None or bool(found)


def _two_folders(folder: Path, root: Path, all_folders: Sequence[Path]) -> Part:
    names = _names_beside(folder, root)
    image_folder, mask_folder = folder_named(folder, IMAGE_FOLDERS), folder_named(folder, MASK_FOLDERS)
    if image_folder is None:
        raise UserError(f"{folder} holds no folder images; add it, with the images.")
    if mask_folder is None and (beside := _masks_beside(image_folder, names)):
        return beside
    if mask_folder is None:
        raise UserError(f"{folder} holds no folder masks; add it, with a mask for each, or a folder for each label.")
    images, unknown = find_sources(image_folder)
    part = Part((), [], folder=image_folder, notes=notes_on_left_out(images) + notes_on(unknown))
    part.notes += notes_on_other_masks(folder, mask_folder)
    images = [image for image in images if not image.left_out]
    if names:
        masks, others = find_sources(mask_folder)
        images = _slices_with_masks(images, masks, image_folder)
        found = match(images, masks)
        part.labels = names.labels
        part.pairs = [Pair(image, LabelMaps(found.get(image.key, []), names)) for image in images]
        used = {mask.key for some in found.values() for mask in some}
    else:
        mask_folders = [folder_named(other, MASK_FOLDERS) for other in all_folders] or [mask_folder]
        part.labels = _label_folders([other for other in mask_folders if other])
        found_per_label = [_masks_of_label(mask_folder, label) for label in part.labels]
        masks, others = (
            [mask for some, _ in found_per_label for mask in some],
            [path for _, some in found_per_label for path in some],
        )
        images = _slices_with_masks(images, masks, image_folder)
        matched = [match(images, some) for some, _ in found_per_label]
        part.pairs = [Pair(image, MaskOfEach([one.get(image.key, []) for one in matched])) for image in images]
        used = {mask.key for one in matched for some in one.values() for mask in some}
    for pair in part.pairs:
        if not any(pair.annotation.masks):  # type: ignore[attr-defined]
            raise UserError(
                f"{pair.image.path} has no mask {pair.image.key} in {mask_folder}; "
                f"{pair.image.hint or _advice_on_missing_masks(mask_folder, bool(names))}"
            )
    part.notes += notes_on(others) + notes_on_unused(masks, used)
    renamed = [pair for pair in part.pairs if names and pair.image.key != pair.annotation.masks[0].key]  # type: ignore[attr-defined]
    if renamed:
        first = renamed[0]
        mask = first.annotation.masks[0]  # type: ignore[attr-defined]
        part.notes.append(
            f"masks are matched by what their names begin with, as {mask.path.name} with {first.image.path.name}"
        )
    return part


def _slices_with_masks(images: list[Source], masks: Sequence[Source], folder: Path) -> list[Source]:
    """The images, and in place of a DICOM series its slices where each of these has a mask of its own."""
    keys = {mask.key for mask in masks}
    result: list[Source] = []
    for image in images:
        slices = as_files(image, folder) if image.files and image.key not in keys else []
        result += slices if slices and all(part.key in keys for part in slices) else [image]
    return sorted(result, key=lambda source: source.key)


def _names_beside(folder: Path, root: Path) -> LabelNames | None:
    for path in (folder / LABELS_FILE, root / LABELS_FILE):
        if path.is_file():
            return read_label_names(path)
    return None


def _masks_of_label(mask_folder: Path, label: str) -> tuple[list[Source], list[Path]]:
    """The masks in LABEL/, or in SPLIT/LABEL/, and the files that are none."""
    masks: list[Source] = []
    unknown: list[Path] = []
    for place in _places_of_labels(mask_folder):
        inner = {plain(path.name): path for path in folders_in(place)}
        some, others = find_sources(inner[label]) if label in inner else ([], [])
        split = "" if place == mask_folder else f"{plain(place.name)}/"
        masks += [replace(mask, name=f"{split}{mask.name}") for mask in some]
        unknown += others
    return masks, unknown


def _places_of_labels(mask_folder: Path) -> list[Path]:
    """Where the folders of labels are: among the masks, or in each split's."""
    inner = folders_in(mask_folder)
    return inner if are_splits([path.name for path in inner]) else [mask_folder]


def _label_folders(mask_folders: Sequence[Path]) -> list[str]:
    """The names of the folders in any of these; a split may lack a label."""
    places = [place for folder in mask_folders for place in _places_of_labels(folder)]
    labels = sorted({plain(path.name) for place in places for path in folders_in(place)})
    if not labels:
        raise UserError(
            f"the labels of {mask_folders[0]} are unknown: put a labels.json beside it, "
            f'{{"liver": 1, "tumor": 2}}, or the masks into a folder for each label.'
        )
    require_label_names(labels, mask_folders[0])
    return labels


def _advice_on_missing_masks(mask_folder: Path, has_names: bool) -> str:
    inner = sorted(path.name for path in mask_folder.iterdir() if not is_junk(path))
    if has_names and inner and all((mask_folder / name).is_dir() for name in inner):
        return "labels.json says that each image has one mask for all labels: remove it to use folders of masks."
    return (
        "add it, blank if there is nothing to see, or remove the image. A mask has its image's name, and there is "
        f"{inner[0]}."
        if inner
        else "add it; there is none."
    )


def _masks_beside(folder: Path, names: LabelNames | None) -> Part | None:
    """Images and masks in one folder or in its sub-folders. Names tell masks from images."""
    sources, unknown = find_sources(folder)
    masks = [source for source in sources if is_mask_name(source.key)]
    images = [source for source in sources if not is_mask_name(source.key)]
    if not masks or not images:
        return None
    found = match(images, masks)
    missing = [image for image in images if image.key not in found]
    if missing:
        called = missing[0].name.rpartition("/")[2]
        raise UserError(f"{missing[0].path} has no mask, {called}_mask beside it; add it, or remove it.")
    labels = names.labels if names else ("lesion",)
    pairs = [
        Pair(image, LabelMaps(found[image.key], names) if names else MaskOfEach([found[image.key]]))
        for image in images
    ]
    notes = [f"masks lie beside their images, as {masks[0].path.name}"]
    if not names:
        notes.append('without a labels.json the label is called "lesion"; give {"NAME": 255} to name it')
    unknown = [path for path in unknown if path.name != LABELS_FILE]
    return Part(labels, pairs, notes + notes_on(unknown), folder=folder)


def _nnunet(root: Path) -> Part:
    """nnU-Net raw data or Medical Decathlon data. Both have the same folders and a dataset.json."""
    path = root / NNUNET_FILE
    content = read_json(path)
    channels = content.get("channel_names") or content.get("modality") or {}
    names = label_names(content.get("labels"), path)
    images, unknown = find_sources(root / "imagesTr")
    masks, _ = find_sources(root / "labelsTr") if (root / "labelsTr").is_dir() else ([], [])
    known = by_key(masks)
    numbered = [image for image in images if image.key not in known and CHANNEL.search(image.name)]
    several = [files for files in channels_of(numbered).values() if len(files) > 1]
    is_in_colour = not several and len(channels) == 3 and all(suffix_of(i.path.name) in IN_COLOUR for i in images)
    if several or (len(channels) > 1 and not is_in_colour):
        first = several[0][0] if several else images[0]
        raise UserError(
            f"{first.path} has {max(len(channels), len(several[0]) if several else 0)} channels, by {path}; keep "
            "those of one of them in imagesTr, and it alone in dataset.json."
        )
    pairs = []
    for image in images:
        key = image.key if image.key in known else CHANNEL.sub("", image.key)
        if key not in known:
            raise UserError(f"{image.path} has no mask {key} in {root / 'labelsTr'}; add it, or remove the image.")
        pairs.append(Pair(image, LabelMaps([known[key]], names)))
    modality = str(next(iter(channels.values()), "")).upper()
    return Part(
        names.labels,
        pairs,
        [f"read as nnU-Net's or the Decathlon's, by {path}", *notes_on(unknown)],
        modality if modality in ("CT", "MR", "MRI", "T1", "T2", "FLAIR") else "",
        root / "imagesTr",
    )


def coco_files(folder: Path) -> list[Path]:
    """Returns the COCO files in a folder or in its sub-folder annotations."""
    places = [folder, folder / "annotations"]
    found = [path for place in places if place.is_dir() for path in sorted(place.glob("*.json")) if not is_junk(path)]
    return [path for path in found if path.name not in (LABELS_FILE, NNUNET_FILE) and _is_coco(path)]


def _is_coco(path: Path) -> bool:
    try:
        content = read_json(path)
    except UserError:
        return False
    return isinstance(content, dict) and content.keys() >= COCO_KEYS and isinstance(content["images"], list)


def _coco(folder: Path, files: Sequence[Path], all_files: Sequence[Path], split: str = "") -> Part:
    labels = _coco_labels(all_files or files)
    part = Part(labels, [], [f"read as COCO's, by {', '.join(path.name for path in files)}"], folder=folder)
    pictures = Pictures(folder)
    used = set()
    for file in files:
        content = read_json(file)
        places = {
            category["id"]: labels.index(name)
            for category in content["categories"]
            if (name := plain(str(category["name"]))) in labels
        }
        by_image: dict[Any, list[Any]] = defaultdict(list)
        for annotation in content["annotations"]:
            _check_coco(annotation, places, file)
            by_image[annotation["image_id"]].append(annotation)
        unlisted_ids = by_image.keys() - {image["id"] for image in content["images"]}
        if unlisted_ids:
            unlisted_id = min(unlisted_ids, key=str)
            raise UserError(
                f"{file} has {len(by_image[unlisted_id])} annotations of an image with the id {unlisted_id!r}, which "
                "it does not list; add the image, or remove the annotations."
            )
        for image in content["images"]:
            name = plain(str(image["file_name"])).replace("\\", "/")
            found = _of_split(pictures.listed(name), split, folder)
            if not found:
                raise UserError(f"{file} lists {name}, which is in no folder of {folder}; add it.")
            if len(found) > 1:
                raise UserError(f"{file} lists {name}, which may be {found[0]} or {found[1]}; give its folder.")
            path = found[0]
            used.add(path)
            size = int(image.get("height") or 0), int(image.get("width") or 0)
            annotation = CocoAnnotations(file, size, by_image[image["id"]], places, len(labels))
            part.pairs.append(Pair(_source_in(path, folder), annotation))
    part.pairs.sort(key=lambda pair: pair.image.key)
    left = [path for path in pictures.paths if path not in used]
    if left and not split:
        part.notes.append(f"{len(left)} images are not listed, and not read, first {left[0].name}")
    return part


def _of_split(paths: list[Path], split: str, folder: Path) -> list[Path]:
    """Chooses among images of one name the only one in a folder of the split. Otherwise returns all of them."""

    def lies_in_split(path: Path) -> bool:
        return any(is_called(part, split) for part in path.relative_to(folder).parts[:-1])

    in_split = [path for path in paths if split and lies_in_split(path)]
    return in_split if len(in_split) == 1 else paths


def _coco_labels(files: Sequence[Path]) -> list[str]:
    """Returns the categories that at least one annotation uses, in the order of the files."""
    labels: list[str] = []
    for file in files:
        content = read_json(file)
        used = {annotation.get("category_id") for annotation in content["annotations"]}
        for category in content["categories"]:
            name = plain(str(category["name"]))
            if category["id"] in used and name not in labels:
                labels.append(name)
    if not labels:
        raise UserError(_why_without_labels(files))
    require_label_names(labels, files[0])
    return labels


def _why_without_labels(files: Sequence[Path]) -> str:
    for file in files:
        content = read_json(file)
        used = {str(annotation.get("category_id")) for annotation in content["annotations"]}
        if used:
            known = ", ".join(str(category["id"]) for category in content["categories"]) or "none"
            given = f"{len(content['annotations'])} annotations the categories {', '.join(sorted(used))}"
            return f"{file} gives its {given}, but lists {known}; add them to its categories."
    return f"{files[0]} holds no annotations; export it with its outlines."


def _check_coco(annotation: Any, places: dict[Any, int], file: Path) -> None:
    number = annotation.get("id")
    if annotation.get("category_id") not in places:
        raise UserError(
            f"{file} gives annotation {number} the category {annotation.get('category_id')}, which it does not list."
        )
    if not annotation.get("segmentation"):
        raise UserError(f"{file} gives annotation {number} a box but no outline; export it with segmentations.")


def _labelme_files(folder: Path) -> list[Path]:
    """Returns the labelme files in a folder, recursively."""
    if not folder.is_dir():
        return []
    found = [
        path
        for path in sorted(folder.rglob("*.json"))
        if not any(is_junk(Path(part)) for part in path.relative_to(folder).parts)
    ]
    return [path for path in found if path.name not in (LABELS_FILE, NNUNET_FILE) and _is_labelme(path)]


def _is_labelme(path: Path) -> bool:
    try:
        content = read_json(path)
    except UserError:
        return False
    return isinstance(content, dict) and "shapes" in content and "imagePath" in content


def _labelme(folder: Path, files: Sequence[Path], all_files: Sequence[Path]) -> Part:
    contents = {path: read_json(path) for path in files}
    others = [contents.get(path) or read_json(path) for path in all_files]
    labels = sorted(
        {plain(str(shape["label"])) for content in others for shape in content["shapes"]} - {"_background_"}
    )
    if not labels:
        raise UserError(f"{folder} holds labelme's files, but no shapes in them; draw some.")
    require_label_names(labels, files[0])
    pictures = Pictures(folder)
    part = Part(labels, [], [f"read as labelme's, by {files[0].name} and {len(files) - 1} others"], folder=folder)
    used = set()
    for path, content in contents.items():
        name = plain(str(content["imagePath"])).replace("\\", "/")
        image = pictures.of_labelme(path, name)
        if image is None:
            raise UserError(
                f"{path} is of {name}, which lies neither beside it nor at the same place in images; put it beside it."
            )
        used.add(image)
        shapes = [
            {**shape, "label": plain(str(shape["label"]))}
            for shape in content["shapes"]
            if shape["label"] != "_background_"
        ]
        size = int(content.get("imageHeight") or 0), int(content.get("imageWidth") or 0)
        part.pairs.append(Pair(_source_in(image, folder), LabelmeShapes(path, size, shapes, labels)))
    part.pairs.sort(key=lambda pair: pair.image.key)
    left = [path for path in pictures.paths if path not in used]
    if left:
        raise UserError(f"{left[0]} has no labelme file; save one, without shapes if there is nothing to see.")
    return part


def _source_in(path: Path, folder: Path) -> Source:
    """Returns a source named by its relative path, without the folder that contains all images."""
    parts = path.parent.relative_to(folder).parts if path.is_relative_to(folder) else ()
    parts = parts[1:] if parts and parts[0].lower() in IMAGE_FOLDERS else parts
    source = source_of_file(path)
    return replace(source, name="/".join([*map(plain, parts), source.name]))
