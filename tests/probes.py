"""What an operator's probes read from a server's HTTP port."""

from __future__ import annotations

import http.client

WAIT_S = 60


def get(address, path):
    """Status, content type and body of one request."""
    connection = http.client.HTTPConnection(address, timeout=WAIT_S)
    connection.request("GET", path)
    reply = connection.getresponse()
    found = reply.status, reply.headers["Content-Type"], reply.read().decode()
    connection.close()
    return found


def numbers(text):
    """The samples of Prometheus' text format, as its own parser reads them: {(name, labels): value}."""
    from prometheus_client.parser import text_string_to_metric_families

    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
