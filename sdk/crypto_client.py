"""The client of crypto-clear inference: ``EdgeClient``'s calls for a bundle that holds no weight.

``EdgeClient(bundle, server)`` makes one where the bundle is of that kind. Start reading at ``CryptoEdgeClient._ask``.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ensembler.client import EdgeClient, checked_timeout, open_transports, refuse_idle_secret, secret_finder
from ensembler.crypto import bundle as bundles
from ensembler.crypto.client import CryptoAnswer, CryptoSession
from ensembler.crypto.engine import require_installed
from ensembler.edge_runtime.images import ImageLike, all_pixels, several
from ensembler.edge_runtime.runtime import softmax
from ensembler.edge_runtime.sealing import opener
from ensembler.fallback import Fallback, answer_locally, cloud_is_away
from ensembler.forgotten import closed_when_forgotten
from ensembler.info import ClientInfo
from ensembler.prediction import CryptoCost, LayerCost, Prediction, Timings
from ensembler.process import OwnProcess
from ensembler.protocol.codec import packed_row_bytes
from ensembler.protocol.errors import ConfigError, DeadlineExceededError, EnsemblerError
from ensembler.protocol.messages import REQUEST_ID_BYTES, STATUS, Message, encode
from ensembler.protocol.options import expanded, whole
from ensembler.replica import Replica, Request
from ensembler.servers import ServerKeys, Servers, server_addresses
from ensembler.statistics import ReplicaStatistics

TIMEOUT_MS = 120_000.0


class CryptoEdgeClient(EdgeClient):
    """See ``EdgeClient``, of which this takes the arguments that a bundle of this kind has a use for.

    One image after the other, in one session that is kept: calls from several threads wait for each other, within their
    deadlines.

    Args:
        bundle: the folder of a client's bundle.
        server: its address.
        key: as ``EdgeClient``.
        server_key: as ``EdgeClient``.
        bundle_key: as ``EdgeClient``.
        passphrase: as ``EdgeClient``.
        plaintext: as ``EdgeClient``. Who listens reads the answers, and whoever can change what travels can be the
            server.
        timeout_ms: the deadline of a call that gives none itself, 2 minutes for None.
        top_k: as ``EdgeClient``.
        fallback: as ``EdgeClient``.
        insecure_engine: takes a bundle whose engine protects nothing; for tests.
        progress: called with (layers done, layers) while the two parties compute, in the thread of the call.
        options: other arguments of ``EdgeClient``, which are refused.

    Raises:
        BundleError: the bundle is missing, damaged or of another version.
        KeyFileError: no device key was found, or it is not one; or the bundle is encrypted and does not open.
        ConfigError: an impossible option, or one that a bundle of this kind has no use for.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        server: Servers,
        *,
        key: str | os.PathLike[str] | None = None,
        server_key: ServerKeys | None = None,
        bundle_key: str | os.PathLike[str] | bytes | None = None,
        passphrase: str | None = None,
        plaintext: bool = False,
        timeout_ms: float | None = None,
        top_k: int = 5,
        fallback: Fallback | None = None,
        insecure_engine: bool = False,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> None:
        unused = sorted(name for name, value in options.items() if value not in (None, "auto"))
        if unused:
            raise ConfigError(f"a bundle of crypto-clear inference has no use for {', '.join(unused)}; leave it out")
        if fallback is not None and not callable(fallback):
            raise ConfigError(f"fallback is {type(fallback).__name__}; give a function of an image and an error")
        if progress is not None and not callable(progress):
            raise ConfigError(f"progress is {type(progress).__name__}; give a function of two numbers of layers")
        folder = expanded("bundle", bundle)
        self._crypto, steps = bundles.load_client(folder)
        bundles.require_protection(self._crypto, folder, insecure_engine)
        require_installed(self._crypto.settings)
        refuse_idle_secret(folder, self._crypto, bundle_key, passphrase)
        tail = b""
        if self._crypto.encryption is not None:
            opened = opener(folder, self._crypto, secret_finder(bundle_key, passphrase))(bundles.SEALED_TAIL_FILE)
            assert isinstance(opened, bytes)
            tail = opened
        self._process = OwnProcess()
        self._timeout_ms = checked_timeout(TIMEOUT_MS if timeout_ms is None else timeout_ms)
        self._top_k = min(whole("top_k", top_k, 1), len(self._crypto.labels))
        self._fallback, self._progress = fallback, progress
        self._steps = steps
        self._folder, self._encrypted = folder, not plaintext
        servers = server_addresses(server, 1, folder)
        if len(servers[0]) > 1:
            raise ConfigError("crypto-clear inference keeps a session with one server; give one address")
        (self._address,) = servers[0]
        pinned = [self._crypto.server_public_key]
        (transport,) = open_transports(folder, servers, pinned, key, server_key, plaintext=plaintext)
        self._replica = Replica(self._address, transport)
        self._session = CryptoSession(folder, self._crypto, len(steps), transport, tail)
        self._one = threading.Lock()
        self._computing: int | None = None  # the thread that has it
        self._closed = threading.Event()
        self._forgotten = closed_when_forgotten(self, self._process, (self._session, self._replica))

    def predict_batch(self, images: Sequence[ImageLike], *, timeout_ms: float | None = None) -> list[Prediction]:
        """Classifies several images, one after the other; see ``EdgeClient.predict_batch``."""
        begun = time.monotonic()
        self._process.require()
        timeout = self._timeout_ms if timeout_ms is None else checked_timeout(timeout_ms)
        given = list(several(images))
        pixels = all_pixels(given, self._crypto.image)
        predictions: list[Prediction] = []
        try:
            for image in pixels:
                predictions.append(self._ask_one(image, begun + timeout / 1000))
        except EnsemblerError as error:
            if self._fallback is None or self._closed.is_set() or not cloud_is_away(error):
                raise
            fallback = self._fallback
            return predictions + [answer_locally(fallback, image, error, begun) for image in given[len(predictions) :]]
        return predictions

    def _ask_one(self, pixels: Any, until: float) -> Prediction:
        started = time.monotonic()
        if not self._one.acquire(timeout=max(0.0, until - started)):
            raise DeadlineExceededError(
                "other images of this client took all the time before the deadline: it computes one after the other; "
                "raise timeout_ms"
            )
        try:
            self._computing = threading.get_ident()
            if self._closed.is_set():
                raise ConfigError("this EdgeClient is closed; make a new one")
            answer = self._session.infer(pixels, until, self._progress)
        except EnsemblerError as error:
            self._replica.counts.failed(error)
            raise
        finally:
            self._computing = None
            self._one.release()
        counts, ended = self._replica.counts, time.monotonic()
        counts.sent(answer.bytes_up, again=False)
        counts.received(answer.bytes_down)
        counts.answered(1000 * (ended - started))
        return self._predicted(answer, 1000 * (ended - started))

    def _predicted(self, answer: CryptoAnswer, total_ms: float) -> Prediction:
        labels = self._crypto.labels
        probabilities = softmax(answer.logits)
        best = np.argsort(-probabilities, kind="stable")[: self._top_k]
        top = tuple((labels[i], float(probabilities[i])) for i in best)
        network = max(0.0, answer.clear_ms - answer.server_clear_ms)
        before = answer.setup_ms + answer.crypto_ms
        timings = Timings(
            head=before,
            queue=0.0,
            server=answer.server_clear_ms,
            network=network,
            tail=max(0.0, total_ms - before - answer.clear_ms),
            total=total_ms,
        )
        return Prediction(
            label=top[0][0],
            score=top[0][1],
            top_k=top,
            probabilities=probabilities,
            logits=answer.logits,
            request_id=answer.request_id,
            timings=timings,
            bytes_up=answer.bytes_up,
            bytes_down=answer.bytes_down,
            crypto=CryptoCost(
                engine=self._crypto.settings.engine,
                setup_ms=answer.setup_ms,
                crypto_ms=answer.crypto_ms,
                clear_ms=answer.clear_ms,
                setup_bytes=answer.setup_bytes,
                crypto_bytes_up=answer.crypto_bytes_up,
                crypto_bytes_down=answer.crypto_bytes_down,
                layers=tuple(
                    LayerCost(name=step.name, ms=1000 * seconds, bytes_up=up, bytes_down=down)
                    for step, (seconds, up, down) in zip(self._steps, answer.layers, strict=True)
                ),
                cpu_s=answer.cpu_s,
                peak_mb=answer.peak_mb,
            ),
        )

    def status(self, *, timeout_ms: float | None = None) -> dict[str, Any]:
        """Asks the server what it holds and whether it is ready; see ``EdgeClient.status``."""
        self._process.require()
        timeout = self._timeout_ms if timeout_ms is None else checked_timeout(timeout_ms)
        net_id = bytes.fromhex(self._crypto.net_id)
        message = Message(operation=STATUS, request_id=os.urandom(REQUEST_ID_BYTES), bodies_id=net_id)
        asked = self._replica.ask(Request(encode(message), message.request_id), again=False)
        try:
            reply = asked.reply(time.monotonic() + timeout / 1000)
            if reply is None:
                raise asked.silence()
        finally:
            asked.close()
        return {**reply.message.info, "fits": reply.message.info.get("bodies_id") == self._crypto.net_id}

    def info(self) -> ClientInfo:
        """Says what this client is, without asking the server; nothing in it is secret."""
        crypto = self._crypto
        return ClientInfo(
            bundle=str(self._folder),
            bodies_id=crypto.net_id,
            num_nets=crypto.num_nets,
            image_size=(crypto.image.height, crypto.image.width),
            num_labels=len(crypto.labels),
            feature_shape=crypto.boundary_shape,
            codec="engine" if crypto.mode == bundles.FULL else "share of 32 bits",
            payload_bytes_up=0 if crypto.mode == bundles.FULL else 4 * packed_row_bytes(crypto.boundary_shape, 8),
            payload_bytes_down=4 * math.prod(crypto.answer_shape),
            precision="float32",
            noise_mode="fresh" if crypto.noise_magnitude else "none",
            dropout=0.0,
            backend=crypto.settings.engine,
            servers=(self._address,),
            encrypted=self._encrypted,
            privacy=None,
        )

    def statistics(self) -> tuple[ReplicaStatistics, ...]:
        """Returns what was counted about the server since this client was made."""
        return (self._replica.counts.read(party=0, server=self._address, preferred=True, resting=False),)

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names, index = class."""
        return self._crypto.labels

    def close(self) -> None:
        """Ends the session and closes the connection.

        A call under way in another thread is waited for. From ``progress`` it ends the call that reports it.
        """
        if not self._process.here:
            return
        self._closed.set()
        if self._computing == threading.get_ident():
            self._session.abandon()
            return
        with self._one:
            self._forgotten.detach()
            self._session.close()
            self._replica.close()

    def __repr__(self) -> str:
        return f"CryptoEdgeClient(server={self._address!r}, net_id={self._crypto.net_id[:12]!r})"
