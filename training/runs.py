"""The run folder: what training leaves behind, and export reads.

::

    RUN/                       0700: it holds every secret of the client
      config.json              the options
      stage1/net_00.safetensors ...   head, body, tail, noise of each stage-1 net
      wire.json                codecs, shapes, the bodies' order; fixed before the selector is drawn
      client/secret.json       0600: selector and seed
      client/client.safetensors       head, noise, tail of stage 3
      *.checkpoint.safetensors while training: where a net, the client or its noise stands, see ``checkpoint``
      metrics.jsonl            one JSON object per line, appended as training goes
      confusion.json           how many held-out images of each class were taken for each class
      plan.png, curves.png, confusion.png  drawn at the end by the command line, see ``plots``
      summary.json             final accuracies; written last, so its presence means the run is complete

Files are written whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.errors import ConfigError, DataError
from ensembler.protocol.manifest import MANIFEST_NAME, WireSpec
from ensembler.training.config import TrainConfig
from ensembler.training.models import ArchSpec

RUN_VERSION = 2
CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CONFUSION_FILE = "confusion.json"
# In metrics.jsonl, beside 1 and 3:
NOISE_STAGE = "noise"  # learned noise
TAIL_STAGE = "tail"  # a tail that learns after its head


@dataclass(frozen=True, kw_only=True)
class WireState:
    """What is fixed between stage 1 and stage 2.

    Attributes:
        spec: what both bundles state.
        order: ``order[k]`` is the stage-1 index of the body at the server's position k.
    """

    spec: WireSpec
    order: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, repr=False)
class ClientSecret:
    """The selector (server positions, sorted) and the seed of stage 3. Its repr shows neither."""

    selector: tuple[int, ...]
    seed: int

    def __repr__(self) -> str:
        return f"ClientSecret(P={len(self.selector)})"


class RunFolder:
    """Reads and writes one run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock: int | None = None  # the descriptor of ``training_lock``, while this process holds it

    @classmethod
    def create(
        cls,
        path: Path,
        config: TrainConfig,
        arch: ArchSpec,
        labels: Sequence[str],
        *,
        data_digest: str | None = None,
        stage1_from: Path | None = None,
    ) -> RunFolder:
        """Makes the folder and writes ``config.json``.

        Args:
            path: must not exist, or be empty.
            config: the options.
            arch: which net.
            labels: the class names.
            data_digest: of the data, without which the run cannot be resumed.
            stage1_from: the run whose stage 1 this one takes.

        Raises:
            ConfigError: the folder exists and is not empty, or cannot be made.
        """
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise ConfigError(f"--out {path}: exists and is not an empty folder; choose another, or remove it")
            made = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o700)
            (path / "stage1").mkdir()
            (path / "client").mkdir(mode=0o700)
        except OSError as error:
            raise ConfigError(f"--out {path}: cannot be written: {error.strerror}") from error
        run = cls(path)
        try:
            run.write_json(
                CONFIG_FILE,
                {
                    "version": RUN_VERSION,
                    "config": config.to_dict(),
                    "image_size": list(arch.image_size),
                    "labels": list(labels),
                    "data_digest": data_digest,
                    "stage1_from": str(stage1_from.absolute()) if stage1_from is not None else None,
                },
            )
        except BaseException:  # a folder without it is no run, and would only be in the way of the next attempt
            for folder in (path / "stage1", path / "client", *([path] if made else [])):
                with suppress(OSError):
                    folder.rmdir()
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Opens a finished run.

        Raises:
            DataError: not a run folder, of another version, or its training was not finished.
        """
        run = cls._of_this_version(path)
        if not run.has("summary.json"):
            raise DataError(f"{path}: training was not finished; ensembler train --resume {path} continues it")
        return run

    @classmethod
    def open_stage1(cls, path: Path) -> RunFolder:
        """Opens a run for its nets and its wire, whose own client may still be in training.

        Raises:
            DataError: not a run folder, of another version, or its stage 1 was not finished.
        """
        run = cls._of_this_version(path)
        if not run.has("wire.json"):
            raise DataError(f"{path}: stage 1 was not finished; ensembler train --resume {path} continues it")
        return run

    @classmethod
    def open_unfinished(cls, path: Path) -> RunFolder:
        """Opens a run whose training was interrupted.

        Raises:
            DataError: not a run folder, or of another version.
            ConfigError: its training is finished.
        """
        run = cls._of_this_version(path)
        if run.has("summary.json"):
            run.remove_checkpoints()  # where the kill came between the summary and the end
            raise ConfigError(
                f"--resume {path}: training is finished; there is nothing to resume. "
                f"Next: ensembler-export {path} --out bundles"
            )
        if not run.data_digest:
            raise DataError(f"--resume {path}: was begun by a version that could not resume; train again")
        return run

    @classmethod
    def _of_this_version(cls, path: Path) -> RunFolder:
        run = cls(path)
        try:
            if not (path / CONFIG_FILE).is_file():
                raise DataError(f"{path} is not a run folder; {_instead_of(path)}")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        document = run.read_json(CONFIG_FILE)
        complete = {"config", "image_size", "labels"} <= document.keys()
        if document.get("version") != RUN_VERSION or not complete:
            raise DataError(f"{path} was written by another version; train again, or install the matching version")
        with run._complete(CONFIG_FILE):
            size, labels = document["image_size"], document["labels"]
            _require(len(size) == 2 and all(type(side) is int for side in size))
            _require(isinstance(labels, list) and all(isinstance(label, str) for label in labels))
            _ = run.config, run.arch
        return run

    # --- the parts ---

    @property
    def config(self) -> TrainConfig:
        """The options of the run."""
        return TrainConfig.from_dict(self.read_json(CONFIG_FILE)["config"])

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names."""
        return tuple(self.read_json(CONFIG_FILE)["labels"])

    @property
    def arch(self) -> ArchSpec:
        """Which net."""
        config, document = self.config, self.read_json(CONFIG_FILE)
        height, width = document["image_size"]
        return config.arch_spec((height, width), len(document["labels"]))

    @property
    def data_digest(self) -> str:
        """The digest of the data; empty where none was stored."""
        return str(self.read_json(CONFIG_FILE).get("data_digest") or "")

    @property
    def stage1_source(self) -> Path | None:
        """The run whose stage 1 this one takes."""
        source = self.read_json(CONFIG_FILE).get("stage1_from")
        return Path(str(source)) if source else None

    def stage1_file(self, index: int) -> str:
        """Returns the name of one stage-1 net's file."""
        return f"stage1/net_{index:02d}.safetensors"

    def stage1_checkpoint(self, index: int) -> str:
        """Returns the name of the file that says where one stage-1 net stands."""
        return f"stage1/net_{index:02d}.checkpoint.safetensors"

    CLIENT_FILE = "client/client.safetensors"
    CLIENT_CHECKPOINT = "client/client.checkpoint.safetensors"
    TAIL_CHECKPOINT = "client/tail.checkpoint.safetensors"
    NOISE_CHECKPOINT = "client/noise.checkpoint.safetensors"
    SECRET_FILE = "client/secret.json"  # noqa: S105 (a file name)

    def write_wire(self, state: WireState) -> None:
        """Stores the wire state."""
        spec = state.spec
        self.write_json(
            "wire.json",
            {
                "bodies_id": spec.bodies_id,
                "feature_shape": list(spec.feature_shape),
                "feature_codec": _codec_json(spec.feature_codec),
                "answer_width": spec.answer_width,
                "answer_codecs": [_codec_json(codec) for codec in spec.answer_codecs],
                "order": list(state.order),
            },
        )

    def read_wire(self) -> WireState:
        """Reads the wire state."""
        with self._complete("wire.json"):
            return self._wire_state(self.read_json("wire.json"))

    @staticmethod
    def _wire_state(document: dict[str, Any]) -> WireState:
        def codec(triple: list[Any]) -> AffineCodec:
            scale, zero_point, bits = triple
            return AffineCodec(scale=scale, zero_point=zero_point, bits=bits)

        order, shape = document["order"], document["feature_shape"]
        _require(len(document["answer_codecs"]) == len(order) > 0)
        _require(all(type(i) is int for i in order) and sorted(order) == list(range(len(order))))
        _require(isinstance(shape, list) and len(shape) > 0 and all(type(axis) is int and axis > 0 for axis in shape))
        _require(type(document["answer_width"]) is int and isinstance(document["bodies_id"], str))
        return WireState(
            spec=WireSpec(
                bodies_id=document["bodies_id"],
                feature_shape=tuple(document["feature_shape"]),
                feature_codec=codec(document["feature_codec"]),
                answer_width=document["answer_width"],
                answer_codecs=tuple(codec(pair) for pair in document["answer_codecs"]),
            ),
            order=tuple(document["order"]),
        )

    def write_secret(self, secret: ClientSecret) -> None:
        """Stores selector and seed, 0600."""
        self.write_json(self.SECRET_FILE, {"selector": list(secret.selector), "seed": secret.seed}, mode=0o600)

    def read_secret(self) -> ClientSecret:
        """Reads selector and seed."""
        document = self.read_json(self.SECRET_FILE)
        with self._complete(self.SECRET_FILE):
            selector, seed = document["selector"], document["seed"]
            nets = range(self.config.trained_nets)
            _require(all(type(k) is int and k in nets for k in selector))
            _require(len(set(selector)) == len(selector) > 0 and type(seed) is int and seed >= 0)
            return ClientSecret(selector=tuple(selector), seed=seed)

    def copy_stage1(self, source: RunFolder) -> None:
        """Takes the stage-1 nets of another run as they are."""
        for name in (self.stage1_file(index) for index in range(source.config.trained_nets)):
            try:
                # They never change, and a server has many clients: the same file, where the file system can have it.
                if self._linked(source.path / name, self.path / name):
                    continue
                content = (source.path / name).read_bytes()
            except OSError as error:
                raise DataError(f"{source.path / name} cannot be read ({error}); train again") from error
            self.write_bytes(name, content)

    @staticmethod
    def _linked(existing: Path, name: Path) -> bool:
        try:
            os.link(existing, name)
        except OSError:
            return name.exists() and name.samefile(existing)
        return True

    # --- files ---

    def has(self, name: str) -> bool:
        """Whether a part is there."""
        return (self.path / name).is_file()

    def remove(self, name: str) -> None:
        """Removes a part, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def remove_checkpoints(self) -> None:
        """Removes the client's checkpoints, once the run is finished."""
        for name in (self.CLIENT_CHECKPOINT, self.TAIL_CHECKPOINT, self.NOISE_CHECKPOINT):
            self.remove(name)

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        """Stores named tensors, and texts beside them."""
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        texts = dict(metadata) if metadata else None
        self._replace(name, lambda path: save_file(plain, path, metadata=texts), 0o600)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Stores a part that was made elsewhere, as it is."""
        self._replace(name, partial(_write_bytes, content), 0o600)

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """Reads named tensors.

        Raises:
            DataError: missing or damaged.
        """
        try:
            tensors: dict[str, Tensor] = load_file(self.path / name)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.path / name} cannot be read ({error}); train again") from error
        if "noise" not in tensors:
            raise DataError(f"{self.path / name} holds no net of this version; train again")
        return tensors

    def write_json(self, name: str, document: Mapping[str, Any], mode: int = 0o600) -> None:
        """Stores a JSON document."""
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        self._replace(name, lambda path: path.write_text(text, encoding="utf-8"), mode)

    def read_json(self, name: str) -> dict[str, Any]:
        """Reads a JSON document.

        Raises:
            DataError: missing or damaged.
        """
        try:
            document: object = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{self.path / name} cannot be read ({error}); train again") from error
        if not isinstance(document, dict):
            raise DataError(f"{self.path / name} is not a JSON object; train again")
        return document

    @contextmanager
    def _complete(self, name: str) -> Iterator[None]:
        """Turns what a readable file lacks into an error that names it."""
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, ConfigError) as error:
            reason = f" ({error})" if isinstance(error, ConfigError) else ""
            raise DataError(f"{self.path / name} is damaged or of another version{reason}; train again") from error

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Adds one line to ``metrics.jsonl``."""
        path = self.path / METRICS_FILE
        try:
            with self._metrics_lock(), path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            raise _unwritten(path, error) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the records of ``metrics.jsonl`` up to the first torn line, if there is one."""
        try:
            lines = (self.path / METRICS_FILE).read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        records: list[dict[str, Any]] = []
        for line in lines:
            try:
                record: object = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(record, dict) or not line.endswith(b"\n"):
                break
            records.append(record)
        return records

    def keep_metrics(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drops every record of ``metrics.jsonl`` that is not ``wanted``, and a torn line."""
        with self._metrics_lock():
            if self.has(METRICS_FILE):
                text = "".join(json.dumps(record) + "\n" for record in self.read_metrics() if wanted(record))
                self._replace(METRICS_FILE, lambda path: path.write_text(text, encoding="utf-8"), 0o600)

    def replace_metrics(self, piece: Mapping[str, Any], lines: bytes) -> None:
        """Puts ``lines`` in the place of the records of ``metrics.jsonl`` that hold what ``piece`` holds."""
        with self._metrics_lock():
            others = [record for record in self.read_metrics() if not piece.items() <= record.items()]
            text = "".join(json.dumps(record) + "\n" for record in others)
            self._replace(METRICS_FILE, partial(_write_bytes, text.encode() + lines), 0o600)

    @contextmanager
    def _metrics_lock(self) -> Iterator[None]:
        """Holds ``metrics.jsonl``, to which every process of a run adds lines, for this one."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks: a line of metrics may get lost, and nothing else
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _replace(self, name: str, write: Callable[[Path], object], mode: int) -> None:
        path = self.path / name
        temporary = path.with_name(path.name + ".tmp")
        try:
            # The file exists with its final mode before the first secret byte is in it.
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode))
            write(temporary)
            temporary.chmod(mode)
            _flush(temporary)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            raise _unwritten(path, error) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _instead_of(path: Path) -> str:
    """Says what to do where a folder is no run: what it is, and which runs lie in it."""
    if path.is_file():
        return "it is a file; give the folder that ensembler train made"
    if (path / MANIFEST_NAME).is_file():
        return "it is a bundle; give the run that it was exported from"
    if within := sorted(str(found.parent) for found in path.glob(f"*/{CONFIG_FILE}")):
        return f"runs lie in it: give {' or '.join(within[:4])}"
    if any(path.glob(f"*/{MANIFEST_NAME}")):
        return "bundles lie in it; give the run that they were exported from"
    if path.is_dir() and any(path.iterdir()):
        return f"{CONFIG_FILE} is missing; give the folder that ensembler train made"
    return f"ensembler train --out {path} makes one"


def _require(holds: bool) -> None:
    """Raises what ``_complete`` turns into an error that names the file."""
    if not holds:
        raise ValueError


def _codec_json(codec: AffineCodec) -> list[float | int]:
    return [codec.scale, codec.zero_point, codec.bits]


def _unwritten(path: Path, error: OSError | SafetensorError) -> DataError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return DataError(
        f"{path} cannot be written: {reason}; make room, or make it writable, then ensembler train --resume goes on"
    )


def _flush(path: Path) -> None:
    """Has the disk hold the file's content, so that no power cut leaves a name without it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """Returns a module's state with ``prefix.`` before each name."""
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


def restore(module: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Loads into ``module`` what ``module_tensors`` named.

    Raises:
        DataError: names or shapes do not fit.
    """
    state = {n.removeprefix(f"{prefix}."): t for n, t in tensors.items() if n.startswith(f"{prefix}.")}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"the stored {prefix} does not fit the architecture; train again") from error


def bodies_digest(bodies: Sequence[nn.Module], feature_codec: AffineCodec, answers: Sequence[AffineCodec]) -> str:
    """Returns ``bodies_id``: SHA-256 over the float weights in the server's order and the codecs.

    Neither the precision that the bodies are served in nor anything of stages 2 and 3 enters it.
    """
    digest = hashlib.sha256(b"ensembler bodies v1\n")
    for codec in (feature_codec, *answers):
        digest.update(f"{codec.name} {codec.scale!r} {codec.zero_point}\n".encode())
    for body in bodies:
        for name, value in sorted(body.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
