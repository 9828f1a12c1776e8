"""Attacks with pairs of image and features: from a device that the attacker owns, a few or as many as it has images.

Another client's device has another head and other noise, and its pairs tell what one client's leak says of the next.

With all of its images and a decoder trained until it is flat, this is the oracle: what a server could see at best.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from ensembler.privacy.attacks.base import OWN_SSIM, AttackImpossibleError, Finding, Plan, decoder_of, needed
from ensembler.privacy.decoder import Decoder, is_small, painted, pixels, train_on_pairs
from ensembler.privacy.metrics import mse
from ensembler.privacy.scene import Access, View
from ensembler.training.models import placed

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)


class KnownPairs:
    """A decoder of a few pairs: ridge regression, and a network that goes on from there.

    Where much is sent, or the device says it in a way of its own, the network sees more; of few pairs, or of a device
    that says little, ridge regression does.

    Args:
        count: pairs.
    """

    ACCESS = Access.DEVICE
    SOURCE = "ours"

    def __init__(self, count: int) -> None:
        self.NAME = f"known-pairs-{count}"
        self.WORDS = (
            f"trains a decoder on {count} images that the attacker sent through the same device: ridge regression, or "
            "a network that begins with it; the better counts"
        )
        self._count = count

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return plan.effort.steps

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        send = needed(view.send, "a device")
        if len(view.auxiliary) < self._count:
            raise AttackImpossibleError(f"{self._count} pairs: the attacker has {len(view.auxiliary)} images")
        images = view.auxiliary[: self._count]
        features = send(images)
        ridge = best_ridge(features, images)
        network = train_on_pairs(features, images, ridge, plan.effort, plan.generator(0), lambda: plan.tick("decoder"))
        decoders = {"ridge regression": _linear(features, images, ridge, every=True), "network": network}
        return Finding(variants={name: partial(painted, decoder) for name, decoder in decoders.items()})


class Oracle:
    """Decoders trained on pairs of all the images, until they are flat: one for each measure of likeness.

    Where little is to be seen they differ: what is closest in squares is blurred, and SSIM wants edges. Of a small map
    another one for squares paints in steps (``decoder``).
    """

    NAME = "oracle-decoder"
    ACCESS = Access.DEVICE
    SOURCE = "bound; He et al. 2019"
    WORDS = (
        "trains decoders on all the attacker's images, sent through the same device, for least squared error and for "
        "most similarity, of a small map also one that paints in steps: the bound"
    )
    SIMILARITY_WEIGHTS: ClassVar = {"squared error": 0.0, "similarity": 1.0}

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return (1 + len(self.SIMILARITY_WEIGHTS)) * plan.bound_effort.steps

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        decoders = oracle_decoders(view, plan)
        return Finding(
            variants={name: partial(painted, decoder) for name, decoder in decoders.items()},
            seen={"steps": [decoder.steps for decoder in decoders.values()], "steps_at_most": plan.bound_effort.steps},
        )


def oracle_decoders(view: View, plan: Plan) -> dict[str, Decoder]:
    """Returns the oracle's decoders by what they are best at; noted, for the attacks that begin with them."""
    send = needed(view.send, "a device")

    def trained(weight: float, *, patience: int = 1, stepwise: bool = False) -> Decoder:
        effort = replace(plan.bound_effort, ssim_weight=weight, patience=patience * plan.effort.patience)
        return decoder_of(send, view, replace(plan, effort=effort), 0, stepwise=stepwise)

    def all_trained() -> dict[str, Decoder]:
        decoders = {name: trained(weight) for name, weight in Oracle.SIMILARITY_WEIGHTS.items()}
        if is_small(view.wire.feature_shape, view.arch.image_size):  # it learns slowly at first
            decoders["squared error, in steps"] = trained(0.0, patience=2, stepwise=True)
        return decoders

    return view.noted(("oracle", send, plan.identity), all_trained)


class OtherDevice:
    """A decoder trained on pairs from another client's device, for what arrives from this one."""

    NAME = "other-device"
    ACCESS = Access.OTHER_DEVICE
    SOURCE = "ours"
    WORDS = (
        "trains a decoder on all the attacker's images, sent through another client's device, and feeds it with what "
        "arrives from this one: as it is, or scaled like the other's features; the better counts"
    )

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return plan.effort.steps

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        send = needed(view.send_other, "a device of another client of the same server (--other-device)")
        observed = needed(view.observed, "observed features")
        decoder = decoder_of(send, view, plan, 0)
        return Finding(
            variants={"": partial(painted, decoder), "scaled": partial(painted, decoder.fed_with(observed))},
            seen={OWN_SSIM: [round(decoder.own_ssim, 4)]},
        )


def best_ridge(features: Tensor, images: Tensor) -> float:
    """Returns the ridge of the linear map that does best on a fifth of the pairs, made from the others."""
    kept = max(1, len(images) // 5)

    def error(ridge: float) -> float:
        decoder = _linear(features[kept:], images[kept:], ridge)
        return float(mse(painted(decoder, features[:kept]), pixels(images[:kept])).mean())

    return min(RIDGES, key=error)


def _linear(features: Tensor, images: Tensor, ridge: float, *, every: bool = False) -> Decoder:
    """Returns a decoder that is nothing but the linear map of these pairs; ``every``: see ``fit_linear``."""
    decoder = placed(Decoder(tuple(features.shape[1:]), (images.shape[-2], images.shape[-1]), 4), images.device)
    decoder.fit_linear(features, images, ridge, every=every)
    return decoder.eval()
