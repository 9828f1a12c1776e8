"""What a server sees of somebody who looks at one scene for a while: the oracle with several frames of it.

Noise that is drawn anew for each frame averages out, and the few codes of a quantiser fall a little differently for
each, so that together they say more than any of them. The bound for one image does not hold for a film of it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ensembler.privacy.attacks.base import Finding, Plan, needed
from ensembler.privacy.attacks.pairs import Oracle, oracle_decoders
from ensembler.privacy.decoder import Reconstruct, as_map, painted, train_decoder
from ensembler.privacy.film import HAND_HELD, Camera, Film, frames_of, sent
from ensembler.privacy.scene import Access, View


class Frames:
    """Decoders of what several frames of a scene have in common, one for each measure of likeness, as ``Oracle``'s.

    Args:
        count: of frames.
        camera: that takes them.
    """

    ACCESS = Access.DEVICE
    SOURCE = "ours"

    def __init__(self, count: int, camera: Camera = HAND_HELD) -> None:
        self.NAME = f"{camera.name}-{count}"
        self.WORDS = (
            f"gets {count} frames of the same scene, as {camera.words} takes them, and trains the oracle's "
            "decoders on the first and on the mean and the spread of what arrives; or takes the first frame alone"
        )
        self._film = Film(count, camera)

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return (1 + 2 * len(Oracle.SIMILARITY_WEIGHTS)) * plan.bound_effort.steps

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        send = needed(view.send, "a device")
        channels, *cells = as_map(torch.empty(1, *view.wire.feature_shape)).shape[1:]
        # Who has a film has its first frame, and the decoders for that have a third of the numbers to make sense of.
        variants: dict[str, Reconstruct] = {
            f"first frame, {name}": partial(_painted_first, decoder)
            for name, decoder in oracle_decoders(view, plan).items()
        }
        for index, (name, weight) in enumerate(Oracle.SIMILARITY_WEIGHTS.items()):
            drawn = plan.generator(1, index)

            def watched(images: Tensor, drawn: torch.Generator = drawn) -> Tensor:
                return summed_up(sent(frames_of(images, self._film, drawn), send))

            decoder = train_decoder(
                watched,
                view.auxiliary,
                (3 * channels, *cells),
                replace(plan.bound_effort, ssim_weight=weight),
                plan.generator(0),
                lambda: plan.tick("decoder"),
            )
            variants[name] = partial(_painted, decoder)
        return Finding(variants=variants, film=self._film)


def summed_up(film: Tensor) -> Tensor:
    """Returns the first frame's numbers, and each one's mean and spread over all frames, ``(B, 3 C, h, w)``.

    Args:
        film: features as they arrive, ``(B, K, *feature_shape)``.
    """
    maps = torch.stack([as_map(frame) for frame in film.unbind(1)], 1)
    return torch.cat([maps[:, 0], maps.mean(1), maps.std(1, correction=0)], 1)


def _painted_first(decoder: torch.nn.Module, film: Tensor) -> Tensor:
    return painted(decoder, film[:, 0])


def _painted(decoder: torch.nn.Module, film: Tensor) -> Tensor:
    return painted(decoder, summed_up(film))
