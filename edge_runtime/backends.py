"""Inference runtimes behind one interface: open a model file, run it on numpy arrays.

``BACKENDS`` has them by name, with the format that each reads. A runtime is imported when it is chosen, so a device
needs only one. Start reading at ``choose`` and ``open_session``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ensembler.protocol.errors import BundleError, ConfigError, MissingExtraError
from ensembler.protocol.integers import sum_exactly
from ensembler.protocol.manifest import ModelFormat
from ensembler.protocol.options import whole

Array = npt.NDArray[Any]

MAX_THREADS = 1024
FEATURES = "features"  # the name of a head's output


class Session(Protocol):
    """A loaded model; safe to call from several threads."""

    def run(self, inputs: Mapping[str, Array]) -> Array:
        """Returns the model's only output for named inputs; batch is the first axis of each.

        Raises:
            BundleError: the model does not take inputs of these names, shapes or dtypes.
        """


class OnnxSession:
    """A model in onnxruntime, on the CPU."""

    def __init__(self, model: Path | bytes, name: str, threads: int) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "onnx", f"running {name}") from error
        ort.disable_telemetry_events()  # see sdk/__init__.py
        self._name = name
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Small models finish before a spinning pool pays, and on a board the spinning is heat.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        sum_exactly(options)
        try:
            self._session = ort.InferenceSession(
                model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises its own classes, which differ between versions
            shown = name if isinstance(model, bytes) else model
            raise BundleError(
                f"{shown} cannot be loaded by onnxruntime {ort.__version__}; export it again, or update onnxruntime"
            ) from error

    def run(self, inputs: Mapping[str, Array]) -> Array:
        """See ``Session``."""
        try:
            output: Array = self._session.run(None, dict(inputs))[0]
        except Exception as error:  # as above
            raise BundleError(f"{self._name} cannot run on {_shown(inputs)}; does it belong to this bundle?") from error
        return output


class TfliteSession:
    """A model in LiteRT or in tflite-runtime, its predecessor; both have the same interpreter.

    Codes are uint8 on the wire and int8, less 128, in the model. An int8 output that is not the head's stands for
    numbers, and becomes them here: 32-bit ARM would round them otherwise. A model takes one image; a batch is a loop.

    Args:
        module: where the interpreter is imported from.
        backend: the runtime's name.
        extra: of this package, with which it is installed.
        model: its file, or its content.
        name: for errors.
        threads: of one run.
    """

    def __init__(self, module: str, backend: str, extra: str, model: Path | bytes, name: str, threads: int) -> None:
        self._name = name
        try:
            interpreter: Any = import_module(module).Interpreter
        except ImportError as error:
            raise MissingExtraError(backend, extra, f"running {name}") from error
        try:
            content = model if isinstance(model, bytes) else model.read_bytes()
            self._interpreter = interpreter(model_content=content, num_threads=threads)
            self._interpreter.allocate_tensors()
            self._inputs = {detail["name"]: detail for detail in self._interpreter.get_input_details()}
            (self._output,) = self._interpreter.get_output_details()
        except (OSError, ValueError, RuntimeError) as error:
            shown = name if isinstance(model, bytes) else model
            raise BundleError(f"{shown} cannot be loaded by {backend}; export it again, or update {backend}") from error
        self._lock = threading.Lock()  # an interpreter holds the tensors of one run

    def run(self, inputs: Mapping[str, Array]) -> Array:
        """See ``Session``."""
        if not inputs or inputs.keys() != self._inputs.keys():
            raise self._refusal(inputs)
        given = [(detail, self._taken(detail, inputs)) for detail in self._inputs.values()]
        count = len(given[0][1])
        output: Array = np.empty((count, *self._output["shape"][1:]), self._output["dtype"])
        with self._lock:
            for row in range(count):
                for detail, values in given:
                    self._interpreter.set_tensor(detail["index"], values[row : row + 1])
                self._interpreter.invoke()
                output[row : row + 1] = self._interpreter.get_tensor(self._output["index"])
        if output.dtype != np.int8:
            return output
        if self._output["name"] == FEATURES:
            return output.view(np.uint8) ^ _SIGN
        scale, zero_point = self._output["quantization"]
        return (output.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)

    def _taken(self, detail: Mapping[str, Any], inputs: Mapping[str, Array]) -> Array:
        """Returns an input as the interpreter takes it."""
        values = np.ascontiguousarray(inputs[detail["name"]])
        if values.shape[1:] != tuple(detail["shape"][1:]):
            raise self._refusal(inputs)
        if detail["dtype"] == np.int8 and values.dtype == np.uint8:
            return (values ^ _SIGN).view(np.int8)
        if np.issubdtype(values.dtype, np.integer) and detail["dtype"] in (np.int32, np.int64):
            return values.astype(detail["dtype"])
        if values.dtype != detail["dtype"]:
            raise self._refusal(inputs)
        return values

    def _refusal(self, inputs: Mapping[str, Array]) -> BundleError:
        return BundleError(f"{self._name} cannot run on {_shown(inputs)}; does it belong to this bundle?")


_SIGN = np.uint8(0x80)


@dataclass(frozen=True)
class Backend:
    """A runtime.

    Attributes:
        format: of the models that it reads.
        module: what is imported.
        extra: of this package, which installs it.
        open: makes a session of a model (its file or its content), its name and a number of threads.
    """

    format: ModelFormat
    module: str
    extra: str
    open: Callable[[Path | bytes, str, int], Session]


def _tflite(backend: str, module: str, extra: str, *, newest_numpy: int | None = None) -> Backend:
    def session(model: Path | bytes, name: str, threads: int) -> Session:
        if newest_numpy is not None and int(np.__version__.split(".", maxsplit=1)[0]) > newest_numpy:
            raise ConfigError(
                f"{backend} was compiled for NumPy {newest_numpy} and this is NumPy {np.__version__}: "
                f"pip install 'numpy<{newest_numpy + 1}', or where it has a wheel 'ensembler-edge[litert]'"
            )
        return TfliteSession(module, backend, extra, model, name, threads)

    return Backend("tflite", module, extra, session)


# Of several that read a format the first is preferred.
BACKENDS: dict[str, Backend] = {
    "onnxruntime": Backend("onnx", "onnxruntime", "onnx", OnnxSession),
    "ai-edge-litert": _tflite("ai-edge-litert", "ai_edge_litert.interpreter", "litert"),
    "tflite-runtime": _tflite("tflite-runtime", "tflite_runtime.interpreter", "tflite-runtime", newest_numpy=1),
}
AUTO = "auto"


def choose(backend: str, formats: Sequence[ModelFormat]) -> str:
    """Returns the name of the runtime for a bundle's models.

    Args:
        backend: a name of ``BACKENDS``, or ``auto``: the first format that an installed runtime reads.
        formats: of the bundle, its default first.

    Raises:
        ConfigError: an unknown name, or a runtime that reads none of these formats.
        MissingExtraError: none is installed that does.
    """
    if backend == AUTO:
        return readers(formats)[0]
    known = _known(backend)
    if known.format not in formats:
        others = ", ".join(name for name, each in BACKENDS.items() if each.format in formats)
        raise ConfigError(
            f"{backend} reads {known.format} models and the bundle has {', '.join(formats)}: use {others}, or export "
            f"with --format {known.format}"
        )
    return backend


def readers(formats: Sequence[ModelFormat]) -> list[str]:
    """Returns the installed runtimes that read one of the formats, those of the first format first.

    Raises:
        MissingExtraError: there is none.
    """
    able = [name for wanted in formats for name, each in BACKENDS.items() if each.format == wanted]
    found = [name for name in able if installed(name)]
    if not found:
        raise MissingExtraError(able[0], BACKENDS[able[0]].extra, "running the bundle's models")
    return found


def installed(backend: str) -> bool:
    """Whether a runtime of ``BACKENDS`` is there, by name alone: to import it may be what fails."""
    return find_spec(BACKENDS[backend].module.split(".", maxsplit=1)[0]) is not None


def _known(backend: str) -> Backend:
    if backend not in list(BACKENDS):  # a list, since not everything can be looked up in a dict
        raise ConfigError(f"unknown backend {backend!r}; known: {', '.join(sorted(BACKENDS))}")
    return BACKENDS[backend]


def open_session(
    model: Path | bytes, *, name: str = "the model", threads: int = 1, backend: str = "onnxruntime"
) -> Session:
    """Opens a model.

    Args:
        model: its file; or its content, which then is never written to one.
        name: how errors call a content; a file has its own.
        threads: how many threads one run may use; one is fastest for the small graphs of a device.
        backend: a name of ``BACKENDS``.

    Raises:
        ConfigError: an unknown backend, one that this NumPy is too new for, or a number of threads that is none.
        MissingExtraError: the runtime is not installed.
        BundleError: the runtime cannot load the file.
    """
    known = _known(backend)
    count = whole("threads", threads, 1, MAX_THREADS)
    return known.open(model, name if isinstance(model, bytes) else model.name, count)


def median_ms(session: Session, inputs: Mapping[str, Array], runs: int = 30) -> float:
    """Returns the median time of a run."""
    return float(np.median(times_ms(session, inputs, runs)))


def times_ms(session: Session, inputs: Mapping[str, Array], runs: int) -> list[float]:
    """Returns the time of each run."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        session.run(inputs)
        times.append(1000 * (time.perf_counter() - start))
    return times


def _shown(inputs: Mapping[str, Array]) -> str:
    return ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in inputs.items()) or "nothing"


def as_codes(array: Array) -> npt.NDArray[np.uint8]:
    """Returns ``array`` as uint8 codes; anything else means that the model is not what the bundle says.

    Raises:
        BundleError: another dtype.
    """
    if array.dtype != np.uint8:
        raise BundleError(f"the model answers with {array.dtype}, not with uint8 codes; export the bundle again")
    return array
