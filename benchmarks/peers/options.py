"""The options that every peer's server takes."""

from __future__ import annotations

import argparse
from pathlib import Path


def parse() -> argparse.Namespace:
    """Reads them from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path, help="a server bundle")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True, help="of the engine")
    parser.add_argument("--batch", type=int, required=True, help="images computed together, at most")
    parser.add_argument("--wait-ms", type=int, default=0, help="how long a batch waits for company")
    parser.add_argument("--certificate", type=Path, help="TLS; its key is beside it, as .key")
    parser.add_argument("--plain-queue", action="store_true", help="LitServe without fast_queue")
    return parser.parse_args()
