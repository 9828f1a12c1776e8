"""``ensembler audit``: what could a server reconstruct of the images that this device sends?"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from ensembler.cli.console import Console, ProgressReporter, a_path, need_export
from ensembler.cli.predict import add_bundle_secret, bundle_secret
from ensembler.client import refuse_idle_secret, secret_finder
from ensembler.protocol.errors import ConfigError, DataError
from ensembler.protocol.manifest import load_client

NAME = "audit"
HELP = "attack an exported device and write a report of what a server could see"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "subject", type=a_path, metavar="RUN|BUNDLE", help="a run folder, or a client bundle with --run"
    )
    parser.add_argument("--run", type=a_path, help="the run that the bundle was exported from")
    add_bundle_secret(parser)
    parser.add_argument("--out", type=a_path, default=Path("report.html"), help="the report (default: report.html)")
    parser.add_argument("--data", help="whose held-out images are used (default: the run's data)")
    parser.add_argument("--budget", default="standard", help="quick, standard or thorough (default: standard)")
    parser.add_argument("--attack", action="append", help="this attack in place of the budget's; may be repeated")
    parser.add_argument("--aux", default="disjoint", help="the attacker owns disjoint images, or the train set (train)")
    parser.add_argument(
        "--other-device",
        type=a_path,
        metavar="BUNDLE",
        help="a client bundle that the attacker owns, of another client",
    )
    parser.add_argument(
        "--operators",
        metavar="K,...",
        help="with several: those who share what they see, by their numbers from 1 (default: all)",
    )
    parser.add_argument("--seeds", type=int, help="how often each attack is repeated (default: the budget's)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")


def run(options: argparse.Namespace, console: Console) -> int:
    """Audits."""
    need_export()
    from ensembler.privacy.audit import audit, chosen_attacks
    from ensembler.privacy.card import table
    from ensembler.privacy.scene import check_attacker
    from ensembler.training.fit import pick_device
    from ensembler.training.processor import keep_freed_memory
    from ensembler.training.runs import RunFolder

    keep_freed_memory()
    subject: Path = options.subject
    # Before a run is exported, which takes its time.
    chosen_attacks(options.out, budget=options.budget, attacks=options.attack, seeds=options.seeds)
    coalition = None if options.operators is None else _coalition(options.operators)
    attacker = {"auxiliary": options.aux, "other_device": options.other_device, "coalition": coalition}
    device = pick_device(options.device)
    reporter = ProgressReporter(console)
    with tempfile.TemporaryDirectory(prefix="ensembler-audit-") as folder:
        if (subject / "manifest.json").is_file():
            if options.run is None:
                raise ConfigError(
                    f"audit {subject}: a bundle needs --run RUN, the run it was exported from: attacks differentiate "
                    "through its float nets"
                )
            refuse_idle_secret(subject, load_client(subject), **bundle_secret(options))
            run_path, bundle, shown_as = options.run, subject, ""
        else:
            for name in ("run", "bundle_key", "passphrase_file"):
                if getattr(options, name) is not None:
                    option = name.replace("_", "-")
                    raise ConfigError(f"audit {subject}: --{option} goes with a client bundle, and this is none")
            opened = RunFolder.open(subject)
            check_attacker(opened, operators=opened.config.parties, **attacker)
            run_path, bundle = subject, _exported(subject, Path(folder), console, options.data)
            shown_as = "an int8 client of the run, exported for this audit and not kept"
        try:
            document = audit(
                run_path,
                bundle,
                options.out,
                budget=options.budget,
                attacks=options.attack,
                data=options.data,
                **attacker,
                seeds=options.seeds,
                device=device,
                command=shlex.join(["ensembler", *sys.argv[1:]]),
                reporter=reporter,
                secret=secret_finder(**bundle_secret(options)),
                shown_as=shown_as,
            )
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt("finished attacks are kept; the same command goes on") from interrupt
        finally:
            reporter.close()
    failed = [f"FAILED CHECK: {gate['name']}: {gate['words']}" for gate in document["gates"] if not gate["passed"]]
    text = "\n".join([table(document), *failed, document["verdict"]["sentence"], f"the report: {options.out}"])
    console.result(document, text)
    return 0


def _coalition(text: str) -> list[int]:
    """Returns positions from 0."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 6 for part in parts):
        raise ConfigError(f"--operators {text}: give numbers from 1 with commas between them, for instance 1,3")
    return sorted(int(part) - 1 for part in parts)


def _exported(run_path: Path, folder: Path, console: Console, given: str | None) -> Path:
    """Exports the run as ``ensembler-export`` does and returns its client bundle; gates do not matter here.

    Calibrated on the run's own data, as what ships is; on what was given if that is no longer where it was.
    """
    from ensembler.export.parity import Gates
    from ensembler.export.pipeline import ExportOptions, export
    from ensembler.training import data
    from ensembler.training.runs import RunFolder

    source = RunFolder.open(run_path).config.data
    moved = None
    try:
        data.load(source)
    except DataError:
        if given is None:
            raise
        console.say(f"{source} is not there any more: exporting with --data {given}")
        moved = given
    console.say("exporting the run, since what ships is what is attacked")
    gates = Gates(min_sqnr_db=-1000.0, max_accuracy_drop_points=100.0)
    export(run_path, folder / "bundles", ExportOptions(gates=gates, data=moved))
    return folder / "bundles" / "client"
