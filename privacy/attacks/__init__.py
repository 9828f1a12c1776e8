"""The attacks, one file each. ``ATTACKS`` holds them by name, from the weakest access to the strongest."""

from __future__ import annotations

from ensembler.privacy.attacks.base import Attack
from ensembler.privacy.attacks.controls import MeanImage, Misaligned
from ensembler.privacy.attacks.critic import MatchingCritic
from ensembler.privacy.attacks.frames import Frames
from ensembler.privacy.attacks.informed import Informed
from ensembler.privacy.attacks.inverse import Distillation, InverseNet
from ensembler.privacy.attacks.likelihood import Likelihood
from ensembler.privacy.attacks.matching import Matching
from ensembler.privacy.attacks.pairs import KnownPairs, Oracle, OtherDevice
from ensembler.privacy.attacks.prior import GenerativePrior
from ensembler.privacy.attacks.shadow import Adaptive, Colluding, SingleShadow, Subsets
from ensembler.privacy.film import MOUNTED

_ALL: tuple[Attack, ...] = (
    MeanImage(),
    Misaligned(),
    SingleShadow(),
    SingleShadow(calibrated=True),
    Adaptive(),
    Subsets(),
    Colluding(),
    Informed(),
    Matching(),
    Matching(observed=64),
    Matching(blind=True),
    MatchingCritic(),
    GenerativePrior(),
    OtherDevice(),
    KnownPairs(10),
    KnownPairs(100),
    KnownPairs(1000),
    InverseNet("ina"),
    InverseNet("eina"),
    Oracle(),
    Frames(8),
    Frames(8, MOUNTED),
    Likelihood(prior=False),
    Likelihood(prior=True),
    Distillation(),
)
ATTACKS: dict[str, Attack] = {attack.NAME: attack for attack in _ALL}
