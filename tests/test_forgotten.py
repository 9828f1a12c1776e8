"""A client that nobody closed: its lines end with it, and whoever collects it does not wait."""

from __future__ import annotations

import gc
import os
import socket
import threading
from types import SimpleNamespace

import pytest
from conftest import LOOPBACK

from ensembler import EdgeClient, forgotten

WAIT_S = 60


@pytest.fixture
def closed(monkeypatch):
    """What was closed because its client was forgotten, here and at once; other tests may have left some."""
    found = []

    def at_once(function, arguments):
        found.append(arguments[0])
        function(*arguments)

    monkeypatch.setattr(forgotten, "_thread", SimpleNamespace(start_new_thread=at_once))
    return found


@pytest.mark.parametrize("in_a_cycle", [True, False])
def test_a_forgotten_client_ends_its_lines_and_the_collector_goes_on(in_a_cycle, tiny):
    with socket.create_server((LOOPBACK, 0)) as listening:
        client = EdgeClient(tiny.client, f"tcp://{LOOPBACK}:{listening.getsockname()[1]}", plaintext=True)
        listening.settimeout(WAIT_S)
        line, _ = listening.accept()
        if in_a_cycle:
            client.itself = client
        del client
        collecting = threading.Thread(target=gc.collect, daemon=True)
        collecting.start()
        collecting.join(WAIT_S)
        assert not collecting.is_alive()
        with line:
            line.settimeout(WAIT_S)
            while line.recv(4096):  # the greeting, and then the end
                pass


@pytest.mark.parametrize("closes", [True, False])
def test_a_client_that_was_closed_is_not_closed_again(closes, tiny, closed):
    client = EdgeClient(tiny.client, f"tcp://{LOOPBACK}:1", plaintext=True)
    parties = tuple(client._parties)
    if closes:
        client.close()
        client.close()
    del client
    assert (parties in closed) is not closes


def test_a_forked_child_that_forgets_its_parents_client_leaves_the_lines_alone(tiny, closed, monkeypatch):
    client = EdgeClient(tiny.client, f"tcp://{LOOPBACK}:1", plaintext=True)
    parties = tuple(client._parties)
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        del client
    assert parties not in closed
    for party in parties:
        party.close()
