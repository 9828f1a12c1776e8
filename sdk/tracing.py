"""Lets a trace that the application began (OpenTelemetry) go on in the server."""

from __future__ import annotations

import sys


def trace_info() -> dict[str, str]:
    """Returns the field that a request carries: ``traceparent``, or nothing outside a span.

    Only the ids of trace and span go along, as W3C's Trace Context writes them, and no baggage: that may hold what a
    server should not know. An application that did not import OpenTelemetry has no span, and nothing is imported.
    """
    if "opentelemetry.trace" not in sys.modules:
        return {}
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return {"traceparent": carrier["traceparent"]} if "traceparent" in carrier else {}
