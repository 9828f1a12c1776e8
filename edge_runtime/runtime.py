"""The device's two models: head with noise (image to wire codes), selector + tail (answers to logits)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensembler.edge_runtime.backends import as_codes, open_session
from ensembler.edge_runtime.sealing import BundleSecret, opener
from ensembler.protocol.codec import require_codes
from ensembler.protocol.errors import BundleError
from ensembler.protocol.manifest import ClientManifest, Kdf, load_client

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class EdgeRuntime:
    """Runs the models of one client bundle; safe to call from several threads.

    Args:
        bundle: the folder of a client bundle; every file is verified before it is loaded.
        threads: of one run of one model.
        backend: a name of ``backends.BACKENDS``.
        secret: given the kind, returns what opens an encrypted bundle, or None; not asked for a plain one.

    Raises:
        BundleError: missing, damaged or of another version; see its subclasses.
        KeyFileError: the bundle is encrypted, and there is no secret or a wrong one.
        MissingExtraError: no runtime is installed, or what decrypts is not.
    """

    def __init__(
        self,
        bundle: Path,
        *,
        threads: int = 1,
        backend: str = "onnxruntime",
        secret: Callable[[Kdf], BundleSecret | None] = lambda _: None,
    ) -> None:
        self.manifest: ClientManifest = load_client(bundle)
        model = opener(bundle, self.manifest, secret)
        head, tail = self.manifest.head, self.manifest.tail
        self._head = open_session(model(head), name=head, threads=threads, backend=backend)
        self._tail = open_session(model(tail), name=tail, threads=threads, backend=backend)

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
