"""SecretFlow SPU with the protocol Cheetah: two parties, semi-honest, homomorphic encryption and oblivious transfer.

SPU's link is ours (``Link``), so its bytes travel on the connection that the client opened, and neither party listens
for it. Start reading at ``SpuEngine.run``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ensembler.crypto.bundle import Settings
from ensembler.crypto.engine import CLIENT, SERVER, Link, Rank
from ensembler.crypto.shares import Floats, Shares
from ensembler.crypto.steps import IMAGE, Step
from ensembler.protocol.errors import BundleError, InternalError, MissingExtraError

ENGINE_EXTRA = "crypto"
COMPARING = frozenset({"Clip", "MaxPool", "Relu"})


class SpuEngine:
    """See ``engine.Engine``; arguments as ``engine.open_engine``."""

    def __init__(
        self,
        settings: Settings,
        link: Link,
        rank: Rank,
        steps: Sequence[Step],
        weights: Path | None,
        image_shape: tuple[int, ...],
    ) -> None:
        self._spu = spu = _libspu()
        self._rank, self._steps, self._shape, self._settings = rank, steps, image_shape, settings
        self._programs = [_executable(spu, step) for step in steps]
        config = runtime_config(spu, settings)
        description = spu.link.Desc()
        description.id = "ensembler"
        for name in ("server", "client"):
            description.add_party(name, name)
        channels: list[Any] = [None, None]
        channels[1 - rank] = _channel(spu, link)
        # Kept: SPU has its address alone.
        self._channels = channels
        self._context = spu.link.create_with_channels(description, rank, channels)
        self._runtime = spu.RuntimeWrapper(self._context, config)
        self._io = spu.IoWrapper(2, config)
        self._owned = f"<{settings.field},{{}}>"
        self._put_weights(weights)
        self._warm_up()

    def run(self, image: Floats | None, told: Callable[[int], None]) -> Shares:
        """See ``Engine``."""
        self._put(IMAGE, np.zeros(self._shape, np.float32) if image is None else image, CLIENT)
        for done, program in enumerate(self._programs, start=1):
            self._runtime.Run(program)
            told(done)
        last = self._steps[-1]
        share = _own_share(self._runtime.GetVar(last.output), last, self._settings)
        for step in self._steps:
            self._runtime.DelVar(step.output)
        return share

    def _warm_up(self) -> None:
        """Runs the first layers on an image of zeros: their first run sets keys and oblivious transfers up, once."""
        compared = (place for place, step in enumerate(self._steps) if step.operator in COMPARING)
        last = next(compared, len(self._steps) - 1)
        self._put(IMAGE, np.zeros(self._shape, np.float32), CLIENT)
        for program in self._programs[: last + 1]:
            self._runtime.Run(program)
        for step in self._steps[: last + 1]:
            self._runtime.DelVar(step.output)

    def _put_weights(self, weights: Path | None) -> None:
        found = {} if weights is None else dict(np.load(weights, allow_pickle=False))
        for step in self._steps:
            for name, shape in step.weights:
                value = found.get(name, np.zeros(shape, np.float32))
                if value.shape != shape or (weights is not None and name not in found):
                    raise BundleError(f"{weights} does not hold {name} of {shape}; export the bundle again")
                self._put(name, value, SERVER)

    def _put(self, name: str, value: Floats, owner: Rank) -> None:
        """Gives a private input; who does not own it gives zeros of its shape."""
        value = np.ascontiguousarray(value, np.float32)
        share = self._io.MakeShares(value, self._spu.Visibility.VIS_SECRET, owner)[self._rank]
        # Without the colocated layout SPU takes no notice of the owner, and would compute garbage.
        kind = share.meta.decode("latin-1") if isinstance(share.meta, bytes) else str(share.meta)
        if not ("Priv2k" in kind and self._owned.format(owner) in kind):
            raise InternalError(f"SPU did not keep {name} with its owner")
        self._runtime.SetVar(name, share)


def runtime_config(spu: Any, settings: Settings) -> Any:
    """Returns SPU's configuration; the compiler and both parties need the same."""
    field = getattr(spu.FieldType, settings.field)
    config = spu.RuntimeConfig(spu.ProtocolKind.CHEETAH, field, settings.fraction_bits)
    config.experimental_enable_colocated_optimization = True
    return config


def _libspu() -> Any:
    try:
        from spu import libspu
    except ImportError as error:
        raise MissingExtraError("spu", ENGINE_EXTRA, "crypto-clear inference") from error
    options = libspu.logging.LogOptions()
    options.log_level = libspu.logging.LogLevel.ERROR
    options.enable_console_logger = False
    # It always writes a file, into the current folder where nothing is said; this one is gone once it is open.
    with tempfile.TemporaryDirectory() as folder:
        options.system_log_path = str(Path(folder) / "spu.log")
        libspu.logging.setup_logging(options)
    return libspu


def _executable(spu: Any, step: Step) -> Any:
    program = spu.Executable()
    try:
        program.ParseFromString(step.code)
    except Exception as error:  # SPU's own
        raise BundleError(f"the step {step.name} is no program of SPU; export the bundle again") from error
    return program


def _own_share(variable: Any, step: Step, settings: Settings) -> Shares:
    """Reads this party's additive share, little-endian integers of the ring."""
    kind = variable.meta.decode("latin-1") if isinstance(variable.meta, bytes) else str(variable.meta)
    if f"AShr<{settings.field}>" not in kind:
        raise InternalError(f"SPU left the result of {step.name} in another form than an additive share")
    content = b"".join(_content(chunk) for chunk in variable.share_chunks)
    return np.frombuffer(content, f"<u{settings.ring_bits // 8}").astype(np.uint64).reshape(step.shape)


def _content(chunk: Any) -> bytes:
    """Returns the bytes of a share's piece: the third field of its message, which comes last."""
    data, position = bytes(chunk), 0
    while position < len(data):
        tag, position = _varint(data, position)
        value, position = _varint(data, position)
        if tag == (3 << 3 | 2):
            return data[position : position + value]
    return b""


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        shift, position = shift + 7, position + 1
        if byte < 128:
            return value, position


def _channel(spu: Any, link: Link) -> Any:
    """Returns SPU's channel over ``link``; the names of its methods are C++'s."""

    class Channel(spu.link.IChannel):  # type: ignore[misc]
        def SendAsync(self, key: str, data: bytes) -> None:  # noqa: N802
            link.send(key, data)

        def SendAsyncThrottled(self, key: str, data: bytes) -> None:  # noqa: N802
            link.send(key, data)

        def Send(self, key: str, data: bytes) -> None:  # noqa: N802
            link.send(key, data)

        def Recv(self, key: str) -> bytes:  # noqa: N802
            return link.receive(key)

        def TestSend(self, timeout_ms: int) -> None:  # noqa: N802
            pass

        def TestRecv(self) -> None:  # noqa: N802
            pass

        def SetThrottleWindowSize(self, size: int) -> None:  # noqa: N802
            pass

        def SetChunkParallelSendSize(self, size: int) -> None:  # noqa: N802
            pass

        def WaitLinkTaskFinish(self) -> None:  # noqa: N802
            pass

        def Abort(self) -> None:  # noqa: N802
            pass

    return Channel()
