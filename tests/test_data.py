"""Data sets: every format that ``--data`` reads, and what it says about files that it cannot read."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ensembler.protocol.errors import DataError
from ensembler.training import data, demo_data
from ensembler.training.data import load

ROOT = Path(__file__).resolve().parent.parent


def random_images(count, seed=0, height=32, width=32):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, height, width), dtype=np.uint8)


def save_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


# --- demo ---


@pytest.fixture
def few_demo_images(monkeypatch, tmp_path):
    """Makes building the demo data quick, and its cache this test's own; returns the cache's path."""
    monkeypatch.setattr(demo_data, "TRAIN_PER_CLASS", 5)
    monkeypatch.setattr(demo_data, "TEST_PER_CLASS", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ensembler" / f"{demo_data.CACHE_TAG}.npz"


def same(a, b):
    return a.labels == b.labels and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("train_x", "train_y", "test_x", "test_y")
    )


def test_demo_data_has_the_documented_shapes_and_all_six_classes(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    demo = load("demo")
    assert demo.labels == ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")
    assert demo.train_x.shape == (6000, 3, 32, 32)
    assert demo.test_x.shape == (1200, 3, 32, 32)
    assert demo.train_x.dtype == demo.test_x.dtype == np.uint8
    assert demo.train_y.dtype == demo.test_y.dtype == np.int64
    assert np.bincount(demo.train_y).tolist() == [1000] * 6
    assert np.bincount(demo.test_y).tolist() == [200] * 6
    assert demo.image_size == (32, 32)
    assert len(np.unique(demo.train_y[:50])) > 1, "the classes are not shuffled"


def test_demo_data_is_the_same_each_time_it_is_built(few_demo_images):
    for first, second in zip(demo_data.build(), demo_data.build(), strict=True):
        np.testing.assert_array_equal(first, second)


def test_no_pixel_is_in_a_train_and_in_a_test_block():
    height, width = 330, 470  # not multiples of the block
    photo = np.arange(height * width * 3).reshape(height, width, 3)  # every value is the only one of its kind
    train, test = demo_data.split_blocks(photo, np.random.default_rng(0))
    assert len(train) + len(test) == (330 // 64) * (470 // 64)
    assert len(test) == -(-(len(train) + len(test)) // 5)
    assert all(block.shape == (64, 64, 3) for block in (*train, *test))
    pixels = np.concatenate([block.ravel() for block in (*train, *test)])
    assert len(np.unique(pixels)) == len(pixels)


def test_blocks_without_structure_are_left_out():
    photo = np.zeros((64, 192, 3), np.uint8)
    photo[:, 64:128] = random_images(1, height=64, width=64)[0].transpose(1, 2, 0)
    train, test = demo_data.split_blocks(photo, np.random.default_rng(0))
    assert len(train) + len(test) == 1


def test_the_demo_cache_is_written_and_used(few_demo_images):
    built = load("demo")
    assert few_demo_images.is_file()
    assert [p.name for p in few_demo_images.parent.iterdir()] == [few_demo_images.name]
    assert same(load("demo"), built)
    with np.load(few_demo_images) as stored:
        arrays = dict(stored)
    arrays["test_x"] = 255 - arrays["test_x"]
    np.savez(few_demo_images, **arrays)
    np.testing.assert_array_equal(load("demo").test_x, 255 - built.test_x)


def damaged(content, how):
    middle = len(content) // 2
    return {
        "empty": b"",
        "text": b"not an archive",
        "cut short": content[:middle],
        "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "one array": b"\x93NUMPY" + content[:100],
        "a pickle": pickle.dumps({"train_x": 1}),
    }[how]


@pytest.mark.parametrize("how", ["empty", "text", "cut short", "one bit", "one array", "a pickle"])
def test_a_damaged_demo_cache_is_built_again(few_demo_images, how):
    built = load("demo")
    content = few_demo_images.read_bytes()
    few_demo_images.write_bytes(damaged(content, how))
    assert same(load("demo"), built)
    assert few_demo_images.read_bytes() == content


def test_a_demo_cache_that_lacks_an_array_is_built_again(few_demo_images):
    built = load("demo")
    np.savez(few_demo_images, train_x=built.train_x)
    assert same(load("demo"), built)


def test_a_cache_folder_that_cannot_be_made_only_costs_time(few_demo_images, monkeypatch, tmp_path):
    built = load("demo")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert same(load("demo"), built)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_folder_only_costs_time(few_demo_images):
    few_demo_images.parent.mkdir(parents=True)
    few_demo_images.parent.chmod(0o500)
    load("demo")
    assert not few_demo_images.exists()


def test_without_xdg_the_cache_is_below_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.cache_folder() == tmp_path / ".cache" / "ensembler"


# --- CIFAR: archives as the authors made them, small ---


def python2_pickle(entries):
    """Returns what Python 2's cPickle wrote for a dict of lists, byte strings and one uint8 array (protocol 2)."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def number(value):
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    def array(value):
        dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|")
        dtype += b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
        start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        shape = b"".join(number(n) for n in value.shape) + b"\x86"
        content = b"T" + struct.pack("<I", value.size) + value.tobytes()
        return start + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb"

    out = b"\x80\x02}("
    for key, value in entries.items():
        out += text(key)
        if isinstance(value, np.ndarray):
            out += array(value)
        else:
            out += b"](" + b"".join(text(v) if isinstance(v, bytes) else number(v) for v in value) + b"e"
    return out + b"u."


def python3_pickle(entries):
    return pickle.dumps(entries, protocol=2)


class Cifar:
    """A small CIFAR-10 or CIFAR-100: the files of its archives, and what must be read from them."""

    def __init__(self, classes):
        self.classes = classes
        self.ten = classes == 10
        sizes = [2, 3, 2, 2, 2, 4] if self.ten else [7, 4]
        self.batches = [
            (random_images(n, seed=i), np.random.default_rng(i).permutation(classes)[:n]) for i, n in enumerate(sizes)
        ]
        self.names = [f"name {i}" for i in range(classes)]
        self.folder = {10: "cifar-10-batches-{}", 100: "cifar-100-{}"}[classes]
        self.archive = {10: "cifar-10-{}.tar.gz", 100: "cifar-100-{}.tar.gz"}[classes]

    def python_files(self, dump):
        files = {}
        parts = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if self.ten else ["train", "test"]
        for part, (x, y) in zip(parts, self.batches, strict=True):
            labels = [int(label) for label in y]
            entries = {b"batch_label": [b"a batch"], b"data": x.reshape(len(x), -1)}
            entries |= {b"labels": labels} if self.ten else {b"fine_labels": labels, b"coarse_labels": [0] * len(y)}
            files[part] = dump(entries)
        names = [name.encode() for name in self.names]
        key = b"label_names" if self.ten else b"fine_label_names"
        files["batches.meta" if self.ten else "meta"] = dump({key: names})
        files["readme.html"] = b"<html>"
        return files

    def binary_files(self):
        files = {}
        parts = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"] if self.ten else ["train.bin"]
        parts = parts if self.ten else ["train.bin", "test.bin"]
        for part, (x, y) in zip(parts, self.batches, strict=True):
            coarse = b"" if self.ten else b"\x07"
            rows = zip(x, y, strict=True)
            files[part] = b"".join(coarse + bytes([label]) + image.tobytes() for image, label in rows)
        text = "\n".join(self.names) + "\n\n"
        files["batches.meta.txt" if self.ten else "fine_label_names.txt"] = text.encode()
        return files

    def files(self, form):
        if form == "binary":
            return self.binary_files()
        return self.python_files(python2_pickle if form == "python 2" else python3_pickle)

    def write(self, root, files, *, packed, word="py"):
        """Stores ``files`` packed or unpacked and returns the path to give to ``--data``."""
        folder = self.folder.format(word)
        if not packed:
            (root / folder).mkdir()
            for name, content in files.items():
                (root / folder / name).write_bytes(content)
            return root / folder
        path = root / self.archive.format(word)
        with tarfile.open(path, "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(f"{folder}/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return path

    def check(self, dataset):
        train_x, train_y = (np.concatenate(parts) for parts in zip(*self.batches[:-1], strict=True))
        np.testing.assert_array_equal(dataset.train_x, train_x)
        np.testing.assert_array_equal(dataset.train_y, train_y)
        np.testing.assert_array_equal(dataset.test_x, self.batches[-1][0])
        np.testing.assert_array_equal(dataset.test_y, self.batches[-1][1])
        assert dataset.labels == tuple(self.names)


every_cifar = pytest.mark.parametrize("classes", [10, 100])


@every_cifar
@pytest.mark.parametrize("form", ["python 2", "python 3", "binary"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
def test_cifar_is_read_in_every_form(tmp_path, classes, form, packed):
    cifar = Cifar(classes)
    path = cifar.write(tmp_path, cifar.files(form), packed=packed)
    cifar.check(load(f"cifar{classes}:{path}"))
    cifar.check(load(str(path)))  # a bare path is taken for what it is


@every_cifar
def test_a_folder_above_the_unpacked_one_may_be_given(tmp_path, classes):
    cifar = Cifar(classes)
    cifar.write(tmp_path, cifar.files("python 2"), packed=False)
    cifar.check(load(f"cifar{classes}:{tmp_path}"))


@every_cifar
@pytest.mark.parametrize("form", ["python 2", "binary"])
def test_without_the_file_of_names_default_names_are_given(tmp_path, classes, form):
    cifar = Cifar(classes)
    files = {name: content for name, content in cifar.files(form).items() if "meta" not in name and "names" not in name}
    labels = load(f"cifar{classes}:{cifar.write(tmp_path, files, packed=False)}").labels
    assert len(labels) == classes
    assert (labels[3] == "cat") == (classes == 10)


def test_names_that_are_not_utf8_are_read_all_the_same(tmp_path):
    cifar = Cifar(10)
    files = cifar.files("python 2")
    files["batches.meta"] = python2_pickle({b"label_names": [b"caf\xe9 %d" % index for index in range(10)]})
    labels = tuple(f"caf� {index}" for index in range(10))
    assert load(f"cifar10:{cifar.write(tmp_path, files, packed=False)}").labels == labels


class Call:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def malicious_pickles(marker):
    touch = f"touch {marker}"
    calls = {
        "os.system": Call(os.system, touch),
        "eval": Call(builtins.eval, f"open({str(marker)!r}, 'w')"),
        "exec": Call(builtins.exec, f"open({str(marker)!r}, 'w')"),
        "subprocess": Call(subprocess.check_call, ["touch", str(marker)]),
        "numpy.save": Call(np.save, str(marker), [1]),
        "getattr": Call(getattr, np.ndarray, "tofile"),
        "inside an object array": np.array([Call(os.system, touch)], object),
    }
    pickles = {
        f"{name}, protocol {protocol}": pickle.dumps({b"data": call, b"labels": []}, protocol)
        for name, call in calls.items()
        for protocol in (0, 2, 4, 5)
    }
    argument = pickle.dumps(touch, 0)[:-1]
    pickles["a bare GLOBAL"] = b"cposix\nsystem\n(" + argument + b"tR."
    pickles["a dotted name below an allowed one"] = (
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93(" + argument + b"tR."
    )
    pickles["INST"] = b"(" + argument + b"iposix\nsystem\n."
    return pickles


@pytest.mark.parametrize("what", malicious_pickles("x"))
def test_a_pickle_that_calls_anything_is_refused_and_nothing_runs(tmp_path, what):
    marker = tmp_path / "marker"
    cifar = Cifar(10)
    files = cifar.files("python 2")
    files["data_batch_1"] = malicious_pickles(marker)[what]
    path = cifar.write(tmp_path, files, packed=True)
    with pytest.raises(DataError, match="nothing was run"):
        load(f"cifar10:{path}")
    assert not marker.exists()


def test_the_malicious_pickles_of_these_tests_would_do_harm(tmp_path):
    pickle.loads(malicious_pickles(tmp_path / "marker")["os.system, protocol 2"])
    assert (tmp_path / "marker").exists()


def test_a_pickle_cannot_encode_with_any_codec(tmp_path):
    cifar = Cifar(10)
    files = cifar.files("python 2") | {
        "data_batch_1": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R."
    }
    with pytest.raises(DataError, match="encoding"):
        load(f"cifar10:{cifar.write(tmp_path, files, packed=False)}")


IMAGES = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        b"\x80\x02}.",
        b"\x80\x02].",
        pickle.dumps([1, 2], 2),
        python3_pickle({b"data": IMAGES}),
        python3_pickle({b"labels": [1, 2]}),
        python3_pickle({b"data": b"text", b"labels": [1, 2]}),
        python3_pickle({b"data": IMAGES.astype(np.float32), b"labels": [1, 2]}),
        python3_pickle({b"data": IMAGES[:, :3000], b"labels": [1, 2]}),
        python3_pickle({b"data": IMAGES[0, 0], b"labels": [1, 2]}),
        python3_pickle({b"data": IMAGES, b"labels": [1, 2, 3]}),
        python3_pickle({b"data": IMAGES, b"labels": [1]}),
        python3_pickle({b"data": IMAGES, b"labels": 1}),
        python3_pickle({b"data": IMAGES, b"labels": [[1], [2]]}),
        python3_pickle({b"data": IMAGES, b"labels": [b"cat", b"dog"]}),
        python3_pickle({b"data": IMAGES, b"labels": [1.5, 2.5]}),
        python3_pickle({b"data": IMAGES, b"labels": [None, None]}),
        python3_pickle({b"data": IMAGES, b"labels": [2**70, 1]}),
        python3_pickle({b"data": IMAGES, b"labels": [1, 10]}),
        python3_pickle({b"data": IMAGES, b"labels": [1, -1]}),
        python3_pickle({b"data": IMAGES, b"fine_labels": [1, 2]}),
    ],
)
def test_a_batch_that_is_not_cifars_is_refused(tmp_path, content):
    cifar = Cifar(10)
    path = cifar.write(tmp_path, cifar.files("python 2") | {"data_batch_2": content}, packed=False)
    with pytest.raises(DataError):
        load(f"cifar10:{path}")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_archive_is_refused(tmp_path, share):
    cifar = Cifar(10)
    path = cifar.write(tmp_path, cifar.files("python 2"), packed=True)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"cifar-10-py\.tar\.gz"):
        load(f"cifar10:{path}")


@every_cifar
def test_a_truncated_batch_is_refused_by_name(tmp_path, classes):
    cifar = Cifar(classes)
    for form in ("python 2", "binary"):
        files = cifar.files(form)
        name = next(name for name in files if "test" in name)
        files[name] = files[name][:-1]
        folder = tmp_path / form
        folder.mkdir()
        with pytest.raises(DataError, match=f"{name}.*download the archive again"):
            load(f"cifar{classes}:{cifar.write(folder, files, packed=True)}")


def test_a_damaged_archive_is_read_or_refused(tmp_path):
    cifar = Cifar(100)
    path = cifar.write(tmp_path, cifar.files("python 2"), packed=True)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        changed = bytearray(content)
        changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        try:
            load(f"cifar100:{path}")
        except DataError:
            refused += 1
    assert refused > 90


@pytest.mark.parametrize("missing", ["data_batch_1", "data_batch_4", "test_batch"])
def test_an_incomplete_archive_is_refused_by_the_missing_file(tmp_path, missing):
    cifar = Cifar(10)
    files = cifar.files("python 2")
    del files[missing]
    with pytest.raises(DataError, match=missing):
        load(f"cifar10:{cifar.write(tmp_path, files, packed=True)}")


def test_an_archive_that_may_not_be_read_is_not_said_to_be_damaged(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    cifar = Cifar(10)
    path = cifar.write(tmp_path, cifar.files("python 2"), packed=True)
    monkeypatch.setattr(tarfile, "open", refused)
    with pytest.raises(DataError, match=r"cannot be read: Permission denied$"):
        load(f"cifar10:{path}")


def test_the_other_cifars_archive_is_refused(tmp_path):
    cifar = Cifar(100)
    path = cifar.write(tmp_path, cifar.files("python 2"), packed=True)
    with pytest.raises(DataError, match="give the CIFAR-10 archive"):
        load(f"cifar10:{path}")


def test_a_missing_archive_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load(f"cifar10:{tmp_path / 'cifar-10-python.tar.gz'}")


# --- image folders ---


def write_image(path, seed=0, height=16, width=20, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random_images(1, seed, height, width)[0].transpose(1, 2, 0)
    Image.fromarray(pixels).convert(mode).save(path)
    return pixels.transpose(2, 0, 1)


@pytest.fixture
def image_folder(tmp_path):
    """An image folder with classes ``bird`` and ``cat``, three train and two test images each, 16x20 pixels."""
    root = tmp_path / "images"
    for c, label in enumerate(("cat", "bird")):
        for i in range(3):
            write_image(root / "train" / label / f"{i}.png", seed=10 * c + i)
        for i in range(2):
            write_image(root / "test" / label / f"{i}.png", seed=100 + 10 * c + i)
    return root


def test_an_image_folder_is_read_pixel_by_pixel(image_folder):
    dataset = load(f"folder:{image_folder}")
    assert dataset.labels == ("bird", "cat")
    assert dataset.image_size == (16, 20)
    assert dataset.train_x.shape == (6, 3, 16, 20)
    assert dataset.test_y.tolist() == [0, 0, 1, 1]
    expected = {(1, random_images(1, i, 16, 20).tobytes()) for i in range(3)}
    expected |= {(0, random_images(1, 10 + i, 16, 20).tobytes()) for i in range(3)}
    read = {(int(y), x.tobytes()) for x, y in zip(dataset.train_x, dataset.train_y, strict=True)}
    assert read == expected
    assert same(load(str(image_folder)), dataset)  # a bare path; and the order is the same each time


def test_grey_and_transparent_images_become_rgb_and_other_files_are_ignored(image_folder):
    write_image(image_folder / "train" / "cat" / "grey.png", mode="L")
    write_image(image_folder / "train" / "cat" / "clear.PNG", mode="RGBA")
    write_image(image_folder / "train" / "cat" / "photo.jpg")
    (image_folder / "train" / "cat" / "notes.txt").write_text("not an image")
    (image_folder / "train" / "README.md").write_text("not a class")
    assert load(f"folder:{image_folder}").train_x.shape == (9, 3, 16, 20)


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_class_is_refused_by_name(image_folder, part):
    for file in (image_folder / part / "cat").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=f"{part}/cat holds no image"):
        load(f"folder:{image_folder}")


def test_a_test_class_without_train_images_is_refused_by_name(image_folder):
    write_image(image_folder / "test" / "dog" / "0.png")
    with pytest.raises(DataError, match="'dog' has no folder in"):
        load(f"folder:{image_folder}")


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_image_of_another_size_is_refused_by_name(image_folder, part):
    write_image(image_folder / part / "cat" / "tall.png", height=20, width=16)
    with pytest.raises(DataError, match=r"tall\.png is 20x16 pixels, the first image 16x20; resize"):
        load(f"folder:{image_folder}")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", None])
def test_a_broken_image_is_refused_by_name(image_folder, content):
    broken = image_folder / "train" / "cat" / "0.png"
    broken.write_bytes(broken.read_bytes()[:100] if content is None else content)
    with pytest.raises(DataError, match=r"cat/0\.png is not a readable image"):
        load(f"folder:{image_folder}")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_missing_half_is_refused(image_folder, part):
    shutil.rmtree(image_folder / part)
    with pytest.raises(DataError, match=f"{part} is not a folder"):
        load(f"folder:{image_folder}")


def test_a_folder_without_classes_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        load(f"folder:{tmp_path}")


def test_a_folder_of_one_class_is_refused(image_folder):
    for part in ("train", "test"):
        shutil.rmtree(image_folder / part / "cat")
    with pytest.raises(DataError, match="all of one class"):
        load(f"folder:{image_folder}")


# --- npz pairs ---

X, Y = random_images(6, height=8, width=9), np.array([0, 1, 2, 0, 1, 2])


def npz_spec(folder, **changes):
    """Stores a pair whose train half has ``changes`` (None leaves an array out) and returns its specification."""
    train = {name: value for name, value in ({"x": X, "y": Y} | changes).items() if value is not None}
    return f"npz:{save_npz(folder / 'a.npz', **train)},{save_npz(folder / 'b.npz', x=X[:3], y=Y[:3])}"


def pairs(images, labels) -> list:
    """Returns images with their labels, whatever their order."""
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64, ">i4"])
def test_an_npz_pair_is_read(tmp_path, dtype):
    dataset = load(npz_spec(tmp_path, y=Y.astype(dtype)))
    assert pairs(dataset.train_x, dataset.train_y) == pairs(X, Y)
    assert dataset.train_y.tolist() != Y.tolist()  # files come sorted by class; what calibrates must not
    np.testing.assert_array_equal(dataset.test_x, X[:3])
    assert dataset.train_y.dtype == np.int64
    assert dataset.labels == ("0", "1", "2")
    assert dataset.image_size == (8, 9)


def test_label_names_are_taken_from_the_train_half(tmp_path):
    names = ("cat", "dog", "bird", "never seen")
    assert load(npz_spec(tmp_path, label_names=np.array(names))).labels == names


def test_a_folder_with_a_pair_may_be_given(tmp_path):
    save_npz(tmp_path / "train.npz", x=X, y=Y)
    save_npz(tmp_path / "test.npz", x=X[:3], y=Y[:3])
    assert len(load(str(tmp_path)).test_x) == 3


BAD_PAIRS = {
    "no x": ({"x": None}, r"needs the arrays x, y, it holds \['y'\]"),
    "no y": ({"y": None}, r"needs the arrays x, y, it holds \['x'\]"),
    "float images": ({"x": X.astype(np.float32)}, "not uint8"),
    "grey images": ({"x": X[:, :1]}, "not uint8"),
    "channels last": ({"x": X.transpose(0, 2, 3, 1)}, "not uint8"),
    "one image": ({"x": X[0]}, "not uint8"),
    "no images": ({"x": X[:0], "y": Y[:0]}, "0 train images"),
    "objects": ({"x": np.array([{}, []], object)}, r"cannot be read as \.npz"),
    "labels as objects": ({"y": np.array([{}, []], object)}, r"cannot be read as \.npz"),
    "names as objects": ({"label_names": np.array([{}, []], object)}, r"cannot be read as \.npz"),
    "float labels": ({"y": Y.astype(float)}, "y is float64, not integers"),
    "labels as text": ({"y": Y.astype(str)}, "not integers"),
    "negative label": ({"y": Y - 1}, "a train label is outside 0"),
    "label without a name": ({"label_names": np.array(["a", "b"])}, r"a train label is outside 0\.\.1"),
    "no names": ({"label_names": np.array([], str)}, "outside"),
    "one name": ({"label_names": np.array("cat")}, r"outside 0\.\.0"),
    "an enormous label": ({"y": Y + 10**12}, "not a class number"),
    "a label beyond int64": ({"y": Y.astype(np.uint64) + np.uint64(2**63)}, "outside"),
    "fewer labels": ({"y": Y[:5]}, "6 train images and labels"),
    "labels in two columns": ({"y": np.stack([Y, Y], 1)}, "6 train images and labels"),
    "another size than the test images": ({"x": random_images(6, height=9, width=8)}, "train images have shape"),
    "one class": ({"y": np.zeros(6, int)}, "all of one class"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
def test_a_bad_npz_pair_is_refused_with_the_reason(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load(npz_spec(tmp_path, **changes))


def test_a_pickled_array_in_an_npz_runs_nothing(tmp_path):
    spec = npz_spec(tmp_path, x=np.array([Call(os.system, f"touch {tmp_path / 'marker'}")], object))
    with pytest.raises(DataError):
        load(spec)
    assert not (tmp_path / "marker").exists()


def test_a_missing_npz_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"b\.npz cannot be read"):
        load(f"npz:{save_npz(tmp_path / 'a.npz', x=X, y=Y)},{tmp_path / 'b.npz'}")


def test_a_single_npy_file_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", X)
    with pytest.raises(DataError, match=r"a\.npy cannot be read"):
        load(f"npz:{tmp_path / 'a.npy'},{tmp_path / 'a.npy'}")


def test_a_damaged_npz_is_read_or_refused(tmp_path):
    np.savez_compressed(tmp_path / "good.npz", x=X, y=Y)
    content = (tmp_path / "good.npz").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        changed = bytearray(content)
        changed[rng.integers(len(changed))] = rng.integers(256)
        (tmp_path / "bad.npz").write_bytes(changed)
        try:
            load(f"npz:{tmp_path / 'bad.npz'},{tmp_path / 'good.npz'}")
        except DataError:
            refused += 1
    assert refused > 100


# --- specifications ---


@pytest.mark.parametrize(
    "spec",
    ["", "mnist", "demo:more", "cifar10", "cifar10:", "folder:", "npz:", "npz:a", "npz:a,b,c", "/no/such/path", "."],
)
def test_an_unknown_specification_is_refused_with_the_known_ones(spec, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="give demo, cifar10:PATH, cifar100:PATH, folder:PATH"):
        load(spec)


# --- tools/convert_data.py ---


def differenced(x):
    """Inverts the formula of the tool: green subtracted from red and blue, then differences along columns and rows."""
    planes = x.transpose(1, 0, 2, 3).copy()
    planes[0] -= planes[1]
    planes[2] -= planes[1]
    planes[:, :, :, 1:] -= planes[:, :, :, :-1].copy()
    planes[:, :, 1:, :] -= planes[:, :, :-1, :].copy()
    return planes


def convert(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "convert_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_convert_data_restores_the_images(tmp_path):
    arrays = {"x_delta": differenced(X), "y": Y, "label_names": np.array(["a", "b", "c"])}
    save_npz(tmp_path / "stored.npz", **arrays)
    for part in ("train", "test"):
        done = convert(tmp_path / "stored.npz", tmp_path / "pair" / f"{part}.npz")
        assert done.returncode == 0, done.stderr
        assert "6 images" in done.stdout
    dataset = load(str(tmp_path / "pair"))
    assert pairs(dataset.train_x, dataset.train_y) == pairs(X, Y)
    assert dataset.labels == ("a", "b", "c")


def test_convert_data_can_take_the_other_labels(tmp_path):
    save_npz(tmp_path / "stored.npz", x_delta=differenced(X), y=Y, male=Y % 2)
    assert convert(tmp_path / "stored.npz", tmp_path / "male.npz", "male").returncode == 0
    with np.load(tmp_path / "male.npz") as stored:
        np.testing.assert_array_equal(stored["y"], Y % 2)
        assert sorted(stored) == ["x", "y"]


def test_convert_data_without_arguments_says_how_it_is_called():
    done = convert()
    assert done.returncode != 0
    assert "usage: convert_data.py SOURCE.npz TARGET.npz" in done.stderr
