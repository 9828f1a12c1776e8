"""One server, many devices: each gets a head, noise, selector and tail of its own on the same frozen nets.

Stages 2 and 3 are repeated; stage 1, the bodies and the wire stay, so the server notices nothing. A device's client is
a run folder of its own, ``RUN/devices/NAME``. Start reading at ``personalize``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ensembler.protocol.errors import ConfigError, DataError
from ensembler.training.fit import Reporter
from ensembler.training.runs import RunFolder
from ensembler.training.stages import resume, train

DEVICES = "devices"
# A name is a folder; those with a dot are of clients that are being renewed.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
NEW, OLD = ".new", ".old"


def personalize(
    path: Path,
    device: str,
    *,
    rotate: bool = False,
    epochs: int | None = None,
    data: str | None = None,
    teacher: Path | None = None,
    reporter: Reporter | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Trains a client for one device; goes on with one that was interrupted.

    Args:
        path: a finished run of ``--defense ensembler``.
        device: whose; letters, digits, ``-`` and ``_``.
        rotate: renew the client that the device has. The old one stays until the new one is finished, and is then
            removed.
        epochs: of stage 3; None takes the run's.
        data: where the run's data is now; None takes the run's.
        teacher: where the run's teacher is now, or another one, also of a run without; None takes the run's.
        reporter: told of the progress.

    Returns:
        The client's run folder, and its summary as ``train`` returns it.

    Raises:
        ConfigError: an impossible name or option, a run without stage 3, a device that has a client already, or one
            without that is to be renewed.
        DataError: the run, its data or its teacher cannot be read.
    """
    if not _NAME.fullmatch(device):
        raise ConfigError(
            f"--device {device!r}: give a name of 1 to 64 letters, digits, - and _, not beginning with - or _"
        )
    source = RunFolder.open(path)
    if not source.config.is_ensemble:
        raise ConfigError(f"{path} is a run with --defense {source.config.defense}: only ensembler's share their nets")
    folder = path / DEVICES / device
    new, old = folder.with_name(device + NEW), folder.with_name(device + OLD)
    _finish_renewal(folder, new, old)
    given = {"epochs_stage3": epochs, "data": data, "teacher": None if teacher is None else str(teacher)}
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if rotate and not folder.exists():
        raise ConfigError(f"--rotate: {folder} has no client to renew; leave --rotate out")
    if folder.exists() and not rotate and not _is_unfinished(folder):
        raise ConfigError(f"{folder} has a client; --rotate renews it")
    target = new if rotate else folder
    if _is_unfinished(target):
        _refuse_others(RunFolder.open_unfinished(target), asked)
        summary = resume(target, reporter=reporter)
    else:
        config = replace(
            source.config,
            **asked,
            client_seed=None,
            # The machine that made the server's nets had a GPU perhaps, and this one need not.
            device="cpu" if source.config.device == "cpu" else "auto",
        )
        if config.teacher is not None and not Path(config.teacher).is_dir():
            if teacher is not None:
                raise DataError(f"--teacher {teacher}: no folder is there; give the run that teaches")
            raise DataError(f"{config.teacher}, the run's teacher, is not there; --teacher says where it is now")
        summary = train(config, target, stage1_from=path, reporter=reporter)
    _finish_renewal(folder, new, old)
    return folder, summary


def _refuse_others(begun: RunFolder, asked: Mapping[str, Any]) -> None:
    """Refuses options with other values than an unfinished client was begun with."""
    for name, value in asked.items():
        was = getattr(begun.config, name)
        if was != value:
            option = f"--{name.removesuffix('_stage3')}"
            how = "without" if was is None else f"with {option} {was}"
            raise ConfigError(f"{option} {value}: {begun.path} was begun {how}; leave it out, or remove that folder")


def _is_unfinished(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "summary.json").is_file()


def _finish_renewal(folder: Path, new: Path, old: Path) -> None:
    """Puts a finished new client in the old one's place, from wherever a kill may have left it."""
    if (new / "summary.json").is_file():
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
