"""The ``--target`` of ``ensembler-export``: one file that installs offline on a board."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensembler.cli.console import Console, a_path
from ensembler.protocol.errors import ConfigError
from ensembler.protocol.manifest import MANIFEST_NAME

if TYPE_CHECKING:  # a board's package has this verb, but not ensembler.export
    from ensembler.export.packages import Package
    from ensembler.export.targets import Target

OF_A_PACKAGE = {"run", "out", "json", "target", "package", "runtime", "include_bundle", "wheels"}


def add_packaging(parser: argparse.ArgumentParser) -> None:
    """Declares the options, the last ones of the verb."""
    group = parser.add_argument_group("a board's package", "one file for a board, built here; also of a client bundle")
    group.add_argument("--target", help="rpi-arm64-bookworm, rpi-arm64-trixie, rpi-armhf-bookworm")
    group.add_argument(
        "--package", choices=["deb", "wheelhouse"], help="wheelhouse: a tar.gz with install.sh (default: deb)"
    )
    group.add_argument("--runtime", help="the inference runtime inside (default: the bundle's)")
    group.add_argument("--include-bundle", action="store_true", help="put the secret bundle inside, too")
    group.add_argument(
        "--wheels", type=a_path, metavar="FOLDER", help="take the wheels from here, not from the network"
    )
    names = [action.dest for action in parser._actions if action.dest != "help"]
    parser.set_defaults(defaults={name: parser.get_default(name) for name in names})


def target_of(options: argparse.Namespace) -> Target | None:
    """Returns the board that was asked for, None if there was none.

    Raises:
        ConfigError: there is no such board, or an option of a package without one.
    """
    from ensembler.export.targets import TARGETS

    if options.target is not None:
        if options.target not in TARGETS:
            raise ConfigError(f"--target {options.target}: there is {', '.join(TARGETS)}")
        return TARGETS[options.target]
    given = {"--package": options.package, "--runtime": options.runtime, "--wheels": options.wheels}
    stray = [name for name, value in given.items() if value is not None]
    stray += ["--include-bundle"] if options.include_bundle else []
    if stray:
        raise ConfigError(f"{stray[0]} goes with --target: {', '.join(TARGETS)}")
    return None


def is_bundle(path: Path) -> bool:
    """Whether a path is that of a client bundle, and no run."""
    return (path / MANIFEST_NAME).is_file()


def refuse_others(options: argparse.Namespace) -> None:
    """Refuses options that would change a bundle: an existing one is packed as it is.

    Raises:
        ConfigError: there is one.
    """
    for name, value in options.defaults.items():
        if name not in OF_A_PACKAGE and getattr(options, name) != value:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option}: {options.run} is a bundle, and packed as it is; say it when a run is exported"
            )


def package(
    options: argparse.Namespace, target: Target, bundle: Path, console: Console
) -> tuple[dict[str, Any], list[str]]:
    """Builds it; returns what is said of it, for scripts and for people."""
    from ensembler.export import packages

    if options.include_bundle:
        console.say(
            "warning: the package will hold the client bundle, which is secret. Package caches, repositories and "
            "backups keep copies that others can read; ensembler install-bundle leaves none"
        )
    made = packages.build(
        target,
        bundle,
        options.out,
        kind=options.package or "deb",
        runtime=options.runtime,
        include_bundle=options.include_bundle,
        source=options.wheels,
        progress=console.say,
    )
    return _document(made), _lines(made, target)


def _document(made: Package) -> dict[str, Any]:
    return {
        "package": str(made.path),
        "sha256": made.sha256,
        "megabytes": round(made.megabytes, 2),
        "runtime": made.runtime,
        "has_bundle": made.has_bundle,
        "licences": {f"{one.name} {one.version}": one.licence for one in made.licences},
    }


def _lines(made: Package, target: Target) -> list[str]:
    lines = [f"{one.name} {one.version}: {one.licence}" for one in made.licences]
    lines += ["", f"{made.path}: {made.megabytes:.1f} MB with {made.runtime}, for {target.name}"]
    lines.append(f"sha256 {made.sha256}")
    if made.path.suffix == ".deb":
        lines.append(f"on the board: sudo apt install ./{made.path.name}")
    else:
        stem = made.path.name.removesuffix(".tar.gz")
        lines.append(f"on the board: tar xf {made.path.name} && sudo sh {stem}/install.sh")
        bundle = f"{stem}/bundle" if made.has_bundle else "client"
        lines.append(f"then: ensembler install-bundle {bundle}")
    if made.path.suffix == ".deb" and not made.has_bundle:
        lines.append("then, with the bundle copied there: sudo ensembler install-bundle client --owner ensembler")
    return lines
