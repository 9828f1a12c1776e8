"""``ensembler export`` and ``ensembler-export``: a run folder to bundles, with keys and the parity report."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensembler.cli.card import add_signing, signer_of
from ensembler.cli.console import Console, ProgressReporter, a_path, need, need_export
from ensembler.cli.export_crypto import add_crypto, export_crypto, refuse_crypto
from ensembler.cli.package import add_packaging, is_bundle, package, refuse_others, target_of
from ensembler.edge_runtime import sealing
from ensembler.edge_runtime.sealing import BundleSecret
from ensembler.protocol.errors import ConfigError, EnsemblerError
from ensembler.protocol.manifest import BodiesFormat, ModelFormat, Precision
from ensembler.transport import keys

if TYPE_CHECKING:
    from ensembler.export.targets import Target

NAME = "export"
HELP = "turn a run into a quantised client bundle and a server bundle, and a board's package"

KEYS_FOLDER = "keys"
AUTHORIZED_FOLDER = "authorized"
AUDIT_NAME = "audit.html"
UNFINISHED = ".unfinished"  # in keys/ until the bundles are there


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "run", type=a_path, help="the run folder of ensembler train; with --target also a client bundle"
    )
    parser.add_argument(
        "--out", type=a_path, required=True, help="gets client/, server/, keys/ and parity.json, and the package"
    )
    parser.add_argument(
        "--format",
        choices=["onnx", "tflite", "torch"],
        action="append",
        help="onnx, tflite: of head and tail; with both, the faster one here is the bundle's default (default: onnx, "
        "or what --target runs). torch: of the bodies, in the place of onnx",
    )
    parser.add_argument("--quantize", choices=["int8", "none"], default="int8", help="head and tail (default: int8)")
    parser.add_argument(
        "--server-precision",
        choices=["auto", "int8", "float32"],
        default="auto",
        help="bodies; auto: int8 where that reaches the gate, else float32 (default: auto)",
    )
    parser.add_argument(
        "--server-weight-bits",
        type=int,
        choices=[7, 8],
        default=8,
        help="of int8 bodies; 7 is faster on x86-64 servers without VNNI, and a little less exact (default: 8)",
    )
    parser.add_argument(
        "--parties",
        type=int,
        help="divide the bodies among so many operators, a bundle each (default: as many as the run was trained for)",
    )
    parser.add_argument(
        "--server-bundle",
        type=a_path,
        action="append",
        default=[],
        help="make only a client, for this server bundle; once for each operator",
    )
    parser.add_argument(
        "--server-key",
        action="append",
        default=[],
        metavar="KEY",
        help="the server's public key to pin in the client, a file or its 40 characters; once for each operator",
    )
    parser.add_argument(
        "--plaintext", action="store_true", help="pin no key and make none: unencrypted connections only"
    )
    encrypt = parser.add_mutually_exclusive_group()
    encrypt.add_argument(
        "--encrypt-key", type=a_path, help="encrypt head and tail with this key file (ensembler keys bundle FILE)"
    )
    encrypt.add_argument(
        "--passphrase-file", type=a_path, help="encrypt head and tail with the passphrase in this file"
    )
    parser.add_argument(
        "--protocol",
        choices=["split", "c2pi"],
        default="split",
        help="split: head and tail on the device (default); c2pi: the first layers by two-party computation",
    )
    add_crypto(parser)
    parser.add_argument("--data", default=None, help="where the run's data is now, if it moved")
    parser.add_argument(
        "--parity-images", type=int, default=10_000, help="held-out images in the report (default: 10000)"
    )
    parser.add_argument("--min-sqnr-db", type=float, default=35.0, help="gate (default: 35)")
    parser.add_argument("--max-accuracy-drop", type=float, default=0.5, help="gate, in points (default: 0.5)")
    parser.add_argument(
        "--require-ssim",
        type=float,
        metavar="SSIM",
        help="gate: audit the client before it is released; no attack may reach more. Writes its privacy card",
    )
    parser.add_argument(
        "--audit-budget",
        choices=["quick", "standard", "thorough"],
        help="of that audit, as in ensembler audit (default: quick)",
    )
    add_signing(parser)
    add_packaging(parser)


def run(options: argparse.Namespace, console: Console) -> int:
    """Exports, packs, or both."""
    need(["ensembler.export"], "export", "exporting")
    if options.protocol == "c2pi":
        document, lines = export_crypto(options, console, _keys_to_pin, _secret(options))
        console.result(document, "\n".join(lines))
        return 0
    refuse_crypto(options)
    target = target_of(options)
    if is_bundle(options.run):
        if target is None:
            raise ConfigError(f"{options.run} is a bundle and no run; --target makes a board's package of it")
        refuse_others(options)
        document, lines = package(options, target, options.run, console)
    else:
        document, lines = _export(options, target, console)
    console.result(document, "\n".join(lines))
    return 0


def _export(options: argparse.Namespace, target: Target | None, console: Console) -> tuple[dict[str, Any], list[str]]:
    """Makes bundles of a run, and the package; returns what is said of them, for scripts and for people."""
    need_export()
    from ensembler.export.packages import packer
    from ensembler.export.parity import Gates
    from ensembler.export.pipeline import ExportOptions, export, made_for
    from ensembler.export.targets import formats_for, runtime_for

    if options.parity_images < 1:
        raise ConfigError(f"--parity-images {options.parity_images}: at least one")
    if options.server_bundle and not options.server_key and not options.plaintext:
        raise ConfigError("--server-bundle needs --server-key: the public key of the server that serves it")
    if options.server_bundle and options.parties not in (None, len(options.server_bundle)):
        raise ConfigError(f"--parties {options.parties}: {len(options.server_bundle)} server bundles were given")
    formats, server_format = _formats(options.format or [], ["onnx"] if target is None else formats_for(target))
    if target is not None:
        # Not after the minutes of an export.
        runtime_for(target, formats, options.runtime)
        if options.package != "wheelhouse":
            packer()
    secret = _secret(options)
    approve = _privacy_gate(options, secret, console)
    precision: Precision = "int8" if options.quantize == "int8" else "float32"
    with _keys_to_pin(options) as server_keys:
        report = export(
            options.run,
            options.out,
            ExportOptions(
                client_precision=precision,
                formats=formats,
                server_precision=options.server_precision,
                server_weight_bits=options.server_weight_bits,
                server_format=server_format,
                parties=options.parties,
                server_bundles=tuple(options.server_bundle),
                server_public_keys=server_keys,
                data=options.data,
                parity_images=options.parity_images,
                gates=Gates(min_sqnr_db=options.min_sqnr_db, max_accuracy_drop_points=options.max_accuracy_drop),
                secret=secret,
            ),
            progress=console.say,
            approve=approve,
        )
    document: dict[str, Any] = {"client": str(options.out / "client"), "parity": str(options.out / "parity.json")}
    lines = [report.table(), "", f"{options.out / 'client'}: the client bundle, secret: for the device only"]
    if approve is not None:
        document["audit"] = str(options.out / AUDIT_NAME)
        lines.append(
            f"{options.out / AUDIT_NAME}: what attacks reached; the privacy card in the client bundle says it too"
        )
    if secret is not None:
        lines.append("head and tail are encrypted; bring the key to the device on another way than the bundle")
    servers = options.server_bundle or [options.out / name for name in made_for(options.run, options.parties)]
    if not options.server_bundle:
        document |= {path.name: str(path) for path in servers}
        lines += [f"{path}: a server bundle, for its operator" for path in servers]
    made_keys = options.out / KEYS_FOLDER
    if not options.server_key and not options.plaintext:
        document["keys"] = str(made_keys)
        lines.append(
            f"{made_keys}: new keys; a server needs its own server*.key_secret and authorized/, the device "
            "device.key_secret"
        )
    if target is not None:
        try:
            described, said = package(options, target, options.out / "client", console)
        except EnsemblerError:
            again = f"ensembler-export {options.out / 'client'} --target {target.name} --out {options.out}"
            console.say(f"the bundles are there; for the package alone: {again}")
            raise
        document |= described
        lines += ["", *said]
    lines.append(f"next: ensembler serve {servers[0]} --bind tcp://0.0.0.0:5555")
    return document, lines


def _formats(
    given: Sequence[ModelFormat | BodiesFormat], usual: Sequence[ModelFormat]
) -> tuple[tuple[ModelFormat, ...], BodiesFormat]:
    """Returns the formats of head and tail, and that of the bodies."""
    of_client: list[ModelFormat] = [each for each in given if each != "torch"]
    return tuple(of_client or usual[:1]), "torch" if "torch" in given else "onnx"


def _secret(options: argparse.Namespace) -> BundleSecret | None:
    """Returns what head and tail are encrypted with; None leaves them readable."""
    if options.encrypt_key is not None:
        return sealing.key(options.encrypt_key)
    if options.passphrase_file is not None:
        return sealing.passphrase_file(options.passphrase_file)
    return None


def _privacy_gate(
    options: argparse.Namespace, secret: BundleSecret | None, console: Console
) -> Callable[[Path], Sequence[str]] | None:
    """Returns what audits the client before it is released and writes its card; None if nobody asked for that."""
    limit, signer = options.require_ssim, signer_of(options)
    if limit is None:
        if signer is not None or options.audit_budget is not None:
            raise ConfigError("--audit-budget, --signing-key and --signed-by go with --require-ssim")
        return None
    if not 0 < limit <= 1:
        raise ConfigError(f"--require-ssim {limit:g}: give a mean SSIM above 0 and up to 1, for instance 0.3")
    from ensembler.export.pipeline import CLIENT_NAME
    from ensembler.privacy.audit import audit
    from ensembler.privacy.card import require_ssim, write_card
    from ensembler.training.fit import pick_device

    def approve(folder: Path) -> Sequence[str]:
        console.say("privacy: attacking the client that is to be released")
        reporter = ProgressReporter(console)
        try:
            document = audit(
                options.run,
                folder / CLIENT_NAME,
                folder / AUDIT_NAME,
                budget=options.audit_budget or "quick",
                data=options.data,
                device=pick_device("auto"),
                command=shlex.join(["ensembler", *sys.argv[1:]]),
                reporter=reporter,
                secret=lambda _: secret,
                shown_as=str(options.out / CLIENT_NAME),
            )
        finally:
            reporter.close()
        require_ssim(document, limit)
        write_card(folder / CLIENT_NAME, document, signer)
        return AUDIT_NAME, Path(AUDIT_NAME).with_suffix(".json").name

    return approve


@contextmanager
def _keys_to_pin(options: argparse.Namespace) -> Iterator[tuple[str, ...] | None]:
    """Yields the public keys of the servers, given or new; new ones do not survive an export that fails."""
    from ensembler.export.pipeline import CLIENT_NAME, in_use, is_abandoned, made_for

    made_folder, had_client = not options.out.exists(), (options.out / CLIENT_NAME).exists()
    made, marker = options.out / KEYS_FOLDER, options.out / KEYS_FOLDER / UNFINISHED
    is_new = not options.server_key and not options.plaintext
    public: tuple[str, ...] | None = None
    names = ["server"]
    if options.server_key:
        public = tuple(keys.public_of(given) for given in options.server_key)
    elif is_new:
        # Keys take their time: not for a run or a number of operators that the export would refuse.
        if options.protocol != "c2pi":  # which has one server
            names = made_for(options.run, options.parties)
        if marker.is_file() and is_abandoned(marker) and not had_client:
            shutil.rmtree(made)  # of an export that was killed: no bundle has these keys
        _refuse_existing(made)
    try:
        if is_new:
            try:
                made.mkdir(parents=True, mode=0o700)
                marker.touch(mode=0o600)
            except OSError as error:
                raise ConfigError(f"--out {options.out}: cannot be written: {error.strerror}") from error
        with in_use(marker) if is_new else nullcontext():
            yield _create_keys(made, names) if is_new else public
    except BaseException:
        # Ctrl-C after the last rename: a finished bundle pins these keys.
        if is_new and (had_client or not (options.out / CLIENT_NAME).exists()):
            shutil.rmtree(made, ignore_errors=True)
        if made_folder:
            with suppress(OSError):  # not there, or not empty
                options.out.rmdir()
        raise
    if is_new:
        marker.unlink()


def new_keys(folder: Path) -> tuple[str, ...]:
    """Makes a pair for a server and one for a device, which is authorised; returns the server's public key."""
    _refuse_existing(folder)
    return _create_keys(folder, ["server"])


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise ConfigError(f"{folder} exists; choose another --out, remove it, or pass --server-key with the key to pin")


def _create_keys(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    # The names are those of the bundles: server, or server_0, server_1, ...
    public = [keys.create(folder, name)[0] for name in names]
    device, _ = keys.create(folder, "device")
    authorized = folder / AUTHORIZED_FOLDER
    authorized.mkdir(mode=0o700)
    shutil.copy(device, authorized / device.name)
    return tuple(keys.load_public(path) for path in public)
