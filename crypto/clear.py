"""Layers in the clear: an ONNX graph of a bundle on the processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ensembler.crypto.shares import Floats
from ensembler.protocol.errors import BundleError
from ensembler.protocol.integers import sum_exactly


class ClearLayers:
    """A graph with one input and one output.

    Args:
        model: the file, or its content.
        threads: of the processor.

    Raises:
        BundleError: not a graph that onnxruntime loads.
    """

    def __init__(self, model: Path | bytes, threads: int = 1) -> None:
        import onnxruntime as ort

        ort.disable_telemetry_events()  # see sdk/__init__.py
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        sum_exactly(options)
        try:
            given = model if isinstance(model, bytes) else str(model)
            self._session = ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes
            named = "the sealed tail" if isinstance(model, bytes) else model
            raise BundleError(f"{named} cannot be loaded by onnxruntime; export the bundle again") from error
        self._input = self._session.get_inputs()[0].name

    def run(self, values: Floats) -> Floats:
        """Returns the output, float32."""
        (result,) = self._session.run(None, {self._input: values})
        return np.ascontiguousarray(result, np.float32)
