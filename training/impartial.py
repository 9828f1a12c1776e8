"""A head that does not depend on the selector: stage 3 with all N nets, each of which has a tail that is thrown away.

Eq. 3 trains the head on the P selected nets and on no other, so that what it sends fits those better, and a server that
looks at its own nets' batch norms finds them. Here the images of a batch are dealt out among all N nets, whose answers
tails of their own finish, so that the head learns from all alike; the client's tail learns from the P selected ones
once the head is there. Whatever P of the N are selected, the head is the same: what is sent says nothing of the
selector, whoever looks and however. An image asks one net, not N or P: it is the cheapest way to train a head, too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ensembler.training.models import ArchSpec, build_net


class Impartial(nn.Module):
    """The N tails of stage 1's kind that stand in for the client's while the head is trained.

    Args:
        arch: of the net.
        num_nets: N.
    """

    def __init__(self, arch: ArchSpec, num_nets: int) -> None:
        super().__init__()
        self.tails = nn.ModuleList(build_net(arch).tail for _ in range(num_nets))

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep."""
        return {f"impartial.{name}": tensor for name, tensor in self.state_dict().items()}

    def logits(self, features: Tensor, ask: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Returns what one net, drawn for each image, makes of it: ``(B, K)``, in the batch's order.

        Args:
            features: of a shuffled batch, ``(B, C, h, w)``.
            ask: from the features of some images and a net's position to its answers ``(b, F)``.
        """
        # Batch norm in a tail cannot train on one image.
        shares = max(1, min(len(self.tails), len(features) // 2))
        turns = torch.randperm(len(self.tails))[:shares].tolist()
        parts = features.tensor_split(shares)
        return torch.cat([self.tails[net](ask(part, net)) for net, part in zip(turns, parts, strict=True)])
