"""INA, EINA and DINA of C2PI (Zhang et al.) on what an exported device sends; the decoders are those of ``inversion``.

INA and EINA need pairs of image and features, from a device that the attacker owns. DINA also needs the maps between
the sub-blocks of the head, so its attacker has the head's weights, as the server of C2PI or the thief of a device has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ensembler.privacy.attacks.base import Finding, Plan, needed
from ensembler.privacy.attacks.inversion import Front, Maps, Shape, map_shape, sub_blocks, train_inversion
from ensembler.privacy.scene import Access, View
from ensembler.training.architectures import ARCHITECTURES
from ensembler.training.fit import derived_seed
from ensembler.training.models import ArchSpec, normalise, placed, traced_net

BLOCKS = {"ina": "plain convolutions", "eina": "residual blocks"}


class InverseNet:
    """INA or EINA: a decoder that knows nothing of the head but pairs.

    Args:
        kind: a key of ``BLOCKS``.
    """

    ACCESS = Access.DEVICE
    SOURCE = "He et al. 2019; C2PI, Section II"

    def __init__(self, kind: str) -> None:
        self.NAME = kind
        self.WORDS = f"trains a decoder of {BLOCKS[kind]} on images that the attacker sent through the same device"

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return plan.effort.steps

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        send = needed(view.send, "a device")
        return _trained(self.NAME, (), lambda images: [send(images)], view, plan)


class Distillation:
    """DINA: an inverse block for each sub-block of the stolen head, pulled towards the maps between them."""

    NAME = "dina"
    ACCESS = Access.WHITE_BOX
    SOURCE = "C2PI, Section III-B, Eq. 1"
    WORDS = "undoes the stolen head ReLU by ReLU, with a decoder that is trained towards the maps between, too"

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return plan.effort.steps

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        head, send = needed(view.client, "the device's weights").head, needed(view.send, "a device")
        inside = inner_blocks(head, view.arch)
        placed(nn.ModuleList(inside.pieces), view.device)

        def maps_of(images: Tensor) -> list[Tensor]:
            return [*inside.maps(normalise(images).to(memory_format=torch.channels_last)), send(images)]

        return _trained(self.NAME, inside.shapes[1:], maps_of, view, plan)


def inner_blocks(head: nn.Module, arch: ArchSpec) -> Front:
    """Returns the sub-blocks of a head, frozen, without the last, whose output is what the device sends.

    A bottleneck is a piece of its own, so that what goes into it is a distillation point.

    Args:
        head: of a trained client.
        arch: its architecture, with the cut.

    Raises:
        AttackImpossibleError: see ``sub_blocks``.
    """
    net = traced_net(arch)
    whole = head if arch.bottleneck is None else head.get_submodule("0")
    stranger = net.module.load_state_dict(whole.state_dict(), strict=False).unexpected_keys
    assert not stranger  # a head is a part of the net
    front = sub_blocks(net, arch.head_end or ARCHITECTURES[arch.name].head_end)
    return front if arch.bottleneck is not None else Front(front.pieces[:-1], front.shapes[:-1])


def _trained(kind: str, between: Sequence[Shape], maps_of: Maps, view: View, plan: Plan) -> Finding:
    trained = train_inversion(
        kind,
        [(3, *view.arch.image_size), *between, map_shape(view.wire.feature_shape)],
        maps_of,
        view.auxiliary,
        plan.effort,
        seed=derived_seed(plan.seed, 5, 0),
        tick=lambda: plan.tick("decoder"),
    )
    return Finding(variants={"": trained.reconstruct}, seen={"steps": trained.steps})
