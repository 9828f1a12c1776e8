"""Emulated Raspberry Pi boards: a Debian root of the board's architecture, run by qemu-user on this machine.

``with boot(BOARDS["pi4"], folder) as board: board.run("python3", "--version")``. A root is made once, with mmdebstrap,
and kept; each boot is an overlay over it, made in milliseconds and gone afterwards. Needs root, Linux and the packages
that ``why_not`` names. It tells what is right and wrong, never how fast: an emulated board is many times slower.
"""

from __future__ import annotations

import ctypes
import email
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / "build" / "arm"
# Enough for `dpkg -i` of a package that makes a user, and for a virtual environment.
BASE = ("python3", "python3-venv", "passwd", "libstdc++6", "libgomp1")
RECIPE = "1"  # another one wherever the code that makes a root changes: kept roots are made anew
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}

TOOLS = ("unshare", "setpriv", "mount", "umount", "chroot", "ip", "mmdebstrap", "dpkg-deb", "apt-get")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
BINFMT = Path("/proc/sys/fs/binfmt_misc")
QEMU = {"arm64": "qemu-aarch64", "armhf": "qemu-arm"}  # names in binfmt_misc
CLONE_NEWNS = 0x00020000

# What the boards' own /proc/cpuinfo says. The runtimes choose their kernels by it, and crash on that of an x86-64.
CPUINFO = {
    "cortex-a7": """model name	: ARMv7 Processor rev 5 (v7l)
BogoMIPS	: 38.40
Features	: half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae evtstrm
CPU implementer	: 0x41
CPU architecture: 7
CPU variant	: 0x0
CPU part	: 0xc07
CPU revision	: 5
""",
    "cortex-a72": """BogoMIPS	: 108.00
Features	: fp asimd evtstrm crc32 cpuid
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x0
CPU part	: 0xd08
CPU revision	: 3
""",
    "cortex-a76": """BogoMIPS	: 108.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x4
CPU part	: 0xd0b
CPU revision	: 1
""",
}
CORES = 4

# The first process of its own PID namespace: whatever it started ends with it. The command must not be that process
# itself, since the kernel ignores most signals to the first one; hence no exec.
AS_INIT = """set -e
[ "$1" = network ] || ip link set lo up
mount -t proc proc "$2/.proc"
root=$2
shift 2
chroot "$root" "$@" || exit $?
"""

# Everything that a boot and a run ask of the kernel, tried in namespaces that end with it.
TRIAL = f"""set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/lower" "$1/proc"
mount -t proc proc "$1/proc"
ip link set lo up
umount "$1/proc" "$1"
mkdir "$1/lower" "$1/upper" "$1/work" "$1/root"
chown 1:1 "$1/lower"
mknod "$1/lower/null" c 1 3
mount -t overlay overlay -o "lowerdir=$1/lower,upperdir=$1/upper,workdir=$1/work,volatile" "$1/root"
: > "$1/root/null"
[ -w {BINFMT}/register ] || mount -t binfmt_misc binfmt_misc {BINFMT}
[ -w {BINFMT}/register ]
"""


class BoardError(Exception):
    """A board that could not be made, or a command on it that failed or did not end."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """A kind of board.

    Attributes:
        name: the short one.
        model: as in ``/proc/device-tree/model``.
        architecture: Debian's, ``arm64`` or ``armhf``.
        release: Debian's, ``bookworm`` or ``trixie``.
        cpu: as qemu calls it.
        packages: of Debian, beyond the base.
    """

    name: str
    model: str
    architecture: str
    release: str
    cpu: str
    packages: tuple[str, ...] = ()


BOARDS = {
    board.name: board
    for board in (
        Board(
            name="pi4",
            model="Raspberry Pi 4 Model B Rev 1.4",
            architecture="arm64",
            release="bookworm",
            cpu="cortex-a72",
        ),
        Board(
            name="pi5",
            model="Raspberry Pi 5 Model B Rev 1.0",
            architecture="arm64",
            release="trixie",
            cpu="cortex-a76",
        ),
        Board(
            name="pi2",
            model="Raspberry Pi 2 Model B Rev 1.1",
            architecture="armhf",
            release="bookworm",
            cpu="cortex-a7",
            packages=("python3-numpy", "python3-zmq", "python3-msgpack", "python3-pil"),
        ),
    )
}


@functools.cache
def why_not() -> str | None:
    """Returns why boards cannot be emulated here, as a sentence; None where they can. It tries, in a child."""
    if os.geteuid() != 0:
        return "boards are emulated by root only: chroot and mounts need it"
    configurations = [str(_configuration(name)) for name in QEMU.values()]
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    missing += [path for path in (*configurations, str(KEYRING)) if not Path(path).exists()]
    if missing:
        packages = "qemu-user-static mmdebstrap debian-archive-keyring iproute2"
        return f"no {', '.join(missing)} here: apt-get install {packages}"
    with tempfile.TemporaryDirectory() as folder:
        command = ["unshare", "--mount", "--pid", "--net", "--fork", "sh", "-c", TRIAL, "sh", folder]
        tried = subprocess.run(command, capture_output=True, text=True)
    if tried.returncode != 0:
        said = (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"boards need namespaces, overlay mounts and binfmt_misc, and this machine refuses: {said}"
    return None


class EmulatedBoard:
    """A board that is on; made by ``boot``.

    Attributes:
        board: its kind.
        root: of its file system, to copy files in and out. Whoever follows an absolute link in it from outside gets to
            the host's file.
    """

    def __init__(self, board: Board, root: Path):
        self.board = board
        self.root = root

    def run(
        self,
        *command: str,
        network: bool = True,
        timeout_s: float = 120.0,
        env: Mapping[str, str] | None = None,
        input: str | None = None,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the board, as its root user, in ``/``. Whatever the command started ends with it.

        Args:
            command: program and arguments, no shell.
            network: whether the host's loopback and network are there; otherwise there is a loopback of its own only.
            timeout_s: how long the command may take.
            env: in addition to ``ENVIRONMENT``; nothing of the host's environment gets in.
            input: for its standard input, which is empty otherwise.
            check: whether a command that fails raises.

        Returns:
            Exit status and output; 128 + N where signal N ended the command.

        Raises:
            BoardError: the command did not end in time, or failed and ``check`` is set; with its output.
        """
        namespaces = ["--mount", "--pid", "--fork", "--kill-child", *([] if network else ["--net"])]
        # setpriv: unshare ends with this process, and everything else with unshare.
        outside = ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces]
        inside = ["sh", "-c", AS_INIT, "sh", "network" if network else "alone", str(self.root), *command]
        try:
            done = subprocess.run(
                [*outside, *inside],
                env={**ENVIRONMENT, "QEMU_CPU": self.board.cpu, **(env or {})},
                input=input or "",
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as expired:
            output = _text(expired.stdout) + _text(expired.stderr)
            message = f"{self.board.name}: {' '.join(command)} did not end within {timeout_s:g} s; so far:\n{output}"
            raise BoardError(message) from None
        if check and done.returncode != 0:
            message = f"{self.board.name}: {' '.join(command)} ended with status {done.returncode}:\n"
            raise BoardError(message + done.stdout + done.stderr)
        return done


@contextmanager
def boot(board: Board, folder: Path, cache: Path = CACHE) -> Iterator[EmulatedBoard]:
    """Turns a new board on, and off again; what was written on it is gone then.

    To be called in the main thread, like the runs: the mounts are seen by the thread that made them, by threads and
    processes that it starts later, and by nobody else on this machine.

    Args:
        board: its kind.
        folder: where its files may lie meanwhile; no ``:`` or ``,`` in its path.
        cache: where the roots are kept.

    Raises:
        BoardError: its root could not be made; with what mmdebstrap said.
    """
    _own_mounts()
    _register(QEMU[board.architecture])
    lower = _kept_root(board, cache)
    upper, work, root = (folder / name for name in ("upper", "work", "root"))
    for path in (upper, work, root):
        path.mkdir(parents=True)
    # volatile: nothing of it is to survive, so dpkg need not wait for the disk.
    layers = f"lowerdir={lower},upperdir={upper},workdir={work},volatile"
    _call("mount", "-t", "overlay", "overlay", "-o", layers, str(root))
    try:
        _disguise(root, board)
        yield EmulatedBoard(board, root)
    finally:
        _call("umount", str(root))
        for path in (upper, work, root):
            shutil.rmtree(path)


@functools.cache
def _own_mounts() -> None:
    """From here on this process has mounts of its own: they are gone when it ends, however it ends."""
    libc = ctypes.CDLL(None, use_errno=True)  # os.unshare is of Python 3.12
    if libc.unshare(CLONE_NEWNS) != 0:
        raise BoardError(f"no mount namespace: {os.strerror(ctypes.get_errno())}")
    _call("mount", "--make-rprivate", "/")


def _configuration(name: str) -> Path:
    return Path("/usr/lib/binfmt.d") / f"{name}.conf"


def _register(name: str) -> None:
    """Has the kernel start programs of an architecture in qemu, unless it does already.

    The kernel forgets it when the last one who has binfmt_misc mounted unmounts it; before Linux 6.7, when it is
    started again. Flag F of the configuration opens qemu now: it need not be in the board's root.
    """
    if not (BINFMT / "register").exists():
        _call("mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT))
    if not (BINFMT / name).exists():
        (BINFMT / "register").write_text(_configuration(name).read_text(encoding="utf-8"), encoding="utf-8")


def _disguise(root: Path, board: Board) -> None:
    """Writes what a board's kernel tells about the board into its ``/proc`` and ``/sys``.

    qemu-user shows the host's, and the runtimes then crash or compute otherwise. In a real procfs nothing can be made,
    so ``/proc`` is a folder of links to one mounted at ``/.proc``: all but the entries of processes other than one's
    own, so ``ps`` sees none.
    """
    proc = root / "proc"
    (root / ".proc").mkdir()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() and entry.name not in ("cpuinfo", "device-tree"):
            (proc / entry.name).symlink_to(f"/.proc/{entry.name}")
    cores = "".join(f"processor\t: {core}\n{CPUINFO[board.cpu]}\n" for core in range(CORES))
    _write(proc / "cpuinfo", f"{cores}Serial\t\t: 100000000a11ce00\nModel\t\t: {board.model}\n")
    (proc / "device-tree").symlink_to("/sys/firmware/devicetree/base")
    _write(root / "sys/firmware/devicetree/base/model", f"{board.model}\0")
    _write(root / "sys/class/thermal/thermal_zone0/temp", "48686\n")
    processors = root / "sys/devices/system/cpu"
    for name in ("online", "possible", "present"):
        _write(processors / name, f"0-{CORES - 1}\n")
    for core in range(CORES):
        folder = processors / f"cpu{core}"
        _write(folder / "topology/core_id", f"{core}\n")
        _write(folder / "topology/physical_package_id", "0\n")
        _write(folder / "topology/core_siblings_list", f"0-{CORES - 1}\n")
        _write(folder / "topology/thread_siblings_list", f"{core}\n")
        _write(folder / "cpufreq/cpuinfo_max_freq", "1500000\n")
        _write(folder / "cpufreq/cpuinfo_min_freq", "600000\n")


def _kept_root(board: Board, cache: Path) -> Path:
    """Returns the root that fits a board; made if it is not kept yet. Nobody may write to it."""
    packages = ",".join(sorted({*BASE, *board.packages}))
    digest = hashlib.sha256(f"{RECIPE} {packages}".encode()).hexdigest()[:8]
    kept = cache / f"{board.release}-{board.architecture}-{digest}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{kept.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making the same one
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                made = Path(folder) / "root"
                _make_root(made, board, packages)
                made.rename(kept)
    return kept


def _make_root(root: Path, board: Board, packages: str) -> None:
    """Extracts Debian without running one maintainer script, so without emulation; then does what the scripts would."""
    _call(
        "mmdebstrap",
        "--variant=extract",
        "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
        "--skip=cleanup/apt/cache",
        f"--architectures={board.architecture}",
        f"--keyring={KEYRING}",
        "--include=?essential",  # on its own: in a list, apt takes the whole list for one pattern
        f"--include={packages}",
        *_apt_options(),
        board.release,
        str(root),
        *_mirrors(board.release),
    )
    _record(root, root / "var/cache/apt/archives")
    shutil.rmtree(root / "var/cache/apt")
    shutil.rmtree(root / "etc/apt")  # names of this machine's mirrors
    for name in ("passwd", "group"):
        shutil.copy(root / f"usr/share/base-passwd/{name}.master", root / f"etc/{name}")
    _write(root / "etc/hosts", "127.0.0.1 localhost\n")
    # Debian 13's pip does not start without it.
    certificates = sorted(root.glob("usr/share/ca-certificates/mozilla/*.crt"))
    _write(root / "etc/ssl/certs/ca-certificates.crt", "".join(file.read_text("ascii") for file in certificates))
    # The alternatives that programs miss.
    (root / "usr/bin/awk").symlink_to("mawk")
    (root / "usr/bin/which").symlink_to("which.debianutils")
    for library in [*root.glob("usr/lib/*/blas/*.so.3"), *root.glob("usr/lib/*/lapack/*.so.3")]:
        (library.parents[1] / library.name).symlink_to(Path(library.parent.name) / library.name)
    for name in ("tmp", "dev/shm"):
        (root / name).chmod(0o1777)


def _record(root: Path, archives: Path) -> None:
    """Tells dpkg's database what was extracted: ``dpkg -i`` then checks dependencies and conflicts as on a board."""
    database = root / "var/lib/dpkg"
    with (database / "status").open("a", encoding="utf-8") as status:
        for archive in sorted(archives.glob("*.deb")):
            control = _call("dpkg-deb", "--field", str(archive))
            status.write(control.replace("\n", "\nStatus: install ok installed\n", 1) + "\n")
            fields = email.message_from_string(control)
            name = fields["Package"]
            if fields["Multi-Arch"] == "same":
                name += f":{fields['Architecture']}"
            with (
                subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as unpacked,
                tarfile.open(fileobj=unpacked.stdout, mode="r|") as files,
            ):
                names = [f"/{file.name.removeprefix('./')}\n" for file in files]
            _write(database / f"info/{name}.list", "".join(names))


def _mirrors(release: str) -> list[str]:
    """Returns the host's own Debian sources, for a release; none on a host without, where mmdebstrap knows its own.

    Without updates: a root then changes with Debian's point releases only, and a mirror is less often out of step.
    """
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME")
    wanted = ("--format", "$(ORIGIN) $(CODENAME) $(COMPONENT) $(REPO_URI)", "Created-By: Packages")
    sources = [line.rsplit(maxsplit=3) for line in _call("apt-get", "indextargets", *wanted).splitlines()]
    return [f"deb {source[3]} {release} main" for source in sources if source[:3] == ["Debian", codename, "main"]]


def _apt_options() -> list[str]:
    """Returns how the host's apt reaches its mirrors (proxies, certificates, clocks), for mmdebstrap's."""
    lines = _call("apt-config", "dump").splitlines()
    return [f"--aptopt={line}" for line in lines if line.startswith(("Acquire::http", "Acquire::Check-"))]


def _call(*command: str) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise BoardError(f"{command[0]} ended with status {done.returncode}:\n{done.stderr}")
    return done.stdout


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _text(output: str | bytes | None) -> str:
    """Returns what a command that timed out had said: bytes, whatever was asked for."""
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
