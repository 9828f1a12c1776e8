"""What a server counts and times, in Prometheus' text format.

The server tells a ``Meter``; without a metrics port that is one that forgets. No label says which device asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ensembler.cloud_runtime.models import SHOWN_DIGITS, Model, Version
from ensembler.protocol.errors import MissingExtraError, WireError

# Seconds: from a codec's microseconds to a queue's seconds.
SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Meter(Protocol):
    """What the server tells; called by its loop alone."""

    def decoded(self, seconds: float) -> None:
        """A request was read and queued."""

    def answered(self, model: Model, queue_s: float) -> None:
        """A request was answered, after so long in the queue."""

    def computed(self, model: Model, version: Version, rows: int, seconds: float) -> None:
        """A batch was computed."""

    def encoded(self, seconds: float) -> None:
        """Replies were written, each in so long."""

    def refused(self, error: WireError) -> None:
        """A request got an error."""


class NoMeter:
    """See ``Meter``; forgets."""

    def decoded(self, seconds: float) -> None:
        """See ``Meter``."""

    def answered(self, model: Model, queue_s: float) -> None:
        """See ``Meter``."""

    def computed(self, model: Model, version: Version, rows: int, seconds: float) -> None:
        """See ``Meter``."""

    def encoded(self, seconds: float) -> None:
        """See ``Meter``."""

    def refused(self, error: WireError) -> None:
        """See ``Meter``."""


class PrometheusMeter:
    """See ``Meter``; keeps a registry of its own.

    Raises:
        MissingExtraError: prometheus-client is not installed.
    """

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
            from prometheus_client.core import GaugeMetricFamily
        except ImportError as error:
            raise MissingExtraError("prometheus-client", "cloud", "the metrics port") from error
        self._prometheus = prometheus
        self._gauge = GaugeMetricFamily
        self._registry = registry = prometheus.CollectorRegistry()
        stages = prometheus.Histogram(
            "ensembler_stage_seconds",
            "Time of a request in each stage; compute is its whole batch's.",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self._stage = {name: stages.labels(name) for name in ("decode", "queue", "compute", "encode")}
        self._rows = prometheus.Histogram(
            "ensembler_batch_rows", "Images computed together.", buckets=ROWS, registry=registry
        )
        labels = ["nets", "version"]
        self._requests = prometheus.Counter(
            "ensembler_answered_requests", "Requests that got their answers.", labels, registry=registry
        )
        self._images = prometheus.Counter("ensembler_computed_rows", "Images computed.", labels, registry=registry)
        self._refused = prometheus.Counter(
            "ensembler_refused_requests", "Requests that got an error, by its class.", ["error"], registry=registry
        )

    def watch(self, describe: Callable[[], dict[str, Any]]) -> None:
        """Adds what is read when somebody asks: the queue, the models, whether they can compute.

        Args:
            describe: ``Server.describe``.
        """
        self._registry.register(_Described(self._gauge, describe))

    def exposition(self) -> tuple[bytes, str]:
        """Returns everything in the text format, and its content type."""
        return self._prometheus.generate_latest(self._registry), self._prometheus.CONTENT_TYPE_LATEST

    def decoded(self, seconds: float) -> None:
        """See ``Meter``."""
        self._stage["decode"].observe(seconds)

    def answered(self, model: Model, queue_s: float) -> None:
        """See ``Meter``."""
        self._stage["queue"].observe(queue_s)
        self._requests.labels(*_names(model, model.version)).inc()

    def computed(self, model: Model, version: Version, rows: int, seconds: float) -> None:
        """See ``Meter``."""
        self._stage["compute"].observe(seconds)
        self._rows.observe(rows)
        self._images.labels(*_names(model, version)).inc(rows)

    def encoded(self, seconds: float) -> None:
        """See ``Meter``."""
        self._stage["encode"].observe(seconds)

    def refused(self, error: WireError) -> None:
        """See ``Meter``."""
        self._refused.labels(type(error).__name__).inc()


class _Described:
    """A collector of what the server says of itself."""

    def __init__(self, gauge: Any, describe: Callable[[], dict[str, Any]]) -> None:
        self._gauge = gauge
        self._describe = describe

    def describe(self) -> Iterator[Any]:
        """Nothing: the registry would otherwise collect once while the server is not running yet."""
        return iter(())

    def collect(self) -> Iterator[Any]:
        found = self._describe()
        yield self._gauge("ensembler_queue_rows", "Images that wait.", value=found["queued_rows"])
        yield self._gauge("ensembler_ready", "1 when the server can answer.", value=int(found["ready"]))
        alive = self._gauge(
            "ensembler_model_alive",
            "1 while the version's engine can compute.",
            labels=["nets", "version", "precision"],
        )
        for model in found["models"]:
            names = (model["bodies_id"][:SHOWN_DIGITS], model["version"][:SHOWN_DIGITS], model["precision"])
            alive.add_metric(names, int(model["alive"]))
        yield alive


def _names(model: Model, version: Version) -> tuple[str, str]:
    return model.bodies_id[:SHOWN_DIGITS], version.digest[:SHOWN_DIGITS]
