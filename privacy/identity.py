"""Who is it? Whether a reconstruction is enough to name the image that it was made from.

SSIM compares pixels. What a person in the picture fears is being recognised, so a net that no attacker controls, the
client's own without its noise, looks at each reconstruction and says to which of the judged images it is nearest, and
which class it shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ensembler.privacy.decoder import CHUNK, pixels
from ensembler.privacy.scene import Scene
from ensembler.training.models import normalise


class Identifier:
    """Compares images by what the selected nets answer to them, as angles around the mean of the judged images.

    Args:
        scene: whose client looks, and whose judged images are the candidates.
    """

    def __init__(self, scene: Scene) -> None:
        self._client = scene.client.eval()
        self._bodies = [body.eval() for body in scene.selected]
        answers, self._classes = self._seen(pixels(scene.evaluated))
        self._centre = answers.mean(0)
        self._candidates = self._directions(answers)

    @torch.no_grad()
    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Judges reconstructions of the first judged images, in their order.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].

        Returns:
            Whether each is nearest to the image that it was made from, of all the judged ones, and whether it shows the
            same class; both ``(B,)`` bool.
        """
        answers, classes = self._seen(images)
        nearest = (self._directions(answers) @ self._candidates.T).argmax(1)
        return nearest == torch.arange(len(images), device=images.device), classes == self._classes[: len(images)]

    @torch.no_grad()
    def _seen(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the answers of the selected nets, flattened, and the classes."""
        answers, classes = [], []
        for part in torch.split(images, CHUNK):
            features = self._client.referred(self._client.head(normalise(255 * part)))
            answers.append(torch.stack([body(features) for body in self._bodies], 1))
            classes.append(self._client.combine(answers[-1]).argmax(1))
        return torch.cat(answers).flatten(1), torch.cat(classes)

    def _directions(self, answers: Tensor) -> Tensor:
        return torch.nn.functional.normalize(answers - self._centre, dim=1)
