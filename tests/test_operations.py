"""What an operator has beside the device's port: health and metrics over HTTP, the control socket, the log."""

from __future__ import annotations

import http.client
import json
import logging
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import SlowEngine
from probes import WAIT_S, get, numbers
from test_network import client, good_request, has_ipv6, raw

from ensembler.cloud_runtime.control import ControlSocket, ask
from ensembler.cloud_runtime.engine import EngineOptions
from ensembler.cloud_runtime.http_port import HttpPort
from ensembler.cloud_runtime.logs import JsonFormatter
from ensembler.cloud_runtime.metrics import PrometheusMeter
from ensembler.cloud_runtime.onnx_engine import OnnxEngine
from ensembler.protocol.errors import ConfigError, ServerUnreachableError
from ensembler.protocol.manifest import load_server
from ensembler.protocol.messages import RESULT


@pytest.fixture
def watched(tiny, in_thread):
    """A plaintext server whose engine is held, with an HTTP port: (server, its endpoint, HTTP address, engine)."""
    engine, meter = SlowEngine(tiny.server), PrometheusMeter()
    server, endpoint = in_thread(engine, meter=meter)
    meter.watch(server.describe)
    port = HttpPort("127.0.0.1:0", server, meter)
    yield server, endpoint, port.address, engine
    port.close()


def test_a_server_is_live_and_ready_and_says_what_it_holds(tiny, watched):
    _, _, address, _ = watched
    assert get(address, "/livez")[0] == 200
    status, kind, body = get(address, "/readyz?verbose")
    assert (status, kind) == (200, "application/json")
    (model,) = json.loads(body)["models"]
    assert model["bodies_id"] == load_server(tiny.server).wire.bodies_id
    assert model["precision"] == load_server(tiny.server).precision
    assert model["alive"] is True


def test_a_draining_server_is_live_and_not_ready(tiny, watched, tiny_images):
    server, endpoint, address, engine = watched
    with client(tiny, endpoint, plaintext=True) as edge:
        thread = threading.Thread(target=edge.predict, args=(tiny_images[0],))
        thread.start()
        assert engine.entered.wait(WAIT_S)
        server.stop()
        assert get(address, "/livez")[0] == 200
        assert get(address, "/readyz")[0] == 503
        engine.release.set()
        thread.join(WAIT_S)


def test_a_server_without_a_living_engine_is_live_and_not_ready(watched):
    _, _, address, engine = watched
    engine.alive = lambda: False
    assert get(address, "/livez")[0] == 200
    assert get(address, "/readyz")[0] == 503
    assert numbers(get(address, "/metrics")[2])["ensembler_ready", ()] == 0


def test_a_server_whose_loop_is_stuck_is_not_live(watched, monkeypatch):
    server, _, address, _ = watched
    monkeypatch.setattr("ensembler.cloud_runtime.server.LIVE_S", 0.2)
    held = threading.Event()
    server._calls.ask(lambda: held.wait(WAIT_S))
    for path in ("/livez", "/readyz", "/metrics"):
        assert get(address, path)[0] == 503
    held.set()


def test_metrics_count_what_happened(tiny, watched, tiny_images):
    _, endpoint, address, engine = watched
    engine.release.set()
    with client(tiny, endpoint, plaintext=True) as edge:
        edge.predict_batch(list(tiny_images[:3]))
        edge.predict(tiny_images[0])
    raw(endpoint, [b"nonsense", b""])
    raw(endpoint, good_request(tiny, tiny_images, bodies_id=bytes(32)))
    found = numbers(get(address, "/metrics")[2])
    (names,) = [labels for name, labels in found if name == "ensembler_answered_requests_total"]
    assert dict(names)["nets"] == load_server(tiny.server).wire.bodies_id[:12]
    assert found["ensembler_answered_requests_total", names] == 2
    assert found["ensembler_computed_rows_total", names] == 4
    assert found["ensembler_batch_rows_count", ()] == 2
    assert found["ensembler_batch_rows_sum", ()] == 4
    assert found["ensembler_refused_requests_total", (("error", "ProtocolError"),)] == 1
    assert found["ensembler_refused_requests_total", (("error", "UnknownBodiesError"),)] == 1
    assert found["ensembler_queue_rows", ()] == 0
    for stage in ("decode", "queue", "compute", "encode"):
        assert found["ensembler_stage_seconds_count", (("stage", stage),)] == 2


def test_what_a_prediction_says_of_the_server_is_what_the_servers_histograms_say(tiny, watched, tiny_images):
    _, endpoint, address, engine = watched
    engine.release.set()
    with client(tiny, endpoint, plaintext=True) as edge:
        times = [edge.predict(image).timings for image in tiny_images[:5]]
        edge.status()  # an answer is sent before it is counted
    found = numbers(get(address, "/metrics")[2])
    for stage, said_ms in {
        "queue": sum(one.queue for one in times),
        "compute": sum(one.server for one in times),
    }.items():
        labels = (("stage", stage),)
        assert found["ensembler_stage_seconds_count", labels] == 5
        assert found["ensembler_stage_seconds_sum", labels] == pytest.approx(said_ms / 1000, rel=1e-6)


def test_no_metric_names_a_device(tiny, in_thread, tiny_images):
    from ensembler.transport import keys

    meter, allowed = PrometheusMeter(), keys.load_authorized(tiny.keys / "authorized")
    pair = keys.load_pair(tiny.keys / "server.key_secret")
    engine = OnnxEngine(tiny.server, threads=1)
    server, endpoint = in_thread(engine, keys_pair=pair, authorized=allowed, meter=meter)
    meter.watch(server.describe)
    with client(tiny, endpoint) as edge:
        edge.predict(tiny_images[0])
    text = meter.exposition()[0].decode()
    assert "ensembler_answered_requests_total" in text
    for key in (*allowed, pair.public, pair.secret):
        assert key[:8] not in text


def test_another_path_or_method_is_refused(watched):
    _, _, address, _ = watched
    assert get(address, "/")[0] == 404
    connection = http.client.HTTPConnection(address, timeout=WAIT_S)
    connection.request("POST", "/livez")
    assert connection.getresponse().status == 501
    connection.close()


def test_bytes_that_are_no_http_leave_the_port_alive(watched):
    _, _, address, _ = watched
    host, port = address.split(":")
    for garbage in (b"\0" * 100, b"GET " + b"x" * 100_000 + b"\r\n\r\n", b"GET /livez HTTP/9.9\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as line:
            line.sendall(garbage)
    assert get(address, "/livez")[0] == 200


@pytest.mark.skipif(not has_ipv6(), reason="no ::1 on this machine")
def test_the_http_port_has_addresses_of_version_6(watched):
    server = watched[0]
    port = HttpPort("[::1]:0", server, PrometheusMeter())
    assert port.address.startswith("[::1]:")
    assert get(port.address, "/livez")[0] == 200
    port.close()


def test_a_probe_that_hangs_up_costs_one_line_and_no_traceback(watched, caplog, capsys):
    _, _, address, _ = watched
    host, port = address.split(":")
    caplog.set_level("INFO", "ensembler.server")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing it is a reset
        line.sendall(b"GET /livez HTTP/1.1\r\n")
    while not any("ended early" in record.message for record in caplog.records):
        assert get(address, "/livez")[0] == 200
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "address", ["8080", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:99999", ":80", "no.such.host.invalid:80"]
)
def test_an_http_address_that_is_none_is_refused(address):
    with pytest.raises(ConfigError, match="--http"):
        HttpPort(address, None, None)


def test_an_http_address_in_use_is_refused(watched):
    _, _, address, _ = watched
    with pytest.raises(ConfigError, match="in use"):
        HttpPort(address, None, None)


# --- traces ---


@pytest.fixture(scope="module")
def spans():
    """What OpenTelemetry was told, with its real SDK; yields the list of finished spans."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize("sent", [f"00-{TRACE}-{SPAN}-01", "no trace", None])
def test_a_request_with_a_trace_gets_a_span_in_it(tiny, in_thread, spans, tiny_images, sent):
    spans.clear()
    _, endpoint = in_thread(OnnxEngine(tiny.server, threads=1))
    info = {} if sent is None else {"traceparent": sent}
    assert raw(endpoint, good_request(tiny, tiny_images, info=info)).operation == RESULT
    with client(tiny, endpoint, plaintext=True) as edge:
        edge.status()  # one more turn of the loop, which made the span before
    found = spans.get_finished_spans()
    assert len(found) == (sent is not None)
    for span in found:
        assert span.attributes["rows"] == 1
        assert span.end_time >= span.start_time
        assert (f"{span.context.trace_id:032x}" == TRACE) == sent.startswith("00-")


def test_an_applications_trace_goes_on_in_the_server_without_its_baggage(tiny, in_thread, spans, tiny_images):
    from opentelemetry import baggage, context, trace

    spans.clear()
    _, endpoint = in_thread(OnnxEngine(tiny.server, threads=1))
    token = context.attach(baggage.set_baggage("who", "a name"))
    with client(tiny, endpoint, plaintext=True) as edge:
        with trace.get_tracer("app").start_as_current_span("photo") as span:
            edge.predict(tiny_images[0])
        edge.predict(tiny_images[1])  # outside a span nothing is sent
        edge.status()
    context.detach(token)
    served = [one for one in spans.get_finished_spans() if one.name == "ensembler.infer"]
    assert len(served) == 1
    assert served[0].context.trace_id == span.get_span_context().trace_id
    assert served[0].parent.span_id == span.get_span_context().span_id


# --- the control socket ---


@pytest.fixture
def control(tmp_path):
    """A control socket that repeats what it is asked; yields its path."""

    def handle(request):
        if request.get("fail"):
            raise RuntimeError("a secret reason")
        return {"asked": request}

    listening = ControlSocket(tmp_path / "control", handle)
    yield tmp_path / "control"
    listening.close()


def test_a_control_socket_is_its_owners_alone(control):
    assert stat.S_IMODE(control.stat().st_mode) == 0o600
    assert ask(control, {"do": "x"}, WAIT_S) == {"asked": {"do": "x"}}


def test_a_control_socket_does_not_hear_other_users(control):
    """By what the kernel says of the other side, whatever the modes of the file and its folder say."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    control.chmod(0o777)
    for folder in control.parents:
        if stat.S_IMODE(folder.stat().st_mode) & 0o011 != 0o011:
            folder.chmod(0o755)
    code = (
        "import os, socket, sys\nos.setuid(65534)\nline = socket.socket(socket.AF_UNIX)\nline.settimeout(60)\n"
        "line.connect(sys.argv[1])\nline.sendall(b'{}\\n')\nprint(line.recv(100))"
    )
    said = subprocess.run([sys.executable, "-c", code, str(control)], capture_output=True, text=True, check=False)
    assert (said.stdout == "b''\n") or "BrokenPipeError" in said.stderr or "ConnectionResetError" in said.stderr


@pytest.mark.parametrize("line", [b"\n", b"[]\n", b"not json\n", b"\xff\n", b"{" * 70_000])
def test_a_line_that_is_no_request_is_an_error_and_the_socket_lives_on(control, line):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(WAIT_S)
        connection.connect(str(control))
        connection.sendall(line)
        assert b"error" in connection.recv(1000)
    assert ask(control, {}, WAIT_S) == {"asked": {}}


def test_an_error_inside_is_not_told(control):
    with pytest.raises(ConfigError, match="internal error") as caught:
        ask(control, {"fail": 1}, WAIT_S)
    assert "secret" not in str(caught.value)


def test_a_path_where_another_server_listens_is_refused_and_a_dead_ones_is_taken(tmp_path):
    path = tmp_path / "control"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    listening = ControlSocket(path, lambda request: request)
    with pytest.raises(ConfigError, match="another server listens"):
        ControlSocket(path, lambda request: request)
    assert ask(path, {"a": 1}, WAIT_S) == {"a": 1}
    listening.close()
    assert not path.exists()


def test_a_path_that_is_a_file_is_never_overwritten(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="is not a socket"):
        ControlSocket(tmp_path / "file", lambda request: request)
    with pytest.raises(ConfigError, match="--control"):
        ControlSocket(tmp_path / "no" / "folder", lambda request: request)
    assert (tmp_path / "file").read_text() == "precious"


def test_nobody_at_the_control_socket_is_said(tmp_path):
    with pytest.raises(ServerUnreachableError, match="--control"):
        ask(tmp_path / "nowhere", {}, 1.0)


# --- all of it, as commands ---


def run(*arguments):
    command = [sys.executable, "-m", "ensembler.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S * 2, check=False)


def test_a_server_is_deployed_to_listed_and_removed_from(
    tiny, float_server, other, serve, tmp_path, tiny_images, expected
):
    control = tmp_path / "control"
    with serve(tiny.server, "--control", str(control), "--http", "127.0.0.1:0", "--log", "json") as (endpoint, process):
        assert json.loads(run("deploy", "--control", control, "--list", "--json").stdout)["ready"] is True
        said = run("deploy", float_server, "--control", control)
        assert said.returncode == 0, said.stderr
        assert "in the place of" in said.stdout
        said = run("deploy", other / "server_0", "--control", control)
        assert "beside the others" in said.stdout
        listed = run("deploy", "--control", control, "--list").stdout
        assert "3 nets in float32" in listed
        assert "1 nets in" in listed
        with client(tiny, endpoint) as edge:
            assert edge.predict(tiny_images[0]).logits.shape == expected[0].shape
        said = run("deploy", "--control", control, "--remove", load_server(other / "server_0").wire.bodies_id[:8])
        assert said.returncode == 0, said.stderr
        assert "1 nets in" not in run("deploy", "--control", control, "--list").stdout
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=WAIT_S)
    events = [json.loads(line) for line in log.splitlines()]
    assert [event["message"].split()[0] for event in events][-1] == "stopped"
    assert not control.exists()


def test_a_bundle_that_cannot_be_served_is_refused_and_what_was_served_goes_on(
    tiny, serve, tmp_path, tiny_images, expected
):
    control = tmp_path / "control"
    broken = shutil.copytree(tiny.server, tmp_path / "broken")
    body = broken / load_server(broken).bodies[0]
    body.write_bytes(body.read_bytes()[:-1])
    with serve(tiny.server, "--control", str(control)) as (endpoint, _), client(tiny, endpoint) as edge:
        for bundle, reason in ((broken, body.name), (tmp_path / "nowhere", "nowhere"), (tiny.client, "server")):
            said = run("deploy", bundle, "--control", control)
            assert said.returncode != 0
            assert reason in said.stderr
        np.testing.assert_array_equal(edge.predict(tiny_images[0]).logits, expected[0])


@pytest.mark.parametrize("arguments", [(), ("--list", "--remove", "ab"), ("bundle", "--list")])
def test_deploy_wants_one_thing_at_a_time(arguments, tmp_path):
    said = run("deploy", *arguments, "--control", tmp_path / "control")
    assert said.returncode == 2
    assert "--list, or --remove" in said.stderr


def test_an_answered_request_gets_a_line_only_when_asked_for(tiny, serve, tiny_images):
    for options, lines in (((), 0), (("--log-requests",), 2)):
        with serve(tiny.server, "--log", "json", "--http", "127.0.0.1:0", *options) as (endpoint, process):
            assert get(process.ready["http"], "/livez")[0] == 200  # no request of a device
            with client(tiny, endpoint) as edge:
                edge.predict_batch(list(tiny_images[:3]))
                edge.predict(tiny_images[0])
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=WAIT_S)
        events = [json.loads(line) for line in log.splitlines()]
        answered = [event for event in events if event.get("event") == "answered"]
        assert len(answered) == lines
        assert [event["rows"] for event in answered] == [3, 1][:lines]
        assert "http:" not in log


def test_a_line_of_the_log_is_one_line_of_json_with_its_traceback():
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "it %s", ("broke",), sys.exc_info())
    record.fields = {"rows": 3}
    line = JsonFormatter().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["level"], found["message"], found["rows"]) == ("error", "it broke", 3)
    assert "ValueError" in found["traceback"]


@pytest.mark.parametrize("workers", [-1, 1000])
def test_a_number_of_workers_that_cannot_be_is_refused(workers):
    with pytest.raises(ConfigError, match="--workers"):
        EngineOptions(workers=workers)


@pytest.mark.parametrize("option", [("--grace-ms", "nan"), ("--max-queue-rows", "0")], ids=" ".join)
def test_an_impossible_bound_is_refused_before_anything_is_loaded(option, tmp_path):
    said = run("serve", tmp_path / "no bundle", *option)
    assert said.returncode == 2
    assert f"{option[0]} {option[1]}: " in said.stderr


def test_as_many_keys_as_addresses_or_one(tiny, tmp_path):
    key = tiny.keys / "server.key_secret"
    said = run("serve", tiny.server, *("--bind", "tcp://127.0.0.1:*") * 3, "--key", key, "--key", key)
    assert said.returncode == 2
    assert "--key is given 2 times and --bind 3 times" in said.stderr
