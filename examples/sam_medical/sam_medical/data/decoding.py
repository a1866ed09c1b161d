"""Decodes every supported file format into a `Scan`: its values and, for volumes, its affine.

Libraries do the decoding: nibabel for NIfTI, SimpleITK for NRRD, MetaImage and DICOM, tifffile for TIFF stacks and
TIFF of more than 8 bits, Pillow for all other images. This module normalises their results and rejects files that
have more than one interpretation.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from sam_medical.common.errors import UserError, first_line
from sam_medical.data.geometry import is_usable, ras_affine
from sam_medical.data.quiet import pydicom, simpleitk
from sam_medical.data.stacking import normal_of, order_of, problem_of

NIFTI = (".nii.gz", ".nii", ".mgz", ".img")
ITK = (".seg.nrrd", ".nrrd", ".nhdr", ".mha", ".mhd")
DICOM = (".dcm", ".dicom", ".ima")
TIFF = (".ome.tif", ".ome.tiff", ".tif", ".tiff")
PICTURES = (".bmp", ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".jp2", ".pgm", ".ppm", ".pnm")
VOLUMES = (*NIFTI, *ITK)
EXTENSIONS = (*PICTURES, *TIFF, *DICOM, *VOLUMES)
# Limit per image. As three float32 values per pixel, such an image takes 1.2 GB.
MOST_PIXELS = 100_000_000
LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP")
# Formats whose frames are a sequence. JPEG is not one: phones store previews in it.
SEQUENCES = ("GIF", "WEBP", "PNG")
# TIFF's photometric interpretations of CMYK and of grey with zero as white or as black; its signed sample format.
SEPARATED, WHITE_IS_ZERO, BLACK_IS_ZERO, SIGNED = 5, 0, 1, 2
# In bytes: uncompressed TIFF stacks above the first limit are memory-mapped, others may decode to at most the second.
MAPPED_FROM, MOST_BYTES = 64_000_000, 8_000_000_000
RUN_LENGTHS, BIG_ENDIAN = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.2"
# Millimetres per unit, by NIfTI's names of the units.
MILLIMETRES = {"meter": 1000.0, "micron": 0.001}
# How many values of a scan are sampled for statistics.
SAMPLED = 2_000_000
COLOUR_DTYPES = (("R", "G", "B"), ("R", "G", "B", "A"))


@dataclass(frozen=True)
class Scan:
    """The decoded content of a file or a DICOM series.

    Attributes:
        path: The file, or the folder of a series.
            values: With an affine (X, Y, Z), or (X, Y, Z, 3) in colour; without one (N, H, W), or (N, H, W, 3).
            affine: From voxel indices to millimetres, RAS+; None for 2D images and stacks.
            is_stack: True for volumes and stacks, even if they have a single slice or page.
            modality: The DICOM modality, such as CT; empty if unknown.
            indices: The stored numbers (N, H, W) of an image with a palette or with fewer than 8 bits.
            grey_palette: Whether the palette contains greys only. Some tools write grey images this way to save space.
            alpha: The 8-bit alpha channel, (N, H, W), if there is one.
            lossy: Whether the format uses lossy compression.
            files: The files of a DICOM series in slice order, or the one DICOM file.
            frames: The frame numbers of a multi-frame DICOM file in slice order.
            pixel_mm2: The area of a pixel of a 2D DICOM image, in mm2, if the file states it.
            remark: How the values were changed, if they were.
    """

    path: Path
    values: np.ndarray
    affine: np.ndarray | None = None
    is_stack: bool = False
    modality: str = ""
    indices: np.ndarray | None = None
    grey_palette: bool = False
    alpha: np.ndarray | None = None
    lossy: bool = False
    files: tuple[Path, ...] = ()
    frames: tuple[int, ...] = ()
    pixel_mm2: float | None = None
    remark: str = ""

    @property
    def in_colour(self) -> bool:
        return self.values.ndim == 4

    @property
    def is_eight_bit(self) -> bool:
        return self.values.dtype == np.uint8

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.values, self.indices, self.alpha) if part is not None)

    @cached_property
    def finite_range(self) -> tuple[float, float]:
        """The lowest and the highest finite value."""
        lows, highs = [], []
        for plane in self.values:  # plane by plane: a copy of a large volume may not fit into memory
            numbers = plane if plane.dtype.kind in "iub" else plane[np.isfinite(plane)]
            if numbers.size:
                lows.append(float(numbers.min()))
                highs.append(float(numbers.max()))
        if not lows:
            raise UserError(f"{self.path} holds no numbers; replace or remove the file.")
        return min(lows), max(highs)

    @cached_property
    def sample(self) -> np.ndarray:
        """Up to about four million finite values at a fixed stride, so the sample is always the same."""
        flat = self.values.reshape(-1)
        flat = flat[:: max(1, flat.size // SAMPLED)]
        return flat if flat.dtype.kind in "iub" else flat[np.isfinite(flat)]


def suffix_of(name: str) -> str:
    """Returns the known extension of a file name, in lower case; empty if it has none."""
    lower = name.lower()
    return next((suffix for suffix in sorted(EXTENSIONS, key=len, reverse=True) if lower.endswith(suffix)), "")


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its extension or, if it has none, by its first bytes."""
    if suffix_of(path.name) in DICOM:
        return True
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def is_one_picture(path: Path) -> bool:
    """Whether the header alone shows that a file contains exactly one 2D image. False also means "unknown".

    Raises:
        UserError: if the image is too large to be decoded.
    """
    if suffix_of(path.name) not in (*PICTURES, *TIFF):
        return False
    try:
        with _open_picture(path) as image:
            return image.format not in (*SEQUENCES, "TIFF") or getattr(image, "n_frames", 1) == 1
    except (OSError, SyntaxError, ValueError):
        return False  # decoding reports the error


def decode(path: Path, files: tuple[Path, ...] = ()) -> Scan:
    """Decodes a file or a DICOM series.

    Args:
        path: The file, or the folder of the series.
        files: The files of the series in slice order; empty for a single file.

    Raises:
        UserError: if the file is damaged, or is not a single image, stack or volume.
    """
    suffix = suffix_of(path.name)
    if files:
        return _guarded(path, "a DICOM series", lambda: _read_series(path, files))
    if suffix in NIFTI:
        return _guarded(path, "NIfTI", lambda: _read_nifti(path))
    if suffix in ITK:
        return _guarded(path, suffix.upper()[1:], lambda: _read_itk(path))
    if suffix in TIFF:
        return _guarded(path, "an image", lambda: _read_tiff(path))
    if suffix in PICTURES:
        return _guarded(path, "an image", lambda: _read_picture(path))
    return _guarded(path, "DICOM", lambda: _read_dicom(path))


def _guarded(path: Path, kind: str, read: Callable[[], Scan]) -> Scan:
    try:
        scan = read()
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path} does not fit into memory; cut it into smaller ones.") from error
    except Exception as error:
        raise UserError(f"{path} cannot be read as {kind} ({_reason(error)}); replace or remove the file.") from error
    if 0 in scan.values.shape:
        raise UserError(f"{path} is empty, {' x '.join(map(str, scan.values.shape))}; replace or remove the file.")
    if scan.affine is not None and not is_usable(scan.affine):
        raise UserError(f"{path} has a header without a valid orientation; write the orientation again.")
    if scan.values.dtype == np.float64:
        scan = replace(scan, values=scan.values.astype(np.float32))
    return scan


def _reason(error: Exception) -> str:
    """Returns the informative line of an error. ITK puts its source location first and the reason last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines and "SimpleITK" in lines[0] else first_line(error)


def _read_nifti(path: Path) -> Scan:
    import nibabel

    logging.getLogger("nibabel").setLevel(logging.CRITICAL)
    file: Any = nibabel.load(path)
    shape = tuple(file.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    shape += (1,) * (3 - len(shape))
    if len(shape) > 3:
        size = " x ".join(map(str, shape))
        raise UserError(
            f"{path} is {size}: several channels or time points; save the one to segment as a file of its own, with "
            "nibabel.four_to_three or fslsplit."
        )
    values = np.asanyarray(file.dataobj)
    if values.dtype.names:
        if tuple(name.upper() for name in values.dtype.names) not in COLOUR_DTYPES:
            raise UserError(f"{path} has voxels of {', '.join(values.dtype.names)}; save grey values or RGB.")
        values = np.stack([values[name] for name in values.dtype.names[:3]], axis=-1)
        return Scan(path, values.reshape(*shape, 3), affine_in_mm(file), is_stack=True)
    if np.iscomplexobj(values):
        raise UserError(f"{path} holds complex numbers; save their magnitude.")
    return Scan(path, values.reshape(shape), affine_in_mm(file), is_stack=True)


def affine_in_mm(file: Any) -> np.ndarray:
    """Returns the affine of a nibabel image in millimetres. nibabel keeps the unit of the header."""
    unit = file.header.get_xyzt_units()[0] if hasattr(file.header, "get_xyzt_units") else "mm"
    return np.diag([*[MILLIMETRES.get(unit, 1.0)] * 3, 1.0]) @ file.affine


def _read_itk(path: Path) -> Scan:
    itk = simpleitk()
    return _scan_of_itk(path, itk.ReadImage(str(path)))


def _scan_of_itk(path: Path, image: Any) -> Scan:
    """Converts an ITK image to a `Scan` with axes (X, Y, Z). ITK arrays start with Z."""
    itk = simpleitk()
    values = itk.GetArrayFromImage(image)
    channels, dimension = image.GetNumberOfComponentsPerPixel(), image.GetDimension()
    if dimension == 2:
        image, values, dimension = itk.JoinSeries(image), values[None], 3
    if dimension == 4 and image.GetSize()[3] == 1:
        image, values, dimension = image[:, :, :, 0], values[0], 3
    if dimension != 3 or channels not in (1, 3, 4) or (channels == 4 and values.dtype != np.uint8):
        size = " x ".join(map(str, image.GetSize()))
        raise UserError(
            f"{path} is {size} of {channels} channels: several channels or time points; save the one to segment as a "
            "file of its own."
        )
    values = np.swapaxes(values, 0, 2)[..., :3] if channels > 1 else values.transpose(2, 1, 0)
    return Scan(path, values, ras_affine(image.GetSpacing(), image.GetOrigin(), image.GetDirection()), is_stack=True)


def _read_series(path: Path, files: tuple[Path, ...]) -> Scan:
    itk = simpleitk()
    reader = itk.ImageSeriesReader()
    reader.SetFileNames([str(file) for file in files])
    single = _itk_reader(files[0])
    if single.GetNumberOfComponents() == 1:
        reader.SetOutputPixelType(itk.sitkFloat32)  # the first slice's type may clip the others
    scan = _scan_of_itk(path, reader.Execute())
    return replace(scan, modality=_tag(single, "0008|0060"), files=files)


def _read_dicom(path: Path) -> Scan:
    """Reads a single DICOM file. It becomes a volume only if the header gives the positions of its frames."""
    header = pydicom().dcmread(path, stop_before_pixels=True, force=True)
    modality = str(header.get("Modality", ""))
    if modality == "SEG":
        raise UserError(f"{path} is a DICOM SEG; save it as NIfTI, for example with 3D Slicer or dcmqi.")
    if "Rows" not in header:
        raise UserError(f"{path} holds no picture, it is DICOM of the modality {modality or 'none'}; remove it.")
    _check_pixels(path, int(header.Rows), int(header.Columns))
    if _is_misread(header):
        raise UserError(f"{path} has a rare encoding that ITK misreads; save it uncompressed, with dcmconv +te.")
    image = _itk_reader(path).Execute()
    # ITK has inverted MONOCHROME1 already, where the highest value is black.
    scan = replace(_scan_of_itk(path, image), modality=modality, files=(path,))
    if image.GetDimension() == 3 and image.GetSize()[2] > 1 and _has_places(header):
        return _in_order(scan, header)
    says_spacing = "PixelSpacing" in header or "ImagerPixelSpacing" in header
    area = float(np.prod(image.GetSpacing()[:2])) if says_spacing else None
    pictures = np.swapaxes(scan.values, 0, 2)
    return replace(scan, values=pictures, affine=None, is_stack=len(pictures) > 1, pixel_mm2=area)


def _is_misread(header: Any) -> bool:
    """Whether ITK misreads the file: run-length encoded colours above 8 bits, or big-endian values above 16 bits."""
    syntax, bits = header.file_meta.get("TransferSyntaxUID"), int(header.get("BitsAllocated") or 8)
    return (syntax == RUN_LENGTHS and header.get("SamplesPerPixel") == 3 and bits > 8) or (
        syntax == BIG_ENDIAN and bits > 16
    )


def _in_order(scan: Scan, header: Any) -> Scan:
    """Sorts frames by position. DICOM allows any order, and ITK keeps the order of the file."""
    shared = header.get("SharedFunctionalGroupsSequence", [None])[0]
    frames = header.PerFrameFunctionalGroupsSequence

    def per_frame(sequence: str, keyword: str) -> list[Any]:
        groups = [frame if sequence in frame else shared for frame in frames]
        return [list(group[sequence].value[0][keyword].value) for group in groups]

    orientations = np.array(per_frame("PlaneOrientationSequence", "ImageOrientationPatient"), dtype=float)
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        raise UserError(f"{scan.path} holds frames in several directions; save each stack as a file of its own.")
    places = np.array(per_frame("PlanePositionSequence", "ImagePositionPatient"), dtype=float)
    normal = normal_of(orientations[0])
    order = order_of(places, normal)
    problem = problem_of(places[order], normal, [f"frame {number + 1}" for number in order])
    if problem:
        raise UserError(f"{scan.path} has {problem}")
    rescaled = {str(frame.get("PixelValueTransformationSequence", "")) for frame in frames}
    if len(rescaled) > 1:
        raise UserError(f"{scan.path} rescales its frames differently; save it as NIfTI, with dcm2niix for example.")
    rows, columns = orientations[0][3:], orientations[0][:3]
    down, right = (float(side) for side in per_frame("PixelMeasuresSequence", "PixelSpacing")[0])
    step = (places[order[-1]] - places[order[0]]) / (len(order) - 1)
    spacing = (right, down, float(np.linalg.norm(step)))
    direction = np.stack([columns, rows, step / spacing[2]], axis=1)
    affine = ras_affine(spacing, tuple(places[order[0]]), tuple(direction.ravel()))
    return replace(scan, values=scan.values[:, :, order], affine=affine, frames=tuple(int(place) for place in order))


def _itk_reader(path: Path) -> Any:
    itk = simpleitk()
    reader = itk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def _tag(reader: Any, key: str) -> str:
    return reader.GetMetaData(key).strip() if reader.HasMetaDataKey(key) else ""


def _has_places(header: Any) -> bool:
    """Whether a multi-frame header gives the frame positions. Enhanced CT and MR do so, cine files do not."""
    groups = [
        *header.get("SharedFunctionalGroupsSequence", []),
        *header.get("PerFrameFunctionalGroupsSequence", [])[:1],
    ]
    stated = {element.keyword for group in groups for element in group}
    return stated >= {"PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence"}


def _read_tiff(path: Path) -> Scan:
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with tifffile.TiffFile(path) as file:
        page: Any = file.pages.first
        if len(file.pages) == 1 and np.max(page.bitspersample) <= 8 and page.sampleformat != SIGNED:
            return _read_picture(path)
        values, axes = _whole_pages(path, file)
        colour_map, photometric = page.colormap, page.photometric
        lossy = page.compression in (6, 7, 34712, 33003, 33005)
        orientation, bits = page.tags.valueof(274, default=1), int(np.max(page.bitspersample))
    if photometric == SEPARATED:
        raise UserError(f"{path} is in CMYK of more than eight bits; save it in RGB.")
    values, is_stack = _pages_of(path, values, axes)
    if orientation != 1:
        raise UserError(f"{path} is stored rotated (TIFF orientation {orientation}); save it upright.")
    if values.dtype == bool:
        values = values.view(np.uint8)
    if photometric == WHITE_IS_ZERO and values.dtype.kind == "u":
        values = values.dtype.type(2**bits - 1) - values
    if colour_map is not None and values.dtype.kind == "u" and values.ndim == 3:
        colours = (np.asarray(colour_map) >> 8).astype(np.uint8).T
        return Scan(path, colours[values], is_stack=is_stack, indices=values, grey_palette=_is_grey(colours))
    if bits < 8 and values.dtype == np.uint8 and values.ndim == 3:
        return Scan(path, values * np.uint8(255 // (2**bits - 1)), is_stack=is_stack, indices=values)
    alpha = (
        values[..., 3].astype(np.uint8) if values.ndim == 4 and values.shape[3] == 4 and values.itemsize == 1 else None
    )
    if values.ndim == 4:
        values = values[..., :3]
    return Scan(path, values, is_stack=is_stack, alpha=alpha, lossy=lossy)


def _whole_pages(path: Path, file: Any) -> tuple[np.ndarray, str]:
    """Returns the full-size pages of a TIFF file, without previews, and their axes in tifffile's letters.

    Pages written one by one are separate series in tifffile. They are stacked here.
    """
    whole = [series for series in file.series if not all(part.is_reduced for part in series.pages if part)]
    first = whole[0]
    if any(series.shape != first.shape or series.axes != first.axes for series in whole):
        sizes = ", ".join(" x ".join(map(str, series.shape)) for series in whole)
        raise UserError(f"{path} holds pictures of different sizes, {sizes}; save each as a file of its own.")
    _check_pixels(path, *(size for axis, size in zip(first.axes, first.shape, strict=True) if axis in "YX"))
    size = len(whole) * first.nbytes
    if len(whole) == 1 and first.dataoffset is not None and first.dtype.isnative and size > MAPPED_FROM:
        return np.memmap(path, first.dtype, "r", first.dataoffset, first.shape), first.axes
    if size > MOST_BYTES:
        raise UserError(
            f"{path} holds {size / 1e9:.1f} GB, more than {MOST_BYTES / 1e9:g}; cut it into smaller stacks."
        )
    if len(whole) == 1:
        return first.asarray(), first.axes
    return np.stack([series.asarray() for series in whole]), "I" + first.axes


def _pages_of(path: Path, values: np.ndarray, axes: str) -> tuple[np.ndarray, bool]:
    """Returns values as (N, H, W) or (N, H, W, channels), and whether the file has an axis of pages."""
    rest = [axis for axis in axes if axis not in "YXS"]
    for axis in list(rest):
        if values.shape[axes.index(axis)] == 1:
            values, axes = values.squeeze(axes.index(axis)), axes.replace(axis, "", 1)
            rest.remove(axis)
    if rest == ["C"] and values.shape[axes.index("C")] == 3 and "S" not in axes:
        values, axes, rest = np.moveaxis(values, axes.index("C"), -1), axes.replace("C", "") + "S", []
    if "S" in axes and not axes.endswith("S"):
        values, axes = np.moveaxis(values, axes.index("S"), -1), axes.replace("S", "") + "S"
    if "S" in axes and values.shape[-1] not in (3, 4):
        values, axes = (values[..., 0], axes[:-1]) if values.shape[-1] <= 2 else (values, axes)
    is_known = axes.replace("S", "")[-2:] == "YX" and ("S" not in axes or values.shape[-1] in (3, 4))
    if len(rest) > 1 or "C" in rest or not is_known:
        size = " x ".join(f"{size} {axis}" for axis, size in zip(axes, values.shape, strict=False))
        raise UserError(
            f"{path} is {size}: several channels or time points; save the one to segment as a file of its own."
        )
    return (values if rest else values[None]), bool(rest)


def _read_picture(path: Path) -> Scan:
    image = _open_picture(path)
    count = getattr(image, "n_frames", 1) if image.format in SEQUENCES else 1
    if count * image.width * image.height > 4 * MOST_PIXELS:
        raise UserError(f"{path} holds {count} pictures, too many for one file; save each as a file of its own.")
    frames = []
    for number in range(count):
        image.seek(number)
        frames.append(_read_frame(path, image))
    return frames[0] if count == 1 else _joined(frames)


def _open_picture(path: Path) -> Image.Image:
    Image.MAX_IMAGE_PIXELS = None  # `_check_pixels` reports large images with a clearer message
    image = Image.open(path)
    _check_pixels(path, *image.size)
    return image


def _joined(frames: Sequence[Scan]) -> Scan:
    def together(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
        arrays = [part for part in parts if part is not None]
        return np.concatenate(arrays) if len(arrays) == len(parts) else None

    first = frames[0]
    values = np.concatenate([frame.values for frame in frames])
    indices = together([frame.indices for frame in frames])
    alpha = together([frame.alpha for frame in frames])
    is_grey = all(frame.grey_palette for frame in frames)
    return Scan(first.path, values, None, True, "", indices, is_grey, alpha, first.lossy)


def _read_frame(path: Path, source: Image.Image) -> Scan:
    few_bits = _factor_of_few_bits(path, source)
    lossy = source.format in LOSSY
    image = ImageOps.exif_transpose(source)
    has_alpha = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
    alpha = np.asarray(image.convert("RGBA"))[None, ..., 3] if has_alpha else None
    if image.mode == "P":
        is_grey = _is_grey(np.reshape(image.getpalette("RGB") or [], (-1, 3)))
        colours, indices = np.asarray(image.convert("RGB"))[None], np.asarray(image)[None]
        return Scan(path, colours, indices=indices, grey_palette=is_grey, alpha=alpha)
    if image.mode == "1":
        bits = np.asarray(image).astype(np.uint8)[None]
        return Scan(path, bits * np.uint8(255), indices=bits)
    if image.mode in ("L", "LA", "La"):
        grey = np.asarray(image.convert("L"))[None]
        return Scan(path, grey, indices=grey // few_bits if few_bits else None, alpha=alpha, lossy=lossy)
    if image.mode.startswith(("I", "F")):
        return Scan(path, np.asarray(image)[None])
    return Scan(path, np.asarray(image.convert("RGB"))[None], alpha=alpha, lossy=lossy)


def _is_grey(colours: np.ndarray) -> bool:
    return bool((colours == colours[:, :1]).all())


def _factor_of_few_bits(path: Path, image: Image.Image) -> int:
    """Returns the factor by which Pillow scaled 2-bit or 4-bit grey values to 8 bits; 0 for other images."""
    if image.format == "TIFF":
        bits, photometric = (image.tag_v2.get(tag) for tag in (258, 262))  # type: ignore[attr-defined]
        is_grey = photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO) and bits is not None
        return {2: 85, 4: 17}.get(bits[0], 0) if is_grey else 0
    if image.format != "PNG":
        return 0
    with path.open("rb") as file:
        depth, colour = struct.unpack("BB", file.read(26)[24:26])
    return {2: 85, 4: 17}.get(depth, 0) if colour == 0 else 0


def _check_pixels(path: Path, *size: int) -> None:
    if np.prod(size, dtype=np.int64) > MOST_PIXELS:
        raise UserError(
            f"{path} is {size[0]} x {size[1]} pixels, more than {MOST_PIXELS:,}; cut it into smaller pictures first."
        )
