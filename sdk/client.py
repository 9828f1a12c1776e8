"""The client: one call per image, and a right answer or one typed error before the deadline."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextvars import copy_context
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from ensembler.edge_runtime import sealing
from ensembler.edge_runtime.images import ImageLike, all_pixels, several
from ensembler.edge_runtime.runtime import EdgeRuntime, softmax
from ensembler.fallback import Fallback, answer_locally, cloud_is_away
from ensembler.forgotten import closed_when_forgotten
from ensembler.info import ClientInfo, describe
from ensembler.party import Party, exchange_all
from ensembler.prediction import Prediction, Timings
from ensembler.process import OwnProcess
from ensembler.protocol.errors import ConfigError, EnsemblerError, KeyFileError
from ensembler.protocol.manifest import Kdf, WireSpec, of_crypto
from ensembler.protocol.messages import INFER, LIMITS, REQUEST_ID_BYTES, STATUS, Message
from ensembler.protocol.options import expanded, milliseconds, whole
from ensembler.replica import Replica, Reply
from ensembler.servers import ServerKeys, Servers, server_addresses, server_keys
from ensembler.statistics import ReplicaStatistics
from ensembler.streaming import answers, checked_in_flight
from ensembler.tracing import trace_info
from ensembler.transport import keys as key_files
from ensembler.transport.base import Transport
from ensembler.transport.zmq_client import ZmqTransport

Codes = npt.NDArray[np.uint8]

T = TypeVar("T")

KEY_VARIABLE = "ENSEMBLER_DEVICE_KEY"
KEY_NAME = "device.key_secret"
BUNDLE_KEY_VARIABLE = "ENSEMBLER_BUNDLE_KEY"
# A long batch is sent in parts of at most so many images, so many at a time: while one is computed by the servers, the
# next is on its way and the head has the one after that. The server batches further by itself.
MAX_REQUEST_ROWS = 32
TIMEOUT_MS = 5000.0
PARTS_UNDER_WAY = 3


class _Part(NamedTuple):
    """Images on their way: their codes, and when (``time.monotonic()``) their preparing began and ended."""

    codes: Codes
    started: float
    encoded: float


class EdgeClient:
    """Predicts images with a head and tail on this device and N nets on a server.

    Thread-safe: calls from several threads run side by side, each on its own connection. A bundle of crypto-clear
    inference makes a ``crypto_client.CryptoEdgeClient``, with the same calls.

    Belongs to the process that made it. In a forked child every call that would ask the server raises ``ConfigError``,
    ``close`` does nothing, and the parent's client goes on working; make a new client in the child.

    Args:
        bundle: the folder of a client bundle.
        server: ``tcp://host:port``; for a bundle of several operators one entry for each, in the bundle's order. An
            entry may be several addresses, in a sequence or in one text with commas: replicas, servers of the same
            operator with the same nets, of which one is asked, and another one when that fails.
        key: the device's secret key file. None looks at ``$ENSEMBLER_DEVICE_KEY``,
            ``BUNDLE/../keys/device.key_secret``, ``~/.config/ensembler/device.key_secret``,
            ``/etc/ensembler/device.key_secret``, in this order.
        bundle_key: opens a bundle that is encrypted with a key file: the path of that file, or its 32 bytes. Without
            this and ``passphrase``, ``$ENSEMBLER_BUNDLE_KEY`` is the path of a file with what the bundle asks for, a
            key or a passphrase. Neither is kept.
        passphrase: opens a bundle that is encrypted with a passphrase.
        server_key: the public key of the servers, instead of what the bundle pins: the path of its file, or its 40
            characters. A mapping from addresses to keys holds for those; the others keep what the bundle pins.
        plaintext: connect without encryption and authentication. Never the default, also when the bundle pins no key.
        timeout_ms: the deadline of a call that gives none itself. None: 5 seconds, and 2 minutes with a bundle of
            crypto-clear inference.
        threads: of one run of head or tail; None takes what ``ensembler bench device --write`` found best, else one.
        backend: ``onnxruntime``, ``ai-edge-litert`` or ``tflite-runtime``; ``auto`` takes one that is installed and
            reads the bundle's models: what ``ensembler bench device --write`` found best, else the bundle's default
            format first.
        top_k: how many classes ``Prediction.top_k`` holds.
        fallback: called with ``(image, error)`` when the cloud is away (``fallback.cloud_is_away``: no connection, no
            answer before the deadline, a full or a stopping server); its ``Prediction`` is the answer. See
            ``Prediction.local``. It may be called from several threads. None raises the error.
        transport: moves the frames instead of ZeroMQ, one for each address; for tests.
        insecure_engine: takes a bundle of crypto-clear inference whose engine protects nothing; for tests.

    Raises:
        BundleError: the bundle is missing, damaged or of another version.
        KeyFileError: no device key was found, or it is not one; or the bundle is encrypted and does not open.
        ConfigError: an impossible option.
        MissingExtraError: no inference runtime for the bundle is installed, or what decrypts the bundle is not.
    """

    def __new__(cls, bundle: str | os.PathLike[str], *_: Any, **__: Any) -> EdgeClient:
        """Makes the client for the kind of bundle."""
        if cls is EdgeClient and of_crypto(expanded("bundle", bundle)):
            from ensembler.crypto_client import CryptoEdgeClient

            return super().__new__(CryptoEdgeClient)
        return super().__new__(cls)

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
        threads: int | None = None,
        backend: str = "auto",
        top_k: int = 5,
        fallback: Fallback | None = None,
        transport: Transport | Sequence[Transport] | None = None,
        insecure_engine: bool = False,
    ) -> None:
        if insecure_engine:
            raise ConfigError(f"insecure_engine is for a bundle of crypto-clear inference; {bundle} is none")
        if fallback is not None and not callable(fallback):
            raise ConfigError(f"fallback is {type(fallback).__name__}; give a function of an image and an error")
        top_k = whole("top_k", top_k, 1)
        self._process = OwnProcess()
        self._timeout_ms = checked_timeout(TIMEOUT_MS if timeout_ms is None else timeout_ms)
        folder = expanded("bundle", bundle)
        secret = secret_finder(bundle_key, passphrase)
        self._runtime = EdgeRuntime(folder, threads=threads, backend=backend, secret=secret)
        self._manifest = self._runtime.manifest
        refuse_idle_secret(folder, self._manifest, bundle_key, passphrase)
        self._request_rows = _rows_per_request(self._manifest.wire)
        self._top_k = min(top_k, len(self._manifest.labels))
        servers = server_addresses(server, len(self._manifest.parties), folder)
        self._describe = partial(
            describe,
            folder,
            self._manifest,
            backend=self._runtime.backend,
            servers=tuple(map(",".join, servers)),
            encrypted=transport is None and not plaintext,
        )
        self._fallback = fallback
        transports: Sequence[Transport]
        if transport is not None:
            transports = [transport] if not isinstance(transport, Sequence) else transport
        else:
            pinned = [party.server_public_key for party in self._manifest.parties]
            transports = open_transports(folder, servers, pinned, key, server_key, plaintext=plaintext)
        addresses = [address for replicas in servers for address in replicas]
        made = iter([Replica(*each) for each in zip(addresses, transports, strict=True)])
        self._parties = [
            Party(spec, tuple(islice(made, len(replicas))))
            for spec, replicas in zip(self._manifest.parties, servers, strict=True)
        ]
        self._closed = threading.Event()
        self._forgotten = closed_when_forgotten(self, self._process, self._parties)

    # --- the public calls ---

    def predict(self, image: ImageLike, *, timeout_ms: float | None = None) -> Prediction:
        """Classifies one image.

        Args:
            image: a path, encoded bytes, a PIL image, or an array: ``(H, W, 3)`` RGB, ``(H, W, 4)`` RGBA, ``(H, W)`` or
                ``(H, W, 1)`` grey, uint8 or uint16.
            timeout_ms: this call's deadline in milliseconds, instead of the client's.

        Raises:
            ImageError: the image cannot be used.
            TransportError: no answer in time; see its subclasses.
            ServerError: the server refused.
            ProtocolError: the server answered with something that is not an answer.
        """
        return self.predict_batch([image], timeout_ms=timeout_ms)[0]

    def predict_batch(self, images: Sequence[ImageLike], *, timeout_ms: float | None = None) -> list[Prediction]:
        """Classifies several images, in order; arguments and errors as ``predict``, the deadline is for all of them.

        More than 32 images travel in parts, of which three are under way at once. Either every image gets its answer or
        the call raises, as soon as a part has failed (and Ctrl-C ends it at once); parts that are still under way then
        end by themselves, by the deadline at the latest. With a ``fallback``: once the cloud is away, it answers the
        rest of the images.
        """
        begun = time.monotonic()
        self._process.require()
        timeout = self._timeout_ms if timeout_ms is None else checked_timeout(timeout_ms)
        deadline = begun + timeout / 1000
        given = list(several(images))
        pixels = all_pixels(given, self._manifest.image)
        predictions: list[Prediction] = []
        try:
            for part in self._parts(pixels, begun, deadline):
                predictions += part
        except EnsemblerError as error:
            # A client that is closed has no server either, but nobody wants its answers any more.
            if self._fallback is None or self._closed.is_set() or not cloud_is_away(error):
                raise
            fallback = self._fallback
            return predictions + [answer_locally(fallback, image, error, begun) for image in given[len(predictions) :]]
        return predictions

    def stream(
        self,
        images: Iterable[ImageLike],
        *,
        in_flight: int = 4,
        newest: bool = False,
        timeout_ms: float | None = None,
    ) -> Generator[tuple[int, Prediction], None, None]:
        """Classifies the images of an iterable, several at once, and yields ``(index, prediction)`` in their order.

        ``images`` is read in a thread of its own, never more than ``in_flight`` images ahead of what was taken from
        here. The first error of an image or of ``images`` itself is raised at its place in the order and ends the
        generator. However it ends (also by ``break`` or ``close()``), it first waits for the calls in flight, by their
        deadline at the latest, and leaves no thread behind. The one exception: ``images`` that block cannot be
        interrupted; after a second their thread is left, which does not keep the program alive.

        Args:
            images: any iterable of what ``predict`` takes; may be endless.
            in_flight: how many images may be on their way, or answered and not yet taken.
            newest: for cameras. ``images`` is read all the time, and an image that cannot start at once is replaced by
                the next, so what starts is always the newest; the index, its position in ``images``, then skips. With
                ``in_flight=1`` an answer waits for nobody but you.
            timeout_ms: the deadline of each image, from when it starts.

        Raises:
            ConfigError: an impossible option, at once; otherwise errors as ``predict``, from the generator.
            ImageError: one image was given instead of several, at once.
        """
        self._process.require()
        timeout = self._timeout_ms if timeout_ms is None else checked_timeout(timeout_ms)
        return answers(
            lambda image: self.predict(image, timeout_ms=timeout),
            several(images),
            in_flight=checked_in_flight(in_flight),
            newest=newest,
        )

    def status(self, *, timeout_ms: float | None = None) -> dict[str, Any]:
        """Asks the server which nets it holds and whether it is ready; errors as ``predict``.

        Returns:
            ``bodies_id``, ``num_nets``, ``precision``, ``state``, ``queued_rows``, and ``fits``: whether the nets are
            those of this bundle. With several operators ``fits``, and ``parties``: a list of those, in their order.
        """
        self._process.require()
        timeout = self._timeout_ms if timeout_ms is None else checked_timeout(timeout_ms)
        request_id = os.urandom(REQUEST_ID_BYTES)
        requests = [
            Message(operation=STATUS, request_id=request_id, bodies_id=each.bodies_id) for each in self._parties
        ]
        replies = exchange_all(self._parties, requests, time.monotonic() + timeout / 1000)
        found = [
            {**reply.message.info, "fits": reply.message.info.get("bodies_id") == party.spec.bodies_id}
            for party, reply in zip(self._parties, replies, strict=True)
        ]
        return found[0] if len(found) == 1 else {"fits": all(each["fits"] for each in found), "parties": found}

    def info(self) -> ClientInfo:
        """Says what this client is, without asking the server; nothing in it is secret."""
        return self._describe()

    def statistics(self) -> tuple[ReplicaStatistics, ...]:
        """Returns what was counted about each server since this client was made: per operator, its replicas in order.

        No server is asked, and nothing in it is secret.
        """
        return tuple(each for index, party in enumerate(self._parties) for each in party.statistics(index))

    @property
    def timeout_ms(self) -> float:
        """The deadline of a call that gives none itself, in milliseconds."""
        return self._timeout_ms

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names, index = class."""
        return self._manifest.labels

    def close(self) -> None:
        """Closes all connections; calls in other threads end with an error. Further calls raise.

        Does nothing in a forked child: the connections are the parent's.
        """
        if not self._process.here:
            return
        self._closed.set()
        self._forgotten.detach()
        for party in self._parties:
            party.close()

    def __enter__(self) -> EdgeClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        """Refuses to be copied or pickled, for instance to a pool's processes, with the cure.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "a client has connections and a secret key of its own and cannot be copied or sent to another process: "
            "make a new one there, with the same arguments"
        )

    def __repr__(self) -> str:
        servers = [",".join(party.servers) for party in self._parties]
        shown = servers[0] if len(servers) == 1 else servers
        return f"EdgeClient(server={shown!r}, bodies_id={self._manifest.wire.bodies_id[:12]!r})"

    # --- a batch in parts ---

    def _parts(self, pixels: Sequence[Codes], begun: float, deadline: float) -> Generator[list[Prediction]]:
        """Yields the predictions of each part, in order; the first one's time counts from ``begun``."""
        count = -(-len(pixels) // self._request_rows)
        if count <= 1:
            if pixels:
                yield self._ask(self._encode(pixels, begun), deadline)
            return
        rows = -(-len(pixels) // count)
        under_way: deque[Future[list[Prediction]]] = deque()
        for start in range(0, len(pixels), rows):
            self._raise_failed(under_way)
            if len(under_way) == PARTS_UNDER_WAY:
                yield self._first(under_way)
            # One head after the other: two at once would both be late.
            part = self._encode(pixels[start : start + rows], time.monotonic() if start else begun)
            under_way.append(_in_thread(partial(self._ask, part, deadline)))
        while under_way:
            yield self._first(under_way)

    def _first(self, under_way: deque[Future[list[Prediction]]]) -> list[Prediction]:
        """Waits for the first part and takes it out; what fails meanwhile is raised as ``_raise_failed`` says."""
        while not under_way[0].done():
            pending = [part for part in under_way if not part.done()]
            self._raise_failed(under_way)  # what ended before ``pending`` was made will not end the wait
            wait(pending, return_when=FIRST_COMPLETED)
        self._raise_failed(under_way)
        return under_way.popleft().result()

    def _raise_failed(self, under_way: Iterable[Future[list[Prediction]]]) -> None:
        """Raises what has failed already, but for what a fallback can answer after the parts before it."""
        errors = [error for part in under_way if part.done() and (error := part.exception()) is not None]
        for error in errors:
            if self._fallback is None or not (isinstance(error, EnsemblerError) and cloud_is_away(error)):
                raise error

    def _encode(self, pixels: Sequence[Codes], started: float) -> _Part:
        codes = self._runtime.encode(np.stack(pixels))
        return _Part(codes, started, time.monotonic())

    # --- one request ---

    def _ask(self, part: _Part, deadline: float) -> list[Prediction]:
        codes, started, encoded = part
        sent = time.monotonic()
        request_id = os.urandom(REQUEST_ID_BYTES)
        wire, info = self._manifest.wire, trace_info()
        requests = [
            Message(
                operation=INFER,
                request_id=request_id,
                bodies_id=party.bodies_id,
                budget_ms=max(0.0, 1000 * (deadline - sent)),
                tensor=party.heard(codes),
                bits=wire.feature_codec.bits,
                info=info,
            )
            for party in self._parties
        ]
        replies = exchange_all(self._parties, requests, deadline)
        received = time.monotonic()
        answers = [party.answers(reply, len(codes), wire) for party, reply in zip(self._parties, replies, strict=True)]
        logits = self._runtime.finish(answers[0] if len(answers) == 1 else np.concatenate(answers, axis=1))
        probabilities = softmax(logits)
        ended = time.monotonic()
        # Of several operators the slowest counts: the others' time passes meanwhile.
        slowest = max(replies, key=lambda reply: reply.number("queue_ms") + reply.number("compute_ms"))
        queue_ms, server_ms = slowest.number("queue_ms"), slowest.number("compute_ms")
        timings = Timings(
            head=1000 * (encoded - started),
            queue=queue_ms,
            server=server_ms,
            network=max(0.0, 1000 * (received - sent) - queue_ms - server_ms),
            tail=1000 * (ended - received),
            total=1000 * (ended - started),
        )
        return [
            self._prediction(logits[i], probabilities[i], request_id.hex(), timings, replies) for i in range(len(codes))
        ]

    def _prediction(
        self,
        logits: npt.NDArray[np.float32],
        probabilities: npt.NDArray[np.float32],
        request_id: str,
        timings: Timings,
        replies: Sequence[Reply],
    ) -> Prediction:
        best = np.argsort(-probabilities, kind="stable")[: self._top_k]
        top = tuple((self._manifest.labels[i], float(probabilities[i])) for i in best)
        return Prediction(
            label=top[0][0],
            score=top[0][1],
            top_k=top,
            probabilities=probabilities,
            logits=logits,
            request_id=request_id,
            timings=timings,
            bytes_up=sum(reply.bytes_up for reply in replies),
            bytes_down=sum(reply.bytes_down for reply in replies),
        )


def secret_finder(
    bundle_key: str | os.PathLike[str] | bytes | None = None, passphrase: str | None = None
) -> Callable[[Kdf], sealing.BundleSecret | None]:
    """Returns what looks for the secret of an encrypted bundle: the arguments, then the environment."""
    if bundle_key is not None and passphrase is not None:
        raise ConfigError("bundle_key and passphrase were both given; a bundle is encrypted with one of them")
    if passphrase is not None and not isinstance(passphrase, str):
        raise ConfigError(f"passphrase is {type(passphrase).__name__}; give a text (str), or a key file as bundle_key")
    if bundle_key is not None and not isinstance(bundle_key, bytes):
        bundle_key = expanded("bundle_key", bundle_key)

    def find(kdf: Kdf) -> sealing.BundleSecret | None:
        if bundle_key is not None:
            return sealing.key(bundle_key)
        if passphrase is not None:
            return sealing.passphrase(passphrase)
        named = os.environ.get(BUNDLE_KEY_VARIABLE)
        return sealing.from_file(named, kdf) if named else None

    return find


def refuse_idle_secret(
    folder: Path,
    manifest: sealing.Sealable,
    bundle_key: str | os.PathLike[str] | bytes | None = None,
    passphrase: str | None = None,
) -> None:
    """Refuses a secret for a bundle that is not encrypted: it may stand in the place of one that is.

    Raises:
        ConfigError: the bundle is plain, and there is a key or a passphrase.
    """
    if manifest.encryption is None and (bundle_key is not None or passphrase is not None):
        raise ConfigError(
            f"the bundle {folder} is not encrypted, and a key or passphrase for it was given; leave that out, or "
            "look whether it is the right bundle"
        )


def _rows_per_request(wire: WireSpec) -> int:
    """Returns how many images fit into one request and its reply, also when they are unpacked."""
    codes = max(math.prod(wire.feature_shape), wire.num_nets * wire.answer_width)
    return max(1, min(MAX_REQUEST_ROWS, LIMITS.tensor_bytes // codes))


def _in_thread(call: Callable[[], T]) -> Future[T]:
    """Runs ``call`` in a thread that keeps no program alive, with the caller's context variables: a trace goes on."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised in the caller's thread
            future.set_exception(error)

    threading.Thread(target=copy_context().run, args=(run,), name="ensembler-part", daemon=True).start()
    return future


def open_transports(
    folder: Path,
    servers: Sequence[Sequence[str]],
    pinned: Sequence[str | None],
    key: str | os.PathLike[str] | None,
    server_key: ServerKeys | None,
    *,
    plaintext: bool,
) -> list[ZmqTransport]:
    """Opens a transport for each address, in order; ``pinned`` are the bundle's keys of the operators' servers."""
    if not isinstance(plaintext, bool):  # "false" is true
        raise ConfigError(f"plaintext = {plaintext!r}: give True or False")
    if plaintext:
        if server_key is not None:
            raise ConfigError("server_key and plaintext were both given; a key is for an encrypted connection")
        return _opened(ZmqTransport(address, server_key=None, keys=None) for each in servers for address in each)
    known = server_keys(server_key, servers, pinned)
    if any(public is None for _, public in known):
        raise ConfigError(
            f"the bundle {folder} pins no server key, so the server cannot be known; export with --server-key, "
            "pass server_key (--server-key), or pass plaintext=True (--plaintext) if nobody else can reach the network"
        )
    places = [folder.resolve().parent / "keys" / KEY_NAME, *key_files.standard_places(KEY_NAME)]
    path = key_files.find(key, KEY_VARIABLE, places)
    if path is None:
        raise KeyFileError(
            f"no device key: pass key (--key), set {KEY_VARIABLE}, or put {KEY_NAME} into "
            f"{' or '.join(str(place.parent) for place in places)}; ensembler keys new makes a pair"
        )
    pair = key_files.load_pair(path)
    return _opened(ZmqTransport(address, server_key=public, keys=pair) for address, public in known)


def _opened(transports: Iterable[ZmqTransport]) -> list[ZmqTransport]:
    """Opens all or none."""
    done: list[ZmqTransport] = []
    try:
        done.extend(transports)
    except BaseException:
        for transport in done:
            transport.close()
        raise
    return done


def checked_timeout(timeout_ms: float) -> float:
    """Returns ``timeout_ms`` if it can be a deadline.

    Raises:
        ConfigError: no number, not above 0, or more than a day.
    """
    return milliseconds("timeout_ms", timeout_ms, 24 * 3600 * 1000)
