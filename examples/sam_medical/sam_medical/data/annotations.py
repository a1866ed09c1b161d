"""Annotations of one image: label maps, one mask per label, COCO annotations, or labelme shapes."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw

from sam_medical.common.errors import UserError
from sam_medical.data.label_names import LabelNames
from sam_medical.data.masks import mask_of_one_label, masks_by_colour, masks_by_value
from sam_medical.data.reading import Layer, Reading, check_grid, read_layer
from sam_medical.data.sources import Source


class Annotation(Protocol):
    """The labels of one image or volume."""

    def check(self, image: Source, reading: Reading) -> None:
        """Checks that the annotation fits the image, without reading pixels. Raises a `UserError` if it does not."""
        ...

    def read(self, image: Source, number: int | None, size: tuple[int, int], reading: Reading) -> np.ndarray:
        """Reads the masks of one slice.

        Args:
            image: The image that the annotation belongs to.
            number: The slice or page; None for a 2D image.
            size: Height and width of the slice, in pixels.
            reading: The plane of the slices, and whether masks are resampled.

        Returns:
            One bool mask per label, (K, H, W).
        """
        ...


@dataclass(frozen=True)
class LabelMaps:
    """Label maps: each value or colour is a label. Several label maps of one image are merged."""

    masks: Sequence[Source]
    names: LabelNames

    def check(self, image: Source, reading: Reading) -> None:
        for mask in self.masks:
            check_grid(mask, image, reading.resample_masks)

    def read(self, image: Source, number: int | None, size: tuple[int, int], reading: Reading) -> np.ndarray:
        layers = [read_layer(mask, image, number, reading) for mask in self.masks]
        return np.any([self._read(layer) for layer in layers], axis=0)

    def _read(self, layer: Layer) -> np.ndarray:
        if self.names.values:
            return masks_by_value(layer, self.names.values)
        return masks_by_colour(layer, self.names.colours, self.names.backgrounds)


@dataclass(frozen=True)
class MaskOfEach:
    """Binary masks, a list of them per label. An empty list means that the image does not contain the label."""

    masks: Sequence[Sequence[Source]]

    def check(self, image: Source, reading: Reading) -> None:
        for masks in self.masks:
            for mask in masks:
                check_grid(mask, image, reading.resample_masks)

    def read(self, image: Source, number: int | None, size: tuple[int, int], reading: Reading) -> np.ndarray:
        result = np.zeros((len(self.masks), *size), dtype=bool)
        for place, masks in enumerate(self.masks):
            for mask in masks:
                result[place] |= mask_of_one_label(read_layer(mask, image, number, reading))
        return result


@dataclass(frozen=True)
class CocoAnnotations:
    """COCO annotations of one image, polygons or run lengths, rasterised by pycocotools."""

    path: Path
    size: tuple[int, int]
    annotations: Sequence[Mapping[str, Any]]
    places: Mapping[int, int]
    count: int

    def check(self, image: Source, reading: Reading) -> None:
        pass

    def read(self, image: Source, number: int | None, size: tuple[int, int], reading: Reading) -> np.ndarray:
        from pycocotools import mask as coco

        _require_size(self.path, image, self.size, size)
        result = np.zeros((self.count, *size), dtype=bool)
        for annotation in self.annotations:
            outline = annotation["segmentation"]
            _require_size_of_runs(self.path, annotation, image, size)
            try:
                runs = coco.frPyObjects(outline, *size) if not _is_packed(outline) else outline
                mask = coco.decode(coco.merge(runs) if isinstance(runs, list) else runs)
            except Exception as error:
                raise UserError(
                    f"{self.path} has an invalid outline of {image.path.name}, annotation "
                    f"{annotation.get('id')}; fix or remove it."
                ) from error
            result[self.places[annotation["category_id"]]] |= mask > 0
        return result


def _require_size_of_runs(path: Path, annotation: Mapping[str, Any], image: Source, size: tuple[int, int]) -> None:
    outline = annotation["segmentation"]
    stated_size = outline.get("size") if isinstance(outline, dict) else None
    if isinstance(stated_size, list) and tuple(stated_size) != size:
        raise UserError(
            f"{path} has run lengths of {' x '.join(map(str, stated_size))} in annotation {annotation.get('id')}, and "
            f"{image.path.name} is {size[0]} x {size[1]} (height x width); export it again at the image's own size."
        )


def _is_packed(outline: Any) -> bool:
    return isinstance(outline, dict) and isinstance(outline.get("counts"), (str, bytes))


@dataclass(frozen=True)
class LabelmeShapes:
    """labelme shapes of one image, rasterised as labelme does it."""

    path: Path
    size: tuple[int, int]
    shapes: Sequence[Mapping[str, Any]]
    labels: Sequence[str]

    def check(self, image: Source, reading: Reading) -> None:
        pass

    def read(self, image: Source, number: int | None, size: tuple[int, int], reading: Reading) -> np.ndarray:
        _require_size(self.path, image, self.size, size)
        result = np.zeros((len(self.labels), *size), dtype=bool)
        for shape in self.shapes:
            result[self.labels.index(shape["label"])] |= _draw(shape, size, self.path)
        return result


def _draw(shape: Mapping[str, Any], size: tuple[int, int], path: Path) -> np.ndarray:
    kind = shape.get("shape_type") or "polygon"
    points = [tuple(map(float, point)) for point in shape["points"]]
    canvas = Image.new("1", size[::-1])
    if kind == "mask" and shape.get("mask"):
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(shape["mask"])))) > 0
        left, top = (round(part) for part in points[0])
        canvas.paste(Image.fromarray(mask), (left, top))
    elif kind in DRAWN and len(points) >= DRAWN[kind][0]:
        DRAWN[kind][1](ImageDraw.Draw(canvas), points)
    else:
        raise UserError(
            f"{path} has a shape of type {kind!r} with {len(points)} points, which has no area; remove it."
        )
    return np.asarray(canvas, dtype=bool)


def _draw_circle(draw: ImageDraw.ImageDraw, points: Any) -> None:
    (x, y), (x_on, y_on) = points[:2]
    radius = float(np.hypot(x_on - x, y_on - y))
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=1, fill=1)


def _draw_rectangle(draw: ImageDraw.ImageDraw, points: Any) -> None:
    """Accepts two corners, as labelme writes them, or all four, as X-AnyLabeling writes them."""
    xs, ys = sorted(point[0] for point in points), sorted(point[1] for point in points)
    draw.rectangle([xs[0], ys[0], xs[-1], ys[-1]], outline=1, fill=1)


def _draw_polygon(draw: ImageDraw.ImageDraw, points: Any) -> None:
    draw.polygon(points, outline=1, fill=1)


DRAWN: dict[str, tuple[int, Callable[[ImageDraw.ImageDraw, Any], None]]] = {
    "polygon": (3, _draw_polygon),
    "rotation": (3, _draw_polygon),
    "rectangle": (2, _draw_rectangle),
    "circle": (2, _draw_circle),
}


def _require_size(path: Path, image: Source, stated_size: tuple[int, int], size: tuple[int, int]) -> None:
    """Compares sizes (height, width). A stated size of zero means that the file states none."""
    if all(stated_size) and stated_size != size:
        raise UserError(
            f"{path} states that {image.path.name} is {stated_size[1]}x{stated_size[0]} pixels, but it is "
            f"{size[1]}x{size[0]} as viewers show it; annotate the image again, or use the image that was annotated."
        )
