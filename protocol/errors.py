"""The one tree of errors, and the code each has on the wire.

::

    EnsemblerError
    ├── InvalidInputError        the caller's argument or file
    │   ├── ConfigError          an option, a combination of options
    │   ├── DataError            a data set
    │   ├── ImageError           an image given to predict()
    │   └── KeyFileError         a key file or a passphrase
    ├── MissingExtraError        an optional package is not installed
    ├── BundleError              a client or server bundle
    │   ├── BundleVersionError   written by another version of the format
    │   ├── BundleTamperedError  a file does not have its digest
    │   └── BundleMismatchError  client and server bundle do not belong together
    ├── TrainingError            a training process ended without saying why
    ├── ExportError              the export pipeline
    │   └── GateFailedError      parity or privacy is worse than the gates allow
    ├── TransportError           no answer from the server
    │   ├── ServerUnreachableError
    │   ├── AuthenticationError  the CURVE handshake was refused
    │   └── DeadlineExceededError
    └── WireError                an error with a code on the wire
        ├── ProtocolError        bytes that are not a frame of this protocol          101
        │   └── LimitExceededError  larger than a limit of this protocol              102
        └── ServerError          the server answered with an error
            ├── UnsupportedVersionError                                               103
            ├── BadRequestError      a well-formed frame that asks for nonsense       104
            ├── UnknownBodiesError   the server does not hold the nets of this client 201
            ├── BusyError            the queue is full: retry after `retry_after_ms`  301
            ├── ExpiredError         the deadline passed before the work was done     302
            ├── ShuttingDownError    the server drains before it stops                303
            ├── NotAuthorizedError   this device's key was withdrawn                  401
            └── InternalError        anything else; the server's log has the reason   501

Every message says what happened, which input it was, and what to do. Wire codes are grouped: 1xx the request's bytes,
2xx the request's target, 3xx try again, 4xx the device, 5xx the server's fault. A retired code is never used again.
"""

from __future__ import annotations

from typing import ClassVar


class EnsemblerError(Exception):
    """The root: ``except EnsemblerError`` catches whatever this package raises on purpose."""


class InvalidInputError(EnsemblerError):
    """The caller's argument or file cannot be used."""


class ConfigError(InvalidInputError):
    """An option has an impossible value, alone or together with another."""


class DataError(InvalidInputError):
    """A data set cannot be read, or is not what its specification says."""


class ImageError(InvalidInputError):
    """An image given to ``predict()`` cannot be read or has the wrong shape or dtype."""


class KeyFileError(InvalidInputError):
    """A key file or passphrase is missing, unreadable, not a key, or not the right one."""


class MissingExtraError(EnsemblerError):
    """An optional dependency is missing; the message names the install command."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}: pip install 'ensembler-edge[{extra}]'")


class TrainingError(EnsemblerError):
    """A process that trained a net was killed, or failed; what it had stored is kept."""


class BundleError(EnsemblerError):
    """A bundle is missing, incomplete or malformed."""


class BundleVersionError(BundleError):
    """A bundle was written in a version of the format that this package does not read."""


class BundleTamperedError(BundleError):
    """A file of a bundle does not have the digest that the manifest states."""


class BundleMismatchError(BundleError):
    """Two bundles, or a bundle and a run, do not belong together."""


class ExportError(EnsemblerError):
    """The export pipeline could not produce an artifact."""


class GateFailedError(ExportError):
    """The parity report, or the privacy audit, is worse than the gates allow; nothing was exported."""


class TransportError(EnsemblerError):
    """No answer came from the server."""


class ServerUnreachableError(TransportError):
    """No connection to the server could be made, or it was lost and not restored in time."""


class AuthenticationError(TransportError):
    """The encrypted handshake was refused: wrong server key, or the server does not know this device.

    ``certain`` is False where the connection ended during the handshake and nobody said why: a server that does not
    have the pinned key ends it so, and also one that is just being stopped.
    """

    def __init__(self, message: str, *, certain: bool = True) -> None:
        super().__init__(message)
        self.certain = certain


class DeadlineExceededError(TransportError):
    """The deadline passed before an answer came."""


class WireError(EnsemblerError):
    """An error with a code on the wire; see the subclasses."""

    code: ClassVar[int]


class ProtocolError(WireError):
    """Bytes that are not a message of this protocol."""

    code = 101


class LimitExceededError(ProtocolError):
    """A message beyond a limit of this protocol, refused before anything was allocated for it."""

    code = 102


class ServerError(WireError):
    """The server answered with an error."""


class UnsupportedVersionError(ServerError):
    """The peer speaks another version of the protocol."""

    code = 103


class BadRequestError(ServerError):
    """A well-formed message that asks for something the server does not offer (shape, codec, operation)."""

    code = 104


class UnknownBodiesError(ServerError):
    """The server does not hold the nets that this client was exported for."""

    code = 201


class BusyError(ServerError):
    """The server's queue is full; ``retry_after_ms`` says when to try again."""

    code = 301

    def __init__(self, message: str, retry_after_ms: float = 50.0) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class ExpiredError(ServerError):
    """The request's deadline passed while it waited in the server's queue; it was not computed."""

    code = 302


class ShuttingDownError(ServerError):
    """The server is draining and takes no new work."""

    code = 303


class NotAuthorizedError(ServerError):
    """The server let this device in and has withdrawn its key since."""

    code = 401


class InternalError(ServerError):
    """The server failed; its log holds the reason, the wire does not."""

    code = 501


WIRE_ERRORS: dict[int, type[WireError]] = {
    cls.code: cls
    for cls in (
        ProtocolError,
        LimitExceededError,
        UnsupportedVersionError,
        BadRequestError,
        UnknownBodiesError,
        BusyError,
        ExpiredError,
        ShuttingDownError,
        NotAuthorizedError,
        InternalError,
    )
}


def from_wire(code: int, message: str, retry_after_ms: float) -> WireError:
    """Builds the error that a peer sent.

    Args:
        code: a code of ``WIRE_ERRORS``; an unknown one (of a later version) becomes ``InternalError``.
        message: the peer's sentence.
        retry_after_ms: when to try again, for ``BusyError``.
    """
    cls = WIRE_ERRORS.get(code)
    if cls is None:
        return InternalError(f"the server answered with the unknown error code {code}: {message}")
    if cls is BusyError:
        return BusyError(message, retry_after_ms)
    return cls(message)
