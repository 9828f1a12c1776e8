"""Inference runtimes behind one interface: open a model file, run it on numpy arrays.

onnxruntime is the first; ai-edge-litert and tflite-runtime join it as further entries of ``BACKENDS``. A runtime is
imported when it is chosen, so a device needs only one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ensembler.protocol.errors import BundleError, ConfigError, MissingExtraError
from ensembler.protocol.options import whole

Array = npt.NDArray[Any]

MAX_THREADS = 1024


class Session(Protocol):
    """A loaded model."""

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
        ort.disable_telemetry_events()  # from 1.29 on it reports to its maker, on Linux too
        self._name = name
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Small models finish before a spinning pool pays, and on a board the spinning is heat.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
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
            given = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in inputs.items())
            raise BundleError(f"{self._name} cannot run on {given}; does it belong to this bundle?") from error
        return output


BACKENDS: dict[str, Callable[[Path | bytes, str, int], Session]] = {"onnxruntime": OnnxSession}


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
        ConfigError: an unknown backend, or a number of threads that is none.
        MissingExtraError: the runtime is not installed.
        BundleError: the runtime cannot load the file.
    """
    if backend not in list(BACKENDS):  # a list, since not everything can be looked up in a dict
        raise ConfigError(f"unknown backend {backend!r}; known: {', '.join(sorted(BACKENDS))}")
    count = whole("threads", threads, 1, MAX_THREADS)
    return BACKENDS[backend](model, name if isinstance(model, bytes) else model.name, count)


def as_codes(array: Array) -> npt.NDArray[np.uint8]:
    """Returns ``array`` as uint8 codes; anything else means that the model is not what the bundle says.

    Raises:
        BundleError: another dtype.
    """
    if array.dtype != np.uint8:
        raise BundleError(f"the model answers with {array.dtype}, not with uint8 codes; export the bundle again")
    return array
