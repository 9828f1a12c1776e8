"""What an application may give to ``predict()``, and how it becomes the head's input.

Accepted: a path, encoded bytes, a PIL image, or an array ``(H, W)``, ``(H, W, 1)``, ``(H, W, 3)`` or ``(H, W, 4)``,
uint8 or uint16. The image is made RGB, 8 bits a channel and, where its size differs, scaled to cover the head's size
and cropped in the middle. Of an animation it is the first frame. Pillow is needed only where something must be decoded
or resized.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from ensembler.protocol.errors import ImageError, MissingExtraError
from ensembler.protocol.manifest import ImageSpec
from ensembler.protocol.pixels import SIXTEEN_BIT_MODES, eight_bits, sixteen_to_eight_bits

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

Pixels = npt.NDArray[np.uint8]


@runtime_checkable
class PillowImage(Protocol):
    """A PIL image, without importing pillow: what has all of these is taken for one."""

    @property
    def mode(self) -> str:
        """Pillow's name of the pixels' format."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""

    def convert(self, mode: str) -> Any:
        """Returns the image in another format."""

    def resize(self, size: tuple[int, int]) -> Any:
        """Returns the image in another size."""


ImageLike: TypeAlias = str | os.PathLike[str] | bytes | PillowImage | npt.NDArray[Any]

MAX_ENCODED_BYTES = 64 * 1024 * 1024
MAX_PIXELS = 64 * 1024 * 1024
# Of pillow's modes: one to four channels of at most 8 bits.
_EIGHT_BIT_MODES = frozenset(
    {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"}
)


def to_pixels(image: ImageLike, spec: ImageSpec) -> Pixels:
    """Returns the head's input for one image.

    Args:
        image: see the module's text.
        spec: the head's height and width.

    Returns:
        ``(H, W, 3)`` uint8 RGB.

    Raises:
        ImageError: unreadable, too large, or an array of another dtype or shape.
        MissingExtraError: pillow is needed and not installed.
    """
    if isinstance(image, np.ndarray):
        pixels = _array(image)
        if pixels.shape[:2] == (spec.height, spec.width):
            return pixels
        return _fit(_pillow("resizing an image").fromarray(pixels), spec, "the array")
    if isinstance(image, bytes | bytearray | memoryview):
        return _fit(_decode(bytes(image), "the image bytes"), spec, "the image bytes")
    if isinstance(image, str | os.PathLike):
        path = os.fsdecode(image)
        if not path:
            raise ImageError("an empty text is no path; give that of an image file")
        return _fit(_open(Path(path)), spec, path)
    if isinstance(image, PillowImage):
        return _fit(image, spec, "the PIL image")
    raise ImageError(
        f"an image is a path, bytes, a PIL image or an array of uint8 or uint16, not {type(image).__name__}"
    )


def all_pixels(images: Sequence[ImageLike], spec: ImageSpec) -> list[Pixels]:
    """Returns the head's inputs for several images; errors as ``to_pixels``, and of several they say which one."""
    pixels = []
    for index, image in enumerate(images):
        try:
            pixels.append(to_pixels(image, spec))
        except ImageError as error:
            raise error if len(images) == 1 else nth(index, error) from error.__cause__
    return pixels


def nth(index: int, error: ImageError) -> ImageError:
    """Returns an error about one of several images that says which."""
    return ImageError(f"images[{index}]: {error}")


def several(images: Iterable[ImageLike]) -> Iterator[ImageLike]:
    """Returns an iterator over images; a single image is refused, whose letters, bytes or rows would be taken for some.

    Raises:
        ImageError: one image, or nothing to iterate over.
    """
    if isinstance(images, list | tuple):  # the usual case; the others take a while to tell apart
        return iter(images)
    one = isinstance(images, str | bytes | bytearray | memoryview | os.PathLike | PillowImage)
    if isinstance(images, np.ndarray):
        one = images.ndim < 3 or (images.ndim == 3 and images.shape[2] in (1, 3, 4))
    if one or not isinstance(images, Iterable):
        raise ImageError(f"several images are an iterable of them, not {type(images).__name__}; for one give [image]")
    return iter(images)


def _array(array: npt.NDArray[Any]) -> Pixels:
    """Returns ``(H, W, 3)`` uint8 of an array: grey is repeated, alpha dropped, 16 bits are scaled to 8."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ImageError(f"the image array is {array.dtype} and holds NaN or infinity; mend that, then give uint8")
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        whole = array.dtype.kind in "iu"
        example = "x.astype('uint8') for x in 0..255" if whole else "(255 * x).round().astype('uint8') for x in 0..1"
        raise ImageError(
            f"the image array is {array.dtype}; give uint8 in 0..255 (or uint16 in 0..65535), for instance {example}"
        )
    shape = array.shape
    if 0 in shape or array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        first = array.ndim == 3 and shape[0] in (1, 3, 4) and 0 not in shape
        cure = "; this one looks channels first: give x.transpose(1, 2, 0)" if first else ""
        raise ImageError(
            f"the image array has shape {shape}; give (H, W, 3), channels last, RGB, or (H, W), (H, W, 1), (H, W, 4)"
            + cure
        )
    _check_size(shape[1], shape[0], "the image array")
    pixels = array if array.dtype == np.uint8 else eight_bits(array)
    if pixels.ndim == 2 or shape[2] == 1:
        return np.repeat(pixels.reshape(*shape[:2], 1), 3, axis=2)
    return pixels[:, :, :3]


def _check_size(width: int, height: int, source: str) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise ImageError(
            f"{source}: {width}x{height} pixels; "
            + (f"shrink it below {MAX_PIXELS} pixels" if width * height else "an image has at least one")
        )


def _open(path: Path) -> PILImage:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe or a device may never end
            raise ImageError(f"{path} is not a file; give the path of an image, or its bytes")
        if found.st_size > MAX_ENCODED_BYTES:
            raise ImageError(f"{path} is larger than {MAX_ENCODED_BYTES} bytes; shrink the image first")
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ImageError(f"{str(path)!r} is not a path: {error}") from error
    return _decode(data, str(path))


def _decode(data: bytes, source: str) -> PILImage:
    pillow = _pillow("decoding an image")
    if not data:
        raise ImageError(f"{source}: empty, not an image")
    try:
        image: PILImage = pillow.open(io.BytesIO(data))
        _check_size(image.width, image.height, source)
        if image.format == "EPS":  # pillow would run Ghostscript on it
            raise ImageError(f"{source}: PostScript is a program, not an image; convert it to PNG or JPEG")
        image.load()
    except ImageError:
        raise
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise ImageError(f"{source}: too many pixels; shrink the image first") from error
    except Exception as error:  # decoders raise many classes on damaged files
        raise ImageError(f"{source}: not a readable image ({type(error).__name__}); is it complete?") from error
    return image


def _fit(image: Any, spec: ImageSpec, source: str) -> Pixels:
    """Makes a PIL image RGB and of the head's size: upright, scaled to cover, cropped in the middle."""
    from PIL import Image, ImageOps

    if image.mode not in _EIGHT_BIT_MODES | SIXTEEN_BIT_MODES:
        raise ImageError(
            f"{source}: mode {image.mode} has no fixed range of values; scale it to 0..255, convert it to mode L"
        )
    _check_size(image.width, image.height, source)
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in SIXTEEN_BIT_MODES:
            upright = Image.fromarray(sixteen_to_eight_bits(upright, source))
        if upright.mode == "P":  # a palette with transparency goes to RGB by way of RGBA only
            upright = upright.convert("RGBA")
        upright = upright.convert("RGB")
        size = (spec.width, spec.height)
        if upright.size != size:
            upright = ImageOps.fit(upright, size, Image.Resampling.BILINEAR)
        return np.asarray(upright)
    except ImageError:
        raise
    except Exception as error:  # as in _decode
        raise ImageError(f"{source}: cannot be converted to RGB ({type(error).__name__}: {error})") from error


def _pillow(purpose: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "image", purpose) from error
    return Image
