"""The device's two models: head with noise (image to wire codes), selector + tail (answers to logits)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensembler.edge_runtime import preferences
from ensembler.edge_runtime.backends import AUTO, BACKENDS, Session, as_codes, choose, open_session
from ensembler.edge_runtime.sealing import BundleSecret, opener
from ensembler.protocol.codec import AffineCodec, require_codes
from ensembler.protocol.errors import BundleError
from ensembler.protocol.manifest import ClientManifest, Kdf, load_client

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class EdgeRuntime:
    """Runs the models of one client bundle; safe to call from several threads.

    Args:
        bundle: the folder of a client bundle; every file is verified before it is loaded.
        threads: of one run of one model; None takes what the machine prefers (``preferences``), else one.
        backend: a name of ``backends.BACKENDS``, or ``auto``: see ``backends.choose``.
        secret: given the kind, returns what opens an encrypted bundle, or None; not asked for a plain one.

    Attributes:
        manifest: of the bundle.
        backend: the runtime that runs.

    Raises:
        BundleError: missing, damaged or of another version; see its subclasses.
        ConfigError: the runtime cannot run these models.
        KeyFileError: the bundle is encrypted, and there is no secret or a wrong one.
        MissingExtraError: no runtime is installed, or what decrypts is not.
    """

    def __init__(
        self,
        bundle: Path,
        *,
        threads: int | None = None,
        backend: str = AUTO,
        secret: Callable[[Kdf], BundleSecret | None] = lambda _: None,
    ) -> None:
        self.manifest: ClientManifest = load_client(bundle)
        model = opener(bundle, self.manifest, secret)
        formats = [pair.format for pair in self.manifest.models]
        backend, threads = preferences.completed(backend, threads, formats)
        self.backend = choose(backend, formats)
        pair = self.manifest.pair(BACKENDS[self.backend].format)
        codec = self.manifest.wire.feature_codec
        self._head = open_head(model(pair.head), codec, name=pair.head, threads=threads, backend=self.backend)
        self._tail = open_session(model(pair.tail), name=pair.tail, threads=threads, backend=self.backend)

    def encode(self, images: Codes) -> Codes:
        """Runs the head: noise is added, features are dropped and quantised inside.

        Args:
            images: ``(B, H, W, 3)`` uint8 RGB of the manifest's size.

        Returns:
            Wire codes ``(B, C, h, w)`` uint8.
        """
        wire = self.manifest.wire
        codes = as_codes(self._head.run({"image": images, **secret_inputs(self.manifest, len(images))}))
        if codes.shape != (len(images), *wire.feature_shape):
            raise BundleError(f"the head answers with shape {codes.shape[1:]}, the manifest says {wire.feature_shape}")
        require_codes(codes, wire.feature_codec, "the head")
        return codes

    def finish(self, answers: Codes) -> Floats:
        """Runs selector and tail.

        Args:
            answers: the codes of all N answers, ``(B, N, F)`` uint8, in the server's order.

        Returns:
            Logits ``(B, K)`` float32.
        """
        logits = self._tail.run({"answers": answers})
        expected = (len(answers), len(self.manifest.labels))
        if logits.dtype != np.float32 or logits.shape != expected:
            raise BundleError(f"the tail answers with {logits.dtype} {logits.shape}, not float32 {expected}")
        return logits


def open_head(
    model: Path | bytes, codec: AffineCodec, *, name: str = "the head", threads: int = 1, backend: str
) -> Session:
    """Opens a head as ``open_session`` opens a model; its codes are what goes on the wire, whatever the format.

    Args:
        model: its file, or its content.
        codec: of the features.
        name: as for ``open_session``.
        threads: as for ``open_session``.
        backend: as for ``open_session``.
    """
    session = open_session(model, name=name, threads=threads, backend=backend)
    return _TfliteHead(session, codec) if BACKENDS[backend].format == "tflite" else session


class _TfliteHead:
    """A head whose operators neither drop codes nor end at fewer than 8 bits: both are done here."""

    def __init__(self, session: Session, codec: AffineCodec) -> None:
        self._session = session
        self._codec = codec

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """See ``Session``."""
        codes = as_codes(self._session.run({name: value for name, value in inputs.items() if name != "keep"}))
        if self._codec.bits < 8:
            codes = np.minimum(codes, np.uint8(self._codec.code_max))
        return np.where(inputs["keep"], codes, np.uint8(self._codec.zero_point)) if "keep" in inputs else codes


def secret_inputs(manifest: ClientManifest, count: int) -> dict[str, npt.NDArray[Any]]:
    """Draws, from the operating system's generator, what the head takes beside ``count`` images.

    A seeded generator would let a server that guesses its state undo the noise, and ONNX's random operators are such.

    Returns:
        ``noise`` ``(B, C, h, w)`` float32 where it is fresh; ``which`` ``(B,)`` int64, a choice among the constants,
        where it is one of several; ``keep`` ``(B, C, h, w)`` bool, False where a feature is dropped.
    """
    shape = (count, *manifest.wire.feature_shape)
    inputs: dict[str, npt.NDArray[Any]] = {}
    if manifest.noise_mode == "fresh":
        make = uniform_noise if manifest.noise_law == "uniform" else fresh_noise
        inputs["noise"] = make(shape, manifest.noise_std)
    if manifest.noise_mode == "drawn":
        inputs["which"] = (_uniform(count) * manifest.noise_tensors).astype(np.int64)
    if manifest.dropout > 0:
        inputs["keep"] = (_uniform(math.prod(shape)) >= manifest.dropout).reshape(shape)
    return inputs


def _uniform(count: int) -> npt.NDArray[np.float64]:
    """Returns numbers between 0 and 1, neither of them included, of 32 random bits each."""
    raw = np.frombuffer(os.urandom(4 * count), np.uint32).astype(np.float64)
    uniform: npt.NDArray[np.float64] = (raw + 0.5) / 2.0**32
    return uniform


def fresh_noise(shape: tuple[int, ...], std: float) -> Floats:
    """Returns Gaussian noise, ``shape`` float32, by Box-Muller."""
    count = math.prod(shape)
    pairs = (count + 1) // 2
    uniform = _uniform(2 * pairs)
    radius = np.sqrt(-2.0 * np.log(uniform[:pairs]))
    angle = 2.0 * np.pi * uniform[pairs:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    noise: Floats = (std * normal).reshape(shape).astype(np.float32)
    return noise


def uniform_noise(shape: tuple[int, ...], std: float) -> Floats:
    """Returns noise that is uniform between plus and minus ``std * sqrt(3)``, ``shape`` float32."""
    centred = 2.0 * _uniform(math.prod(shape)) - 1.0
    noise: Floats = (std * math.sqrt(3) * centred).reshape(shape).astype(np.float32)
    return noise


def softmax(logits: Floats) -> Floats:
    """Returns probabilities over the last axis, float32, computed without overflow."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: Floats = shifted / shifted.sum(axis=-1, keepdims=True)
    return probabilities
