"""The device's two models: head with noise (image to wire codes), selector + tail (answers to logits)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

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
        """Runs the head: noise is added and the features are quantised inside.

        Args:
            images: ``(B, H, W, 3)`` uint8 RGB of the manifest's size.

        Returns:
            Wire codes ``(B, C, h, w)`` uint8.
        """
        inputs: dict[str, npt.NDArray[np.generic]] = {"image": images}
        wire = self.manifest.wire
        if self.manifest.noise_mode == "fresh":
            inputs["noise"] = fresh_noise((len(images), *wire.feature_shape), self.manifest.noise_std)
        codes = as_codes(self._head.run(inputs))
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


def fresh_noise(shape: tuple[int, ...], std: float) -> Floats:
    """Returns Gaussian noise from the operating system's generator, ``shape`` float32.

    Box-Muller over 32-bit uniforms. A seeded generator would let a server that guesses its state subtract the noise,
    and ONNX's ``RandomNormal`` is one.
    """
    count = int(np.prod(shape))
    pairs = (count + 1) // 2
    raw = np.frombuffer(os.urandom(8 * pairs), np.uint32).astype(np.float64)
    uniform = (raw + 0.5) / 2.0**32  # never 0
    radius = np.sqrt(-2.0 * np.log(uniform[:pairs]))
    angle = 2.0 * np.pi * uniform[pairs:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    noise: Floats = (std * normal).reshape(shape).astype(np.float32)
    return noise


def softmax(logits: Floats) -> Floats:
    """Returns probabilities over the last axis, float32, computed without overflow."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: Floats = shifted / shifted.sum(axis=-1, keepdims=True)
    return probabilities
