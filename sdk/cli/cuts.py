"""``ensembler cuts``: where a net can be cut into head, body and tail, and what each cut costs."""

from __future__ import annotations

import argparse

from ensembler.cli.console import Console, need_torch, positive
from ensembler.protocol.errors import ConfigError
from ensembler.protocol.text import aligned

NAME = "cuts"
HELP = "list where a net can be cut: feature shape, bytes on the wire, work on the device"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("arch", nargs="?", help="a name, or package.module:function; without it the names are listed")
    parser.add_argument("--image-size", default="32x32", help="height x width in pixels (default: 32x32)")
    parser.add_argument("--num-classes", type=positive(int), default=10, help="(default: 10)")
    parser.add_argument("--no-stem-pool", action="store_true", help="no max-pool in a ResNet's stem")


def run(options: argparse.Namespace, console: Console) -> int:
    """Lists."""
    need_torch()
    from ensembler.training.architectures import ARCHITECTURES
    from ensembler.training.models import ArchSpec, traced_net

    if options.arch is None:
        names = sorted(ARCHITECTURES)
        console.result({"architectures": names}, "\n".join([*names, "", "or your own: package.module:function"]))
        return 0
    spec = ArchSpec(
        name=options.arch,
        image_size=_size(options.image_size),
        num_classes=options.num_classes,
        stem_pool=not options.no_stem_pool,
    )
    net = traced_net(spec)
    known = ARCHITECTURES.get(options.arch)
    rows = [("head end", "also called", "features", "bytes", "head MMACs", "share", "head weights")]
    for cut in net.cuts:
        mark = " *" if known is not None and known.head_end in cut.names else ""
        rows.append(
            (
                cut.names[0] + mark,
                ", ".join(cut.names[1:]),
                "x".join(map(str, cut.shape)),
                str(cut.values),
                f"{cut.macs / 1e6:.2f}",
                f"{100 * cut.share:.1f}%",
                str(cut.parameters),
            )
        )
    text = [
        *aligned(rows, left=3),
        "",
        f"tail start: {', '.join(net.tail_starts) or 'none: the net must end in nn.Linear on one vector an image'}",
        "bytes: one image's features in 8 bits, before any bottleneck. share: of the net's multiply-accumulates.",
    ]
    if known is not None:
        text.append("* where it is cut unless --head-end says otherwise")
    document = {
        "arch": options.arch,
        "image_size": list(spec.image_size),
        "cuts": [
            {
                "names": list(cut.names),
                "feature_shape": list(cut.shape),
                "bytes": cut.values,
                "head_macs": cut.macs,
                "head_share": cut.share,
                "head_parameters": cut.parameters,
            }
            for cut in net.cuts
        ],
        "tail_starts": net.tail_starts,
    }
    console.result(document, "\n".join(text))
    return 0


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--image-size {text}: give height x width, for instance 32x32")
    return int(parts[0]), int(parts[1])
