"""A head that does not depend on the selector: stage 3 with all N nets, each of which has a tail that is thrown away.

Eq. 3 trains the head on the P selected nets and on no other, so that what it sends fits those better, and a server that
looks at its own nets' batch norms finds them. Here every net's answers are finished by a tail of its own and count
alike, and the client's tail learns beside them from answers that hand no gradient on. Whatever P of the N are selected,
the head is the same: what is sent says nothing of the selector, whoever looks and however.
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

    def loss(self, answers: Tensor, classification: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the mean over the nets of what each would lose if it were the only one.

        Args:
            answers: of all N nets, ``(B, N, F)``.
            classification: from logits ``(B, K)`` to a loss.
        """
        pairs = zip(self.tails, answers.unbind(1), strict=True)
        return torch.stack([classification(tail(answer)) for tail, answer in pairs]).mean()
