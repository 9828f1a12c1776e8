"""Links the folders of the repository as ``build/view/ensembler``, for tools that cannot read package_dir.

mypy and pyright look for ``ensembler/protocol``, while the folder is ``protocol``. Run without arguments from anywhere.
"""

from __future__ import annotations

import configparser
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def package_folders() -> dict[str, str]:
    """Returns ``{import name: folder}`` as ``setup.cfg`` states it."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = config["options"]["package_dir"].strip().splitlines()
    pairs = (line.split("=", 1) for line in lines)
    return {name.strip(): folder.strip() for name, folder in pairs}


def main() -> None:
    """Makes the view afresh."""
    view = ROOT / "build" / "view"
    shutil.rmtree(view, ignore_errors=True)
    package = view / "ensembler"
    package.mkdir(parents=True)
    folders = package_folders()
    for entry in (ROOT / folders.pop("ensembler")).iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for name, folder in folders.items():
        relative = name.removeprefix("ensembler.")
        if "." not in relative and not (package / relative).exists():
            (package / relative).symlink_to(ROOT / folder)


if __name__ == "__main__":
    main()
