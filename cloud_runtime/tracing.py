"""Spans of answered requests, where OpenTelemetry is installed and the device sent the trace that it is part of.

What becomes of a span is the operator's configuration of OpenTelemetry, for instance by ``opentelemetry-instrument``.
"""

from __future__ import annotations

import time
from typing import Any

# The field of a request's info that carries a trace, as W3C's Trace Context writes it.
TRACEPARENT = "traceparent"


class Tracer:
    """Makes a span for each answered request that has a trace."""

    def __init__(self, trace: Any, propagate: Any) -> None:
        self._tracer = trace.get_tracer("ensembler.server")
        self._kind = trace.SpanKind.SERVER
        self._extract = propagate.extract

    def answered(self, traceparent: str, *, since_ms: float, attributes: dict[str, str | float | int]) -> None:
        """Tells of a request that is answered now.

        Args:
            traceparent: from the request; one that is malformed begins a trace of its own.
            since_ms: how long ago it came.
            attributes: facts beside it.
        """
        now = time.time_ns()
        span = self._tracer.start_span(
            "ensembler.infer",
            context=self._extract({TRACEPARENT: traceparent}),
            kind=self._kind,
            start_time=now - int(1e6 * since_ms),
            attributes=attributes,
        )
        span.end(now)


def tracer() -> Tracer | None:
    """Returns what makes spans; None where OpenTelemetry is not installed."""
    try:
        from opentelemetry import propagate, trace
    except ImportError:
        return None
    return Tracer(trace, propagate)
