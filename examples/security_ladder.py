"""A ladder of security, a server and a client on each rung: what the rung adds, its commands, an answer.

    python examples/security_ladder.py out/demo/run photo.jpg --out out/ladder

It exports the run for each rung and starts the servers itself, with the ``ensembler serve`` that it prints; the last
rung audits a client, which takes minutes. Options that it does not know go to ``ensembler export``. Who is kept from
what, and what no rung keeps from anybody: docs/threat-model.md.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from pathlib import Path

from ensembler import EdgeClient
from ensembler.cli import main as ensembler_main

LOOPBACK = "tcp://127.0.0.1:*"


def ensembler(*words: object, status: int = 0, shown: bool = True) -> str:
    """Prints a command and runs it as the shell would; ends if its exit status differs.

    Returns what it said, if that is not shown.
    """
    arguments = [str(word) for word in words]
    print(f"$ ensembler {shlex.join(arguments)}", flush=True)
    said = io.StringIO()
    with nullcontext() if shown else redirect_stdout(said):
        found = ensembler_main(arguments)
    if found != status:
        sys.exit(f"it ended with {found}, not {status}")
    return said.getvalue()


@contextmanager
def serving(bundle: Path, *options: object) -> Iterator[str]:
    """Runs ``ensembler serve`` beside this program and yields its address."""
    words = ["serve", str(bundle), "--bind", LOOPBACK, *map(str, options)]
    print(f"$ ensembler {shlex.join(words)} &", flush=True)
    command = [sys.executable, "-m", "ensembler.cli", *words, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:  # noqa: S603
        try:
            line = server.stdout.readline() if server.stdout else ""
            if not line:
                sys.exit("the server did not start")
            yield json.loads(line)["endpoint"]
        finally:
            server.terminate()


def plaintext(run: Path, image: Path, out: Path, export: list[str]) -> None:
    """A: nothing. Features travel in the clear and anybody may answer: for one machine, or a network of your own."""
    ensembler("export", run, "--out", out / "a", "--plaintext", *export, shown=False)
    with serving(out / "a" / "server", "--plaintext") as server:
        ensembler("predict", out / "a" / "client", image, "--server", server, "--plaintext")


def encrypted(run: Path, image: Path, out: Path, export: list[str]) -> None:
    """B, the default: CURVE. Nobody on the way reads, the bundle pins the server, the server knows its devices."""
    ensembler("export", run, "--out", out / "b", *export, shown=False)
    ensembler("keys", "new", "--out", out / "stranger")
    with serving(out / "b" / "server") as server:
        ensembler("predict", out / "b" / "client", image, "--server", server)
        print("a device that the server does not know:")
        stranger = ("--key", out / "stranger" / "device.key_secret")
        ensembler("predict", out / "b" / "client", image, "--server", server, *stranger, status=1)


def encrypted_at_rest(run: Path, image: Path, out: Path, export: list[str]) -> None:
    """C: the bundle is encrypted. Who steals the storage has no head, noise and selector, unless the key is on it."""
    key = out / "bundle.key"
    ensembler("keys", "bundle", key)
    ensembler("export", run, "--out", out / "c", "--encrypt-key", key, *export, shown=False)
    with serving(out / "c" / "server") as server:
        ensembler("predict", out / "c" / "client", image, "--server", server, "--bundle-key", key)
        print("without the key:")
        ensembler("predict", out / "c" / "client", image, "--server", server, status=2)


def two_operators(run: Path, image: Path, out: Path, export: list[str]) -> None:
    """D: two operators. Neither has all the nets; each gets whole features, so it hides no image (threat-model.md)."""
    ensembler("export", run, "--out", out / "d", "--parties", 2, *export, shown=False)
    with ExitStack() as stack:
        servers = []
        for name in ("server_0", "server_1"):
            key = out / "d" / "keys" / f"{name}.key_secret"
            servers += ["--server", stack.enter_context(serving(out / "d" / name, "--key", key))]
        ensembler("predict", out / "d" / "client", image, *servers)


def audited(run: Path, image: Path, out: Path, data: list[str]) -> None:
    """E: no bundle without an audit that somebody we know has signed. It refuses a client; it does not protect one."""
    bundle, key, report = out / "b" / "client", out / "auditor.key", out / "report.html"
    auditor = json.loads(ensembler("keys", "signing", key, "--json", shown=False))["public"]  # what an application pins
    with serving(out / "b" / "server") as server:
        print(answer_if_audited(bundle, server, image, auditor))
        ensembler("audit", bundle, "--run", run, "--budget", "quick", "--out", report, *data)
        signing = ("--signing-key", key, "--signed-by", "the auditor of this ladder")
        ensembler("card", bundle, "--audit", report.with_suffix(".json"), *signing)
        print(answer_if_audited(bundle, server, image, auditor))
        print(answer_if_audited(bundle, server, image, auditor="0" * 64))


def answer_if_audited(bundle: Path, server: str, image: Path, auditor: str) -> str:
    """Sends nothing unless the bundle's privacy card is signed with the key that is pinned."""
    with EdgeClient(bundle, server) as client:
        card = client.info().privacy
        if card is None or card.signer != auditor:
            return f"refused: {bundle} has no card signed by {auditor[:8]}..."
        return f"{client.predict(image).label}, by a client of which the card says: {card.facts['sentence']}"


def main(arguments: list[str]) -> None:
    """Climbs."""
    parser = argparse.ArgumentParser(description="A ladder of security, a server and a client on each rung.")
    parser.add_argument("run", type=Path, help="a run folder, such as out/demo/run")
    parser.add_argument("image", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out/ladder"), help="a new folder (default: out/ladder)")
    parser.add_argument("--audit-data", help="whose held-out images the audit uses (default: the run's)")
    options, export = parser.parse_known_args(arguments)
    options.out.mkdir(mode=0o700, parents=True)
    for rung in (plaintext, encrypted, encrypted_at_rest, two_operators):
        print(f"\n{rung.__doc__}\n")
        rung(options.run, options.image, options.out, export)
    print(f"\n{audited.__doc__}\n")
    audited(options.run, options.image, options.out, ["--data", options.audit_data] if options.audit_data else [])


if __name__ == "__main__":
    main(sys.argv[1:])
