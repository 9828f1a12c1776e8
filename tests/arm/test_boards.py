"""The harness itself: a board is what it says, alone when told so, and gone afterwards."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from boards import BOARDS, BoardError, boot, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

MACHINES = {"pi4": "aarch64", "pi5": "aarch64", "pi2": "armv7l"}
CONNECT = "import socket, sys; print(socket.create_connection(('127.0.0.1', int(sys.argv[1])), timeout=60).recv(5))"


@pytest.fixture(scope="module", params=list(BOARDS))
def board(request, tmp_path_factory):
    with boot(BOARDS[request.param], tmp_path_factory.mktemp(request.param)) as started:
        yield started


@pytest.fixture(scope="module")
def pi4(tmp_path_factory):
    with boot(BOARDS["pi4"], tmp_path_factory.mktemp("pi4")) as started:
        yield started


def test_a_board_is_of_its_own_architecture_and_model(board):
    kind = board.board
    assert board.run("dpkg", "--print-architecture", check=True).stdout.strip() == kind.architecture
    told = board.run("python3", "-c", "import os, platform; print(platform.machine(), os.cpu_count())", check=True)
    assert told.stdout.split() == [MACHINES[kind.name], "4"]
    assert board.run("cat", "/proc/device-tree/model", check=True).stdout == f"{kind.model}\0"
    assert f"Model\t\t: {kind.model}" in board.run("cat", "/proc/cpuinfo", check=True).stdout
    assert board.run("cat", "/sys/class/thermal/thermal_zone0/temp", check=True).stdout.strip().isdigit()


def test_dpkg_installs_what_fits_the_board_and_refuses_what_does_not(board, tmp_path):
    kind = board.board
    scripted = _package(tmp_path, "scripted", kind.architecture, "python3 (>= 3.11), libstdc++6")
    done = board.run("dpkg", "-i", _copied(scripted, board.root), check=True)
    assert "made by its script" in done.stdout
    assert "installed" in board.run("dpkg-query", "-W", "-f", "${Status}", "scripted", check=True).stdout

    other = _package(tmp_path, "other", "amd64", "python3")
    assert "does not match system" in board.run("dpkg", "-i", _copied(other, board.root)).stderr
    newer = _package(tmp_path, "newer", kind.architecture, "python3 (>= 3.99)")
    refused = board.run("dpkg", "-i", _copied(newer, board.root))
    assert refused.returncode != 0
    assert "newer depends on python3 (>= 3.99)" in refused.stderr


def test_without_a_network_a_board_reaches_nothing_and_with_it_the_hosts_loopback(pi4):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        alone = pi4.run("python3", "-c", CONNECT, port, network=False)
        assert "ConnectionRefusedError" in alone.stderr
        interfaces = "import socket; print([name for _, name in socket.if_nameindex()])"
        assert pi4.run("python3", "-c", interfaces, network=False, check=True).stdout == "['lo']\n"
        outside = CONNECT.replace("127.0.0.1", "192.0.2.1")
        assert "Network is unreachable" in pi4.run("python3", "-c", outside, port, network=False).stderr

        server.settimeout(0.1)
        with pytest.raises(TimeoutError):  # nobody came so far
            server.accept()
        server.settimeout(None)
        greeter = threading.Thread(target=_greet, args=(server,), daemon=True)
        greeter.start()
        assert pi4.run("python3", "-c", CONNECT, port, check=True).stdout == "b'hello'\n"
        greeter.join()


def test_a_command_that_hangs_is_ended_with_everything_it_started(pi4):
    with pytest.raises(BoardError, match=r"did not end within 3 s; so far:\nhere it hangs\n"):
        pi4.run("sh", "-c", "echo here it hangs; setsid sleep 98765 & sleep 98765", timeout_s=3)
    _wait_until_gone("98765")


def test_what_a_command_left_in_the_background_ends_with_it(pi4):
    done = pi4.run("sh", "-c", "setsid sleep 87654 >/dev/null 2>&1 & echo done", check=True)
    assert done.stdout == "done\n"
    _wait_until_gone("87654")


def test_a_command_that_fails_says_how(pi4):
    assert pi4.run("sh", "-c", "kill -SEGV $$").returncode == 128 + 11
    with pytest.raises(BoardError, match=r"status 3:\nno\n"):
        pi4.run("sh", "-c", "echo no; exit 3", check=True)


def test_nothing_of_the_hosts_environment_gets_in_and_input_does(pi4, monkeypatch):
    monkeypatch.setenv("FROM_THE_HOST", "1")
    said = pi4.run("sh", "-c", "cat; env", env={"MINE": "2"}, input="read\n", check=True).stdout
    assert said.startswith("read\n")
    assert "MINE=2" in said
    assert "FROM_THE_HOST" not in said


def test_what_is_written_on_one_board_is_not_there_at_the_next_boot(tmp_path):
    with boot(BOARDS["pi4"], tmp_path / "first") as first:
        first.run("sh", "-c", "echo mine > /etc/mine; rm /usr/bin/awk", check=True)
        assert (first.root / "etc/mine").read_text() == "mine\n"
    assert not (tmp_path / "first/upper").exists()
    with boot(BOARDS["pi4"], tmp_path / "second") as second:
        assert second.run("sh", "-c", "test ! -e /etc/mine && test -e /usr/bin/awk").returncode == 0


def test_mounts_are_seen_by_this_process_only(pi4):
    assert str(pi4.root) in Path("/proc/self/mounts").read_text()
    assert str(pi4.root) not in Path(f"/proc/{os.getppid()}/mounts").read_text()


def _greet(server: socket.socket) -> None:
    peer, _ = server.accept()
    with peer:
        peer.sendall(b"hello")


def _package(folder: Path, name: str, architecture: str, depends: str) -> Path:
    """Returns a .deb whose script uses what the scripts of packages use."""
    tree = folder / name
    (tree / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: 1\nArchitecture: {architecture}\nDepends: {depends}\n"
    (tree / "DEBIAN/control").write_text(f"{control}Maintainer: nobody <nobody@example.com>\nDescription: a test\n")
    script = tree / "DEBIAN/postinst"
    script.write_text(
        "#!/bin/sh\nset -e\nuseradd --system mine\nid mine\nfind /etc/passwd -newer /etc/hosts | xargs ls\n"
    )
    with script.open("a") as lines:
        lines.write("echo made by its script\n")
    script.chmod(0o755)
    subprocess.run(["dpkg-deb", "--build", tree, folder / f"{name}.deb"], check=True, capture_output=True)
    return folder / f"{name}.deb"


def _copied(file: Path, root: Path) -> str:
    (root / "tmp" / file.name).write_bytes(file.read_bytes())
    return f"/tmp/{file.name}"


def _wait_until_gone(argument: str) -> None:
    """The kernel may take a moment to end the processes of a namespace whose first one was killed."""
    deadline = time.monotonic() + 30
    while any(argument.encode() in _command_line(entry) for entry in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < deadline, f"a process with {argument} outlived its command"


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
