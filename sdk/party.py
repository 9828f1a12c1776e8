"""One operator, as a client sees it: a few replicas of the same nets, of which one answers each request.

A request goes to the replica that answered last. The next one gets the same bytes when it fails, or has said nothing
for its share of the time that is left; those that were asked before are still listened to. Never are two asked at
once from the start: that would double the load of all.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ensembler.protocol.errors import (
    AuthenticationError,
    BusyError,
    DeadlineExceededError,
    EnsemblerError,
    ProtocolError,
    ServerUnreachableError,
    ShuttingDownError,
    TransportError,
)
from ensembler.protocol.manifest import PartySpec, WireSpec
from ensembler.protocol.messages import Message, encode
from ensembler.replica import Asked, Replica, Reply, Request
from ensembler.statistics import ReplicaStatistics
from ensembler.transport.base import closed_in_use

Codes = npt.NDArray[np.uint8]

SHUTDOWN_RETRY_S = 0.1
# Between two tries of a replica that is away; the wait doubles.
RECONNECT_S = 0.05
RECONNECT_MAX_S = 1.0
# A server cannot make the device spin.
MIN_RETRY_S = 0.001
# How long one of several silent replicas is listened to before the next one.
LISTEN_S = 0.005

# When replicas failed in different ways, the one that passes soonest by itself is the call's error.
_HOPE = (BusyError, ShuttingDownError, DeadlineExceededError, ServerUnreachableError, EnsemblerError)


class Party:
    """Asks one operator. Thread-safe.

    Args:
        spec: which of the N nets it holds.
        replicas: its servers, the preferred one first.
    """

    def __init__(self, spec: PartySpec, replicas: Sequence[Replica]) -> None:
        self.spec = spec
        self.replicas = tuple(replicas)
        self.servers = tuple(replica.server for replica in self.replicas)
        self.bodies_id = bytes.fromhex(spec.bodies_id)
        self.closed = threading.Event()
        self._preferred = self.replicas[0]

    def heard(self, codes: Codes) -> Codes:
        """Returns the part of an image's codes ``(B, C, ...)`` that this operator is sent."""
        channels = self.spec.channels
        return codes if channels is None else np.ascontiguousarray(codes[:, slice(*channels)])

    def exchange(self, request: Message, deadline: float) -> Reply:
        """Sends a request until it is answered; every retry, to whichever replica, sends the same bytes.

        Encoding again would add new noise to the same image, which a server could average away.

        Args:
            request: the message.
            deadline: on the clock of ``time.monotonic()``, in seconds.

        Raises:
            TransportError: no answer in time; see its subclasses.
            ServerError: the server refused.
            ProtocolError: the server answered with something that is not an answer.
            ConfigError: closed meanwhile.
        """
        return _Exchange(self, Request(encode(request), request.request_id), deadline).run()

    def prefer(self, replica: Replica) -> None:
        """Notes which replica answered last."""
        replica.wake()
        self._preferred = replica

    def order(self) -> list[Replica]:
        """Returns the replicas in the order in which a request goes to them."""
        return sorted(self.replicas, key=lambda replica: (replica.resting, replica is not self._preferred))

    def statistics(self, party: int) -> list[ReplicaStatistics]:
        """Returns the numbers of each replica; ``party`` is the position of this one."""
        first = self.order()[0]
        return [
            each.counts.read(party=party, server=each.server, preferred=each is first, resting=each.resting)
            for each in self.replicas
        ]

    def answers(self, reply: Reply, rows: int, wire: WireSpec) -> Codes:
        """Returns the codes ``(rows, n, F)`` of this party's n nets.

        All are checked alike, before any is selected: a server that spoils one body's answer must not learn from the
        client's behaviour whether that body counts.

        Raises:
            ProtocolError: another shape, codec or other nets than were asked for.
        """
        message = reply.message
        expected = (rows, self.spec.num_nets, wire.answer_width)
        if message.tensor is None or message.tensor.shape != expected or message.bits != wire.answer_bits:
            shape = None if message.tensor is None else message.tensor.shape
            raise ProtocolError(
                f"{reply.server} answered with shape {shape} in {message.bits} bits, {expected} in {wire.answer_bits} "
                "was asked for; is it the right server?"
            )
        if message.bodies_id != self.bodies_id:
            raise ProtocolError(f"{reply.server} answered for other nets than were asked for")
        return message.tensor

    def close(self) -> None:
        """Closes all connections; exchanges in other threads end with an error."""
        self.closed.set()
        for replica in self.replicas:
            replica.close()


class _Exchange:
    """One request's way through the replicas of a party."""

    def __init__(self, party: Party, request: Request, deadline: float) -> None:
        self._party = party
        self._request = request
        self._deadline = deadline
        self._asked: list[Asked] = []  # silent so far, in the order in which they were asked
        self._patience = 0.0  # until when nobody else is asked
        self._sends = 0
        # Of those that failed: what they said last, from when they may be asked again, and the wait if they are away.
        self._errors: dict[Replica, EnsemblerError] = {}
        self._again = dict.fromkeys(party.replicas, 0.0)
        self._away_s = dict.fromkeys(party.replicas, RECONNECT_S)

    def run(self) -> Reply:
        """Returns the first result; see ``Party.exchange``."""
        try:
            while (now := time.monotonic()) < self._deadline:
                turn, replica = self._next(now)
                if turn <= now and replica is not None:
                    self._ask(replica, now)
                elif self._asked:
                    reply = self._listen(min(turn, self._deadline))
                    if reply is not None:
                        return reply
                elif turn > self._deadline:
                    break  # nobody may be asked in time
                else:
                    self._party.closed.wait(turn - now)
            raise self._failure()
        finally:
            for asked in self._asked:
                asked.close()

    def _next(self, now: float) -> tuple[float, Replica | None]:
        """Returns which replica is asked next, and when: never, if all were asked or have refused."""
        under_way = {asked.replica for asked in self._asked}
        left = [replica for replica in self._party.order() if replica not in under_way]
        # The sort is stable: of those that may be asked now, the party's first.
        replica = min(left, key=lambda each: max(now, self._again[each]), default=None)
        if replica is None or self._again[replica] == math.inf:
            return math.inf, None
        return max(self._again[replica], self._patience), replica

    def _ask(self, replica: Replica, now: float) -> None:
        for asked in self._asked:
            asked.replica.rest()  # whoever is silent for that long is not the first to be asked in other calls
        try:
            self._asked.append(replica.ask(self._request, again=self._sends > 0))
        except EnsemblerError as error:
            self._fails(replica, error)
            return
        finally:
            self._sends += 1
        others = sum(again < self._deadline for again in self._again.values()) - len(self._asked)
        self._patience = now + (self._deadline - now) / (1 + others)

    def _listen(self, until: float) -> Reply | None:
        """Waits for those that were asked; None: nobody answered until then, or somebody failed."""
        while True:
            now = time.monotonic()
            for asked in tuple(self._asked):
                try:
                    reply = asked.reply(until if len(self._asked) == 1 else min(until, now + LISTEN_S))
                except EnsemblerError as error:
                    if asked is self._asked[-1]:  # else the last one still has its time
                        self._patience = 0.0
                    self._asked.remove(asked)
                    self._fails(asked.replica, error)
                    return None
                if reply is not None:
                    if asked is self._asked[-1]:  # who answers later than that is no better for it
                        self._party.prefer(asked.replica)
                    return reply
            if time.monotonic() >= until:
                return None

    def _fails(self, replica: Replica, error: EnsemblerError) -> None:
        """Notes an error, and when the replica may be asked again; raises it if the client was closed."""
        if self._party.closed.is_set():
            # A line that failed just before would blame the server for an end that came from this side.
            raise closed_in_use(replica.server) if isinstance(error, TransportError) else error
        self._errors[replica] = error
        replica.counts.failed(error)
        now = time.monotonic()
        if isinstance(error, BusyError):
            again = now + max(MIN_RETRY_S, error.retry_after_ms / 1000)
        elif isinstance(error, ShuttingDownError):
            again = now + SHUTDOWN_RETRY_S
        elif isinstance(error, ServerUnreachableError) or (
            isinstance(error, AuthenticationError) and not error.certain
        ):
            # Not beyond the half of what is left: a server that comes back shortly before the deadline is met. And
            # whoever is away is waited for until the deadline itself.
            wait_s = max(RECONNECT_S, min(self._away_s[replica], (self._deadline - now) / 2))
            again = min(now + wait_s, self._deadline)
            self._away_s[replica] = min(2 * self._away_s[replica], RECONNECT_MAX_S)
        else:
            again = math.inf
        self._again[replica] = again
        if not isinstance(error, BusyError):
            replica.rest()

    def _failure(self) -> EnsemblerError:
        """Returns the call's error; of several replicas it says what each one said."""
        for asked in self._asked:
            error = asked.silence()
            before = self._errors.get(asked.replica)
            if isinstance(before, AuthenticationError) and isinstance(error, ServerUnreachableError):
                error = before  # a handshake that the deadline cut short says less than one that was refused
            self._errors[asked.replica] = error
            asked.replica.counts.failed(error)
            asked.replica.rest()
        errors = [self._errors[replica] for replica in self._party.replicas if replica in self._errors]
        if not errors:
            return DeadlineExceededError(
                f"the deadline passed before {' or '.join(self._party.servers)} could be asked; raise timeout_ms"
            )
        hopeful = min(errors, key=_hope)
        if len(self._party.replicas) == 1:
            return hopeful
        text = f"none of {len(self._party.replicas)} replicas answered: " + "; ".join(
            _named(replica.server, self._errors[replica]) if replica in self._errors else f"{replica.server}: not asked"
            for replica in self._party.replicas
        )
        if isinstance(hopeful, BusyError):
            return BusyError(text, min(error.retry_after_ms for error in errors if isinstance(error, BusyError)))
        return type(hopeful)(text)


def exchange_all(parties: Sequence[Party], requests: Sequence[Message], deadline: float) -> list[Reply]:
    """Asks all parties at once and waits for all; one that fails, fails the call, whichever it is.

    Which nets are selected has no say in it: an answer that is not needed is waited for like any other. Ctrl-C ends the
    call at once; the other threads end by the deadline.

    Raises:
        EnsemblerError: the first party's that failed, in their order; see ``Party.exchange``.
    """
    if len(parties) == 1:
        return [parties[0].exchange(requests[0], deadline)]
    outcomes: list[Reply | Exception | None] = [None] * len(parties)

    def ask(index: int) -> None:
        try:
            outcomes[index] = parties[index].exchange(requests[index], deadline)
        except Exception as error:  # raised below, in the caller's thread
            outcomes[index] = error

    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(1, len(parties))]
    for thread in threads:
        thread.start()
    ask(0)
    for thread in threads:
        thread.join()
    replies = []
    for party, outcome in zip(parties, outcomes, strict=True):
        if isinstance(outcome, EnsemblerError):
            outcome.args = (_named(party.servers[0], outcome),)
        if not isinstance(outcome, Reply):
            assert outcome is not None
            raise outcome
        replies.append(outcome)
    return replies


def _hope(error: EnsemblerError) -> int:
    return next(index for index, kind in enumerate(_HOPE) if isinstance(error, kind))


def _named(server: str, error: EnsemblerError) -> str:
    return str(error) if server in str(error) else f"{server}: {error}"
