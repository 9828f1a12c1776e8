"""The boards that a package is built for on another machine, and which runtimes run there.

Each pair of target and runtime has its pins: one line for each wheel, with the digest of that very file, in
``board/pins/`` (``tools/pin_boards.py`` writes them). Start reading at ``TARGETS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

from ensembler.edge_runtime.backends import BACKENDS
from ensembler.protocol.errors import ConfigError
from ensembler.protocol.manifest import ModelFormat

OLDEST_GLIBC_MINOR = 17  # of the manylinux tags: an older one is accepted by every newer glibc


@dataclass(frozen=True, kw_only=True)
class Target:
    """A board's operating system.

    Attributes:
        name: on the command line.
        architecture: as Debian calls it.
        machine: as wheels call it.
        release: of Debian and Raspberry Pi OS.
        python: the release's own.
        glibc_minor: of its glibc 2.x; tells which wheels it takes.
        runtimes: the inference runtimes that there are for it, names of ``backends.BACKENDS``.
        wheels: what a package brings beside the runtime.
        depends: the Debian packages that it needs beside Python.
        recommends: those without which it does less: photographs are not decoded, encrypted bundles not opened.
    """

    name: str
    architecture: str
    machine: str
    release: str
    python: str
    glibc_minor: int
    runtimes: tuple[str, ...]
    wheels: tuple[str, ...]
    depends: tuple[str, ...]
    recommends: tuple[str, ...] = ()

    @property
    def pip_platforms(self) -> list[str]:
        """The tags of the wheels that it takes; pip does not know that a newer glibc takes older ones."""
        newest_first = range(self.glibc_minor, OLDEST_GLIBC_MINOR - 1, -1)
        return [*(f"manylinux_2_{minor}_{self.machine}" for minor in newest_first), f"manylinux2014_{self.machine}"]

    def pins(self, runtime: str) -> Traversable:
        """Returns the requirements file with every wheel of a package and its digest."""
        return resources.files("ensembler.export") / "board" / "pins" / f"{self.name}.{runtime}.txt"


_ARM64_RUNTIMES = ("onnxruntime", "ai-edge-litert")
_LIBRARY = ("msgpack", "numpy", "pyzmq", "pillow")
# Debian's own is new enough, and 4 MB that only encrypted bundles and signed cards need.
_CRYPTOGRAPHY = "python3-cryptography"

_ALL = (
    # Bookworm's compiled modules (OpenCV's, picamera2's) are for NumPy 1: with NumPy 2 before them they do not import.
    Target(
        name="rpi-arm64-bookworm",
        architecture="arm64",
        machine="aarch64",
        release="bookworm",
        python="3.11",
        glibc_minor=36,
        runtimes=_ARM64_RUNTIMES,
        wheels=("numpy<2", *(name for name in _LIBRARY if name != "numpy")),
        depends=("libstdc++6",),
        recommends=(_CRYPTOGRAPHY,),
    ),
    Target(
        name="rpi-arm64-trixie",
        architecture="arm64",
        machine="aarch64",
        release="trixie",
        python="3.13",
        glibc_minor=41,
        runtimes=_ARM64_RUNTIMES,
        wheels=_LIBRARY,
        depends=("libstdc++6",),
        recommends=(_CRYPTOGRAPHY,),
    ),
    # There are no 32-bit wheels of anything but the runtime; Debian's own packages are old enough for its NumPy 1.
    Target(
        name="rpi-armhf-bookworm",
        architecture="armhf",
        machine="armv7l",
        release="bookworm",
        python="3.11",
        glibc_minor=36,
        runtimes=("tflite-runtime",),
        wheels=(),
        depends=("libstdc++6", "python3-msgpack", "python3-numpy", "python3-zmq"),
        recommends=(_CRYPTOGRAPHY, "python3-pil"),
    ),
)
TARGETS = {target.name: target for target in _ALL}


def formats_for(target: Target) -> list[ModelFormat]:
    """Returns the formats that its runtimes read, the first one's first."""
    return list(dict.fromkeys(BACKENDS[runtime].format for runtime in target.runtimes))


def runtime_for(target: Target, formats: Sequence[ModelFormat], wanted: str | None = None) -> str:
    """Returns the runtime that a package for a bundle of these formats holds.

    Args:
        target: the board.
        formats: of the bundle, its default first.
        wanted: a name, or None for the one that reads the bundle's default if there is one.

    Raises:
        ConfigError: no runtime of the board reads the bundle, or not the wanted one.
    """
    able = [name for each in formats for name in target.runtimes if BACKENDS[name].format == each]
    if wanted is None and able:
        return able[0]
    if wanted in able:
        return wanted
    readable = " or ".join(f"--format {each}" for each in formats_for(target))
    held = " and ".join(formats)
    if wanted is None:
        runs = ", ".join(target.runtimes)
        raise ConfigError(f"{target.name} runs {runs}, and the bundle holds {held} models; export it with {readable}")
    if wanted not in target.runtimes:
        raise ConfigError(f"--runtime {wanted}: {target.name} has {', '.join(target.runtimes)}")
    raise ConfigError(
        f"--runtime {wanted} reads {BACKENDS[wanted].format} models, and the bundle holds {held}; "
        f"export it with --format {BACKENDS[wanted].format}"
    )
