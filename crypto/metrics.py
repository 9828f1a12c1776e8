"""What a server of crypto-clear inference counts and times, in Prometheus' text format.

As with the server of split inference, no label says which device asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ensembler.protocol.errors import MissingExtraError, WireError

# Seconds: from a small net's clear layers to a deep net's private ones over a slow link.
SECONDS = (0.001, 0.01, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 600.0)


class Meter(Protocol):
    """What the server tells; called by its loop alone."""

    def stage(self, name: str, seconds: float) -> None:
        """An order was done: ``open`` of a session, the ``crypto`` layers, or the ``clear`` ones of an image."""

    def answered(self) -> None:
        """An image was answered."""

    def refused(self, error: WireError) -> None:
        """A client got an error."""


class NoMeter:
    """See ``Meter``; forgets."""

    def stage(self, name: str, seconds: float) -> None:
        """See ``Meter``."""

    def answered(self) -> None:
        """See ``Meter``."""

    def refused(self, error: WireError) -> None:
        """See ``Meter``."""


class CryptoMeter:
    """See ``Meter``; keeps a registry of its own.

    Raises:
        MissingExtraError: prometheus-client is not installed.
    """

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
            from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
        except ImportError as error:
            raise MissingExtraError("prometheus-client", "cloud", "the metrics port") from error
        self._prometheus = prometheus
        self._families = (CounterMetricFamily, GaugeMetricFamily)
        self._registry = registry = prometheus.CollectorRegistry()
        self._stage = prometheus.Histogram(
            "ensembler_crypto_stage_seconds",
            "Opening a session, an image's layers under two parties, and those after the boundary.",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self._answered = prometheus.Counter("ensembler_crypto_answered_images", "Images answered.", registry=registry)
        self._refused = prometheus.Counter(
            "ensembler_refused_requests", "Requests that got an error, by its class.", ["error"], registry=registry
        )

    def watch(self, describe: Callable[[], dict[str, Any]]) -> None:
        """Adds what is read when somebody asks.

        Args:
            describe: ``CryptoServer.describe``.
        """
        self._registry.register(_Described(self._families, describe))

    def exposition(self) -> tuple[bytes, str]:
        """Returns everything in the text format, and its content type."""
        return self._prometheus.generate_latest(self._registry), self._prometheus.CONTENT_TYPE_LATEST

    def stage(self, name: str, seconds: float) -> None:
        """See ``Meter``."""
        self._stage.labels(name).observe(seconds)

    def answered(self) -> None:
        """See ``Meter``."""
        self._answered.inc()

    def refused(self, error: WireError) -> None:
        """See ``Meter``."""
        self._refused.labels(type(error).__name__).inc()


class _Described:
    """A collector of what the server says of itself."""

    def __init__(self, families: tuple[Any, Any], describe: Callable[[], dict[str, Any]]) -> None:
        self._counter, self._gauge = families
        self._describe = describe

    def describe(self) -> Iterator[Any]:
        """Nothing: the registry would otherwise collect once while the server is not running yet."""
        return iter(())

    def collect(self) -> Iterator[Any]:
        found = self._describe()
        yield self._gauge("ensembler_ready", "1 when a client may open a session.", value=int(found["ready"]))
        yield self._gauge("ensembler_crypto_session", "1 while a client has the place.", value=int(found["session"]))
        relayed = self._counter("ensembler_crypto_relayed_bytes", "Of the engines' streams.", labels=["direction"])
        for direction in ("sent", "received"):
            relayed.add_metric([direction], found[f"{direction}_bytes"])
        yield relayed
