"""The two server bundles that benchmarks/load.py and benchmarks/side_by_side.py serve, and how a server is started.

    python benchmarks/bundles.py [--out out/load]

* ``tiny``: N = 4 bodies so small that a server's own work is most of a request's time: ResNet-10 slim on images of
  16x16 pixels, cut after its third stage, int8.
* ``resnet18``: N = 4 bodies of the papers' ResNet-18, cut after its stem as in the papers, on images of 32x32 pixels,
  int8.

How fast a body answers does not depend on what it has learned, so both are trained for one epoch of a few images. They
are made once; remove the folder to make them again. Needs the extra ``export``.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zmq

from ensembler.transport import keys

FOLDER = Path("out/load")
BUNDLES = {
    "tiny": "--arch resnet10_slim --head-end layer3",
    "resnet18": "--arch resnet18",
}
IMAGE_SIZE = {"tiny": 16, "resnet18": 32}
IMAGES, CLASSES = 192, 3
# One epoch of noise passes no gate on accuracy, and none is meant.
OPEN_GATES = "--plaintext --server-precision int8 --min-sqnr-db -1000 --max-accuracy-drop 100"


def made(name: str, folder: Path = FOLDER) -> Path:
    """Returns the server bundle ``name``; trains and exports it unless it is there."""
    import product

    out = folder / name
    if not (out / "server" / "manifest.json").is_file():
        data = images(folder, IMAGE_SIZE[name])
        training = f"--data {data} -N 4 -P 2 --epochs 1 --batch-size 16 --learning-rate 0.02".split()
        run = product.trained(folder / f"{name}_run", *BUNDLES[name].split(), *training)
        product.exported(run, out, data, *OPEN_GATES.split())
    return out / "server"


def images(folder: Path, size: int) -> str:
    """Writes noise whose class is its strongest channel; returns its ``--data`` specification."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.PCG64(0))
    paths = []
    for part in ("train", "test"):
        y = rng.integers(0, CLASSES, IMAGES)
        x = rng.integers(0, 120, (IMAGES, 3, size, size), dtype=np.uint8)
        x[np.arange(IMAGES), y] += 100
        paths.append(folder / f"{part}{size}.npz")
        np.savez(paths[-1], x=x, y=y, label_names=np.array(["red", "green", "blue"]))
    return "npz:" + ",".join(map(str, paths))


@dataclass(frozen=True)
class Identities:
    """The keys of a server and of the devices that may connect.

    Attributes:
        folder: holds ``server.key_secret`` and ``authorized/``.
        server: the server's public key.
        devices: a pair for each.
    """

    folder: Path
    server: str
    devices: list[keys.KeyPair]

    @classmethod
    def new(cls, folder: Path, devices: int) -> Identities:
        """Makes all of them in an empty folder."""
        _, secret = keys.create(folder, "server")
        pairs = []
        for index in range(devices):
            public, own = keys.create(folder / "devices", f"device{index:03}")
            pairs.append(keys.load_pair(own))
            authorized = folder / "authorized"
            authorized.mkdir(mode=0o700, exist_ok=True)
            (authorized / public.name).write_bytes(public.read_bytes())
        return cls(folder, keys.load_public(secret), pairs)

    def apply(self, socket: zmq.Socket[bytes], device: int) -> None:
        """Gives a socket the keys of one device."""
        pair = self.devices[device % len(self.devices)]
        socket.curve_serverkey = self.server.encode()
        socket.curve_publickey, socket.curve_secretkey = pair.public.encode(), pair.secret.encode()


@contextmanager
def served(
    bundle: Path,
    identities: Identities | None,
    *options: str,
    log: Path,
    within: Sequence[str] = (),
    host: str = "127.0.0.1",
) -> Iterator[str]:
    """Runs ``ensembler serve`` in a process of its own and yields its address; plaintext without identities.

    ``within`` goes before its command, and ``host`` is what it binds.
    """
    if identities is None:
        security = ["--plaintext"]
    else:
        folder = identities.folder
        security = ["--key", str(folder / "server.key_secret"), "--authorized", str(folder / "authorized")]
    command = [
        *within,
        sys.executable,
        "-m",
        "ensembler.cli",
        "serve",
        str(bundle),
        "--bind",
        f"tcp://{host}:*",
        "--json",
    ]
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen([*command, *security, *options], stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start; see {log}")
        yield str(json.loads(line)["endpoint"])
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


def main() -> None:
    """Makes both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    for name in BUNDLES:
        print(made(name, options.out))


if __name__ == "__main__":
    main()
