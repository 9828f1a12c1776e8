"""Data sets: ``--data SPEC`` to arrays.

============================  =====================================================================
``demo``                      patches of public-domain photographs, see ``demo_data``
``cifar10:PATH``              CIFAR-10 as its authors distribute it: the python or binary archive,
``cifar100:PATH``             packed (.tar.gz) or unpacked
``folder:PATH``               ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg`` (any format pillow reads)
``npz:TRAIN,TEST``            two .npz files with ``x`` (N, 3, H, W) uint8 and ``y`` (N,) integers
============================  =====================================================================

A bare path is looked at and taken for what it is.
"""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensembler.protocol.errors import DataError, ImageError, MissingExtraError
from ensembler.protocol.manifest import MAX_LABEL_CHARACTERS, MAX_LABELS
from ensembler.protocol.pixels import SIXTEEN_BIT_MODES, sixteen_to_eight_bits
from ensembler.training import demo_data

Pixels = npt.NDArray[np.uint8]
Classes = npt.NDArray[np.int64]

CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
MAX_ARCHIVE_MEMBER_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images and labels, in memory.

    Attributes:
        train_x: ``(N, 3, H, W)`` uint8 RGB.
        train_y: ``(N,)`` int64 in 0..K-1.
        test_x: held-out images, as ``train_x``.
        test_y: their labels.
        labels: K class names.
    """

    train_x: Pixels
    train_y: Classes
    test_x: Pixels
    test_y: Classes
    labels: tuple[str, ...]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (int(self.train_x.shape[2]), int(self.train_x.shape[3]))


def load(spec: str) -> Dataset:
    """Loads the data set that ``spec`` names.

    Args:
        spec: see the module's table.

    Raises:
        DataError: unknown, unreadable, empty or inconsistent, with the path and the cure.
        MissingExtraError: pillow or scikit-image is needed and not installed.
    """
    kind, _, rest = spec.partition(":")
    if kind == "demo" and not rest:
        dataset = _demo()
    elif kind in ("cifar10", "cifar100") and rest:
        dataset = _cifar(Path(rest).expanduser(), hundred=kind == "cifar100")
    elif kind == "folder" and rest:
        dataset = _folder(Path(rest).expanduser())
    elif kind == "npz" and rest.count(",") == 1:
        train, test = rest.split(",")
        dataset = _npz(Path(train).expanduser(), Path(test).expanduser())
    else:
        dataset = load(_guess(Path(spec).expanduser(), spec))
    dataset = _checked(dataset, spec)
    return _shuffled(dataset) if kind in ("folder", "npz") else dataset


def _guess(path: Path, spec: str) -> str:
    if (path / "train.npz").is_file() and (path / "test.npz").is_file():
        return f"npz:{path / 'train.npz'},{path / 'test.npz'}"
    if (path / "train").is_dir() and (path / "test").is_dir():
        return f"folder:{path}"
    name = path.name.lower()
    if path.exists() and "cifar" in name:
        return f"cifar100:{path}" if "100" in name else f"cifar10:{path}"
    raise DataError(
        f"--data {spec}: not a data set; give demo, cifar10:PATH, cifar100:PATH, folder:PATH (train/CLASS/x.jpg, "
        "test/CLASS/x.jpg) or npz:TRAIN.npz,TEST.npz"
    )


def _shuffled(data: Dataset) -> Dataset:
    """Puts the train images into a fixed random order: files come sorted by class, the first images calibrate."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(data.train_y))
    return replace(data, train_x=data.train_x[order], train_y=data.train_y[order])


def _checked(data: Dataset, spec: str) -> Dataset:
    _check_labels(data.labels, spec)
    for part, x, y in (("train", data.train_x, data.train_y), ("test", data.test_x, data.test_y)):
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1] != 3:
            raise DataError(f"--data {spec}: the {part} images are {x.dtype} {x.shape}, not uint8 (N, 3, H, W)")
        if len(x) == 0 or y.shape != (len(x),):
            raise DataError(f"--data {spec}: {len(x)} {part} images and labels of shape {y.shape}")
        if int(y.min()) < 0 or int(y.max()) >= len(data.labels):
            raise DataError(f"--data {spec}: a {part} label is outside 0..{len(data.labels) - 1}")
    if data.train_x.shape[1:] != data.test_x.shape[1:]:
        raise DataError(
            f"--data {spec}: train images have shape {data.train_x.shape[1:]}, test images {data.test_x.shape[1:]}"
        )
    if len(np.unique(data.train_y)) < 2:
        raise DataError(f"--data {spec}: the train images are all of one class; a classifier needs two or more")
    return data


def _check_labels(labels: tuple[str, ...], spec: str) -> None:
    """Refuses now what no bundle could hold, no terminal could show, or nobody could tell apart."""
    if len(labels) > MAX_LABELS:
        raise DataError(f"--data {spec}: {len(labels)} class names; at most {MAX_LABELS}")
    for label in labels:
        shown = repr(label[:40])  # as escapes, whatever is in it
        if not label.strip():
            raise DataError(f"--data {spec}: a class name is empty; give each class a name")
        if not label.isprintable():
            raise DataError(f"--data {spec}: the class name {shown} has a character that cannot be printed; rename it")
        if len(label) > MAX_LABEL_CHARACTERS:
            raise DataError(
                f"--data {spec}: the class name {shown}... has {len(label)} characters; at most {MAX_LABEL_CHARACTERS}"
            )
    if len(set(labels)) != len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise DataError(f"--data {spec}: two classes have the name {twice[:40]!r}; rename one")


# --- demo ---


def cache_folder() -> Path:
    """Returns where built data sets are kept: ``$XDG_CACHE_HOME/ensembler``, or ``~/.cache/ensembler``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ensembler"


def _demo() -> Dataset:
    names = ("train_x", "train_y", "test_x", "test_y")
    path = cache_folder() / f"{demo_data.CACHE_TAG}.npz"
    try:
        arrays = _arrays(path, names)
    except DataError:
        arrays = dict(zip(names, demo_data.build(), strict=True))
        _store(path, arrays)
    return Dataset(
        train_x=arrays["train_x"],
        train_y=arrays["train_y"],
        test_x=arrays["test_x"],
        test_y=arrays["test_y"],
        labels=demo_data.labels(),
    )


def _store(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Writes the cache whole or not at all; a read-only home only costs the second it takes to build again."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as stream:
            temporary = Path(stream.name)
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        temporary.replace(path)
    except OSError:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


# --- CIFAR ---


class _ArrayUnpickler(pickle.Unpickler):
    """Reads the pickles of CIFAR's python archives and nothing else: plain containers and numpy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        ):
            return np.ndarray.__reduce__(np.zeros(0))[0]
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        raise DataError(f"the archive's pickle asks for {module}.{name}: this is not a CIFAR file; nothing was run")


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise DataError("the archive's pickle asks for an encoding that CIFAR files do not use")
    return text.encode("latin1")


def _cifar(path: Path, *, hundred: bool) -> Dataset:
    files = _Files(path)
    train_names: tuple[str, ...]
    binary_train: tuple[str, ...]
    if hundred:
        train_names, test_names = ("train",), ("test",)
        binary_train, binary_test = ("train.bin",), ("test.bin",)
        meta, label_key, label_bytes = "meta", b"fine_labels", 2
    else:
        train_names, test_names = tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)
        binary_train = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
        binary_test = ("test_batch.bin",)
        meta, label_key, label_bytes = "batches.meta", b"labels", 1
    if files.has(train_names[0]):
        train, test = (
            [_cifar_pickle(files.read(name), label_key, files.where(name)) for name in names]
            for names in (train_names, test_names)
        )
        labels = _cifar_names(files, meta, hundred=hundred)
    elif files.has(binary_train[0]):
        train, test = (
            [_cifar_binary(files.read(name), label_bytes, files.where(name)) for name in names]
            for names in (binary_train, binary_test)
        )
        labels = _cifar_text_names(files, hundred=hundred)
    else:
        raise DataError(
            f"{path}: neither {train_names[0]} nor {binary_train[0]} is in it; give the CIFAR-{100 if hundred else 10} "
            "archive (.tar.gz) or the folder it unpacks to"
        )
    return Dataset(
        train_x=np.concatenate([x for x, _ in train]),
        train_y=np.concatenate([y for _, y in train]),
        test_x=np.concatenate([x for x, _ in test]),
        test_y=np.concatenate([y for _, y in test]),
        labels=labels,
    )


class _Files:
    """The files of an archive or a folder by their base name; nothing is unpacked to disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: Callable[[str], bytes]
        if path.is_dir():
            self._names = {p.name: p for p in sorted(path.rglob("*")) if p.is_file()}
            self._contents: dict[str, bytes] = {}
        elif path.is_file():
            self._names = {}
            self._contents = dict(_members(path))
        else:
            raise DataError(f"{path} does not exist; download the archive from the authors' page and give its path")

    def has(self, name: str) -> bool:
        return name in self._contents or name in self._names

    def where(self, name: str) -> str:
        return f"{self.path}: {name}"

    def read(self, name: str) -> bytes:
        if name in self._contents:
            return self._contents[name]
        if name in self._names:
            return self._names[name].read_bytes()
        raise DataError(f"{self.path}: {name} is missing; the archive is incomplete, download it again")


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    if member.size > MAX_ARCHIVE_MEMBER_BYTES:
                        raise DataError(f"{path}: {member.name} is larger than any CIFAR file")
                    stream = archive.extractfile(member)
                    if stream is not None:
                        yield Path(member.name).name, stream.read()
            # The checksum of the compressed stream comes after the last file.
            while archive.fileobj.read(1 << 20):
                pass
    except DataError:
        raise
    except Exception as error:  # a damaged archive can raise zlib.error, EOFError, TarError, ...
        if isinstance(error, OSError) and error.errno:  # a damaged one has none
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        raise DataError(
            f"{path} is not a readable archive; give the folder of the CIFAR files, or their .tar.gz, downloaded again"
        ) from error


def _cifar_pickle(data: bytes, label_key: bytes, where: str) -> tuple[Pixels, Classes]:
    batch = _unpickle(data, where)
    pixels, classes = batch.get(b"data"), batch.get(label_key)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
        raise DataError(f"{where} holds no (N, 3072) uint8 images; download it again")
    labels = np.asarray(classes)
    if labels.shape != (len(pixels),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where} holds no {label_key.decode()} for its {len(pixels)} images; download it again")
    return pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64)


def _unpickle(data: bytes, where: str) -> dict[bytes, Any]:
    try:
        batch = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{where} is damaged; download the archive again") from error
    if not isinstance(batch, dict):
        raise DataError(f"{where} is not a CIFAR file")
    return batch


def _cifar_names(files: _Files, meta: str, *, hundred: bool) -> tuple[str, ...]:
    if files.has(meta):
        names = _unpickle(files.read(meta), files.where(meta)).get(b"fine_label_names" if hundred else b"label_names")
        if isinstance(names, list):
            return tuple(n.decode(errors="replace") if isinstance(n, bytes) else str(n) for n in names)
    return _default_names(hundred=hundred)


def _cifar_text_names(files: _Files, *, hundred: bool) -> tuple[str, ...]:
    name = "fine_label_names.txt" if hundred else "batches.meta.txt"
    if files.has(name):
        lines = files.read(name).decode(errors="replace").splitlines()
        return tuple(line.strip() for line in lines if line.strip())
    return _default_names(hundred=hundred)


def _default_names(*, hundred: bool) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in range(100)) if hundred else CIFAR10_LABELS


def _cifar_binary(data: bytes, label_bytes: int, where: str) -> tuple[Pixels, Classes]:
    record = label_bytes + 3072
    if not data or len(data) % record:
        raise DataError(f"{where} has {len(data)} bytes, not a multiple of {record}; download the archive again")
    rows = np.frombuffer(data, np.uint8).reshape(-1, record)
    return rows[:, label_bytes:].reshape(-1, 3, 32, 32).copy(), rows[:, label_bytes - 1].astype(np.int64)


# --- image folders ---


def _folder(path: Path) -> Dataset:
    labels = tuple(sorted(p.name for p in _subfolders(path / "train")))
    size: tuple[int, int] | None = None
    parts = []
    for part in ("train", "test"):
        extra = {p.name for p in _subfolders(path / part)} - set(labels)
        if extra:
            raise DataError(f"{path / part}: the class {sorted(extra)[0]!r} has no folder in {path / 'train'}")
        images, classes = [], []
        for index, label in enumerate(labels):
            files = sorted(p for p in (path / part / label).glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not files:
                raise DataError(f"{path / part / label} holds no image; remove the class or add images")
            for file in files:
                pixels = _image(file, size)
                size = size or (pixels.shape[1], pixels.shape[2])
                images.append(pixels)
                classes.append(index)
        parts.append((np.stack(images), np.asarray(classes, np.int64)))
    (train_x, train_y), (test_x, test_y) = parts
    return Dataset(train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y, labels=labels)


def _subfolders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; an image folder has train/CLASS/x.jpg and test/CLASS/x.jpg")
    found = [p for p in path.iterdir() if p.is_dir()]
    if not found:
        raise DataError(f"{path} has no class folders; an image folder has train/CLASS/x.jpg and test/CLASS/x.jpg")
    return found


def _image(path: Path, size: tuple[int, int] | None) -> Pixels:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "image", "an image folder") from error
    try:
        with Image.open(path) as image:
            deep = image.mode in SIXTEEN_BIT_MODES
            plain = Image.fromarray(sixteen_to_eight_bits(image, str(path))) if deep else image
            pixels = np.asarray(plain.convert("RGB")).transpose(2, 0, 1)
    except ImageError as error:
        raise DataError(str(error)) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not a readable image; remove or replace it") from error
    if size is not None and pixels.shape[1:] != size:
        raise DataError(
            f"{path} is {pixels.shape[1]}x{pixels.shape[2]} pixels, the first image {size[0]}x{size[1]}; "
            "resize the images to one size"
        )
    return pixels


# --- npz pairs ---


def _npz(train: Path, test: Path) -> Dataset:
    (train_x, train_y, labels), (test_x, test_y, held_out) = (_npz_part(path) for path in (train, test))
    if labels is not None and held_out is not None and labels != held_out:
        raise DataError(
            f"{test}: label_names are not those of {train}, so a number means another class in each; "
            "write both with the same names in the same order"
        )
    if labels is None:
        count = int(max(train_y.max(initial=0), test_y.max(initial=0))) + 1
        if count > MAX_LABELS:
            raise DataError(f"{train}, {test}: the label {count - 1} is not a class number below {MAX_LABELS}")
        labels = tuple(str(i) for i in range(count))
    return Dataset(train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y, labels=labels)


def _npz_part(path: Path) -> tuple[Pixels, Classes, tuple[str, ...] | None]:
    stored = _arrays(path, ("x", "y"), ("label_names",))
    x, y = stored["x"], stored["y"]
    if not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"{path}: y is {y.dtype}, not integers")
    names = tuple(str(n) for n in stored["label_names"].reshape(-1)) if "label_names" in stored else None
    return x, y.astype(np.int64), names


def _arrays(path: Path, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, npt.NDArray[Any]]:
    """Reads arrays of an .npz by name; those of ``optional`` may be missing."""
    try:
        # np.load given a path leaves the file open when the archive is damaged.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            held = sorted(stored)
            arrays = {name: stored[name] for name in (*needed, *optional) if name in held}
    except Exception as error:  # a damaged archive can raise zlib.error, BadZipFile, NotImplementedError, ...
        raise DataError(f"{path} cannot be read as .npz ({error})") from error
    if not arrays.keys() >= set(needed):
        raise DataError(f"{path} needs the arrays {', '.join(needed)}, it holds {held}")
    return arrays
