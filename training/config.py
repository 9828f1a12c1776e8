"""What a training run is told; stored as ``config.json`` in the run folder."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ensembler.protocol.codec import CODEC_BITS, known_bits
from ensembler.protocol.errors import ConfigError
from ensembler.training.models import ArchSpec, Bottleneck
from ensembler.training.operators import Channels, channels_of, party_of, party_sizes
from ensembler.training.perturbation import NoiseKind, Perturbation

Defense = Literal["ensembler", "joint", "single", "none"]
NoiseMode = Literal["fixed", "fresh"]
RegOver = Literal["all", "selected"]
RegKind = Literal["cosine", "linear"]
HeadFor = Literal["all", "selected"]
Computing = Literal["auto", "fast", "float32", "bfloat16"]

# What each of these options may be.
CHOICES: dict[str, tuple[str, ...]] = {
    "defense": get_args(Defense),
    "noise": get_args(NoiseKind),
    "noise_mode": get_args(NoiseMode),
    "reg_kind": get_args(RegKind),
    "reg_over": get_args(RegOver),
    "head_for": get_args(HeadFor),
    "precision": get_args(Computing),
}
MAX_NETS = 1024
TAIL_SHARE = 4  # a tail that learns after its head has one epoch for so many of the head


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The options of ``ensembler train``.

    Attributes:
        data: a data specification, see ``training.data``.
        arch: a name of ``training.architectures.ARCHITECTURES``, or ``package.module:function``.
        stem_pool: max-pool after a ResNet's first convolution.
        head_end: the last part on the device; None takes the architecture's own.
        tail_start: the first part that is on the device again; None takes the architecture's own.
        bottleneck: (channels, stride, bits) of a trained bottleneck at the cut, or None. Its bits are the wire's.
        encoder: channels of the convolutions before the bottleneck's own, see ``models.Bottleneck``.
        defense: ``ensembler``; or a baseline: ``joint`` (N nets behind one head, trained together without stages 1
            and 2, all of which count), ``single`` (one net), ``none`` (one net, no noise).
        num_nets: N.
        num_selected: P.
        parties: operators, each of which is sent its own channels of the bottleneck and holds nets that were trained on
            those; 1: all nets hear everything. See ``operators``.
        noise: what the client adds to its features: ``gaussian``, ``uniform`` or ``learned``, see ``perturbation``.
            Stage 1 of Ensembler is always Gaussian (Eq. 2).
        noise_std: sigma, the standard deviation of the noise added to the features.
        noise_mode: the client's noise: one ``fixed`` tensor as in the paper, or ``fresh`` for every image. Stage 1 of
            Ensembler is fixed (Eq. 2), but with a bottleneck like the client's.
        dropout: the share of its features that the client drops, see ``perturbation``. Stage 1 of Ensembler drops none.
        reg_weight: lambda of Eq. 3.
        reg_kind: what Eq. 3 keeps low: the ``cosine`` of the paper, or what a ``linear`` map of the new head's channels
            gives of a previous head's, see ``losses``.
        reg_over: the maximum of Eq. 3 runs over the heads of ``all`` N nets, or of the P ``selected``.
        head_for: whose answers the head learns from: the P ``selected`` nets' (Eq. 3), or those of ``all`` N alike, one
            for each image, so that it does not depend on the selector; see ``impartial``.
        information_weight: of ``hiding.information_bits`` in the loss of both stages.
        information_noise: the deviation of the noise that it reckons with.
        nopeek_weight: of ``hiding.distance_correlation``.
        decoder_weight: of a decoder in the loop, ``hiding.Adversary``.
        teacher: a run folder with ``defense`` none, whose answers the nets of both stages learn beside the labels.
        teacher_weight: of it in the loss, 0 to 1; the labels have the rest.
        wire_bits: of one code of the features on the wire; ``auto`` takes the fewest that cost the stage-1 nets no
            more than ``max_wire_drop_points``, see ``training.fixing.fewest_bits``.
        answer_bits: of one code of the answers, 8 or 4; ``auto`` takes 4 under the same condition.
        max_wire_drop_points: what ``auto`` may cost.
        epochs_stage1: passes over the data for each stage-1 net.
        epochs_stage3: passes over the data for the client; with ``head_for`` all for its head, and ``epochs_of_tail``
            more for its tail.
        batch_size: images in a step.
        learning_rate: the peak of the one-cycle schedule.
        weight_decay: of SGD.
        seed: of stage 1. The selector comes from the operating system and has no seed.
        client_seed: of stage 3's initialisation, noise and shuffling. None draws one from the operating system; it is
            a secret (who knows it can draw the noise again).
        train_limit: use only the first images of the (shuffled) data; None uses all.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: in which training computes: ``float32``, ``bfloat16``, ``auto``: bfloat16 on CUDA alone, or ``fast``:
            bfloat16 on processors that compute with it, too (AVX512-BF16, AMX, ARM's), which gain by it.
        jobs: stage-1 nets that train at once, each in its own process with its share of the threads. The nets are
            those of any other ``jobs``, up to the rounding of another number of threads.
    """

    data: str
    arch: str = "resnet18"
    stem_pool: bool = True
    head_end: str | None = None
    tail_start: str | None = None
    bottleneck: tuple[int, ...] | None = None
    encoder: tuple[int, ...] = ()
    defense: Defense = "ensembler"
    num_nets: int = 10
    num_selected: int = 4
    parties: int = 1
    noise: NoiseKind = "gaussian"
    noise_std: float = 0.1
    noise_mode: NoiseMode = "fixed"
    dropout: float = 0.0
    reg_weight: float = 0.1
    reg_kind: RegKind = "cosine"
    reg_over: RegOver = "all"
    head_for: HeadFor = "selected"
    information_weight: float = 0.0
    information_noise: float = 0.5
    nopeek_weight: float = 0.0
    decoder_weight: float = 0.0
    teacher: str | None = None
    teacher_weight: float = 0.7
    wire_bits: int | Literal["auto"] = 8
    answer_bits: int | Literal["auto"] = 8
    max_wire_drop_points: float = 0.5
    epochs_stage1: int = 30
    epochs_stage3: int = 30
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    seed: int = 0
    client_seed: int | None = None
    train_limit: int | None = None
    device: str = "auto"
    precision: Computing = "auto"
    jobs: int = 1

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} {value}: choose {', '.join(known[:-1])} or {known[-1]}")
        if self.head_for == "all":
            self._check_impartial()
        if not 0 <= self.teacher_weight <= 1:
            raise ConfigError(f"--teacher-weight {self.teacher_weight}: choose 0 to 1")
        self._check_perturbation()
        self._check_wire()
        if not 1 <= self.num_nets <= MAX_NETS:
            raise ConfigError(f"N = {self.num_nets} nets: choose 1 to {MAX_NETS}")
        if self.is_ensemble and not 1 <= self.num_selected <= self.num_nets:
            raise ConfigError(f"P = {self.num_selected} of N = {self.num_nets}: choose 1 <= P <= N")
        self._check_parties()
        not_negative = {
            "noise_std": self.noise_std,
            "max_wire_drop_points": self.max_wire_drop_points,
            "reg_weight": self.reg_weight,
            "information_weight": self.information_weight,
            "nopeek_weight": self.nopeek_weight,
            "decoder_weight": self.decoder_weight,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
            "client_seed": self.client_seed or 0,
        }
        for name, value in not_negative.items():
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} = {value}: it must be finite and not negative")
        for name in ("learning_rate", "information_noise"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} = {value}: it must be positive and finite")
        for name in ("epochs_stage1", "epochs_stage3", "jobs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: at least one")
        if self.batch_size < 2:
            raise ConfigError(f"batch_size = {self.batch_size}: batch norm needs at least two images")
        if self.train_limit is not None and self.train_limit < self.batch_size:
            raise ConfigError(f"train_limit = {self.train_limit}: at least one batch of {self.batch_size}")

    def _check_parties(self) -> None:
        if self.parties == 1:
            return
        sizes = party_sizes(self.num_nets, self.parties)
        if not self.is_ensemble:
            raise ConfigError(f"--parties has no place in --defense {self.defense}, whose nets have one operator")
        if self.bottleneck is None:
            raise ConfigError("--parties divides the channels of a bottleneck: give --bottleneck too")
        if self.bottleneck[0] % self.parties:
            raise ConfigError(f"--parties {self.parties}: {self.bottleneck[0]} channels cannot be divided evenly")
        if self.num_selected < len(sizes):
            raise ConfigError(
                f"P = {self.num_selected} for {len(sizes)} operators: a client needs a net of each, or it would use "
                "less than it sends"
            )

    def _check_impartial(self) -> None:
        if not self.is_ensemble:
            raise ConfigError(f"--head-for all has no place in --defense {self.defense}, which selects no nets")
        # Either would make what is sent depend on the selector after all.
        if self.reg_over == "selected" and self.reg_weight:
            raise ConfigError("--head-for all and --reg-over selected: the term of Eq. 3 would tell the selected heads")
        if self.noise == "learned":
            raise ConfigError(
                "--head-for all and --noise learned: that noise is learned with the selected nets alone; choose other "
                "--noise, or --head-for selected, which may tell a server the selector (--preset strong and balanced "
                "have all)"
            )

    def _check_perturbation(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--dropout {self.dropout}: choose 0 or more, and less than 1")
        if self.noise == "learned" and not self.noise_std > 0:
            raise ConfigError("--noise learned needs a --noise-std above 0, the deviation that it keeps up")
        if self.defense == "none" and (self.noise, self.noise_mode, self.dropout) != ("gaussian", "fixed", 0):
            raise ConfigError(
                "--noise, --noise-mode and --dropout have no place in --defense none, which sends features as they "
                "are; --defense single --noise-std 0 --dropout P drops features and adds nothing"
            )

    def _check_wire(self) -> None:
        bottleneck = self.squeezed
        if bottleneck is not None and self.wire_bits not in (8, bottleneck.bits):
            raise ConfigError("--wire-bits and --bottleneck: the bottleneck's third number is the wire's bits")
        if self.wire_bits != "auto" and self.wire_bits not in CODEC_BITS.values():
            raise ConfigError(f"--wire-bits {self.wire_bits}: choose {known_bits()} or auto")
        if self.answer_bits not in (8, 4, "auto"):
            raise ConfigError(f"--answer-bits {self.answer_bits}: choose 8, 4 or auto")

    @property
    def is_ensemble(self) -> bool:
        """Whether stages 2 and 3 run; a baseline ends with the net or nets of stage 1."""
        return self.defense == "ensembler"

    @property
    def epochs_of_tail(self) -> int:
        """Passes over the data for a client's tail once its head is there; 0 where both learn together."""
        return -(-self.epochs_stage3 // TAIL_SHARE) if self.head_for == "all" else 0

    @property
    def trained_nets(self) -> int:
        """How many nets stage 1 trains: N, or 1 for a baseline of one net."""
        return self.num_nets if self.defense in ("ensembler", "joint") else 1

    @property
    def stage1_pieces(self) -> int:
        """How many pieces of work stage 1 is: each net, or all that are trained together."""
        return 1 if self.defense == "joint" else self.trained_nets

    @property
    def used_nets(self) -> int:
        """How many answers count: P, or all of a baseline's."""
        return self.num_selected if self.is_ensemble else self.trained_nets

    @property
    def party_sizes(self) -> list[int]:
        """How many nets each operator holds."""
        return party_sizes(self.trained_nets, self.parties)

    def heard_channels(self, index: int) -> Channels | None:
        """Returns the channels that a stage-1 net hears; None: all."""
        if self.parties == 1 or self.bottleneck is None:
            return None
        return channels_of(party_of(index, self.party_sizes), self.parties, self.bottleneck[0])

    @property
    def perturbation(self) -> Perturbation:
        """What the client does to its features."""
        std = 0.0 if self.defense == "none" else self.noise_std
        return Perturbation(noise=self.noise, fresh=self.noise_mode == "fresh", std=std, dropout=self.dropout)

    @property
    def stage1_perturbation(self) -> Perturbation:
        """What a stage-1 net does to its features: fixed Gaussian noise (Eq. 2); a baseline is the client already.

        Before the few codes of a bottleneck it is fresh where the client's is: bodies that have never met it would
        misread them.
        """
        if not self.is_ensemble:
            return self.perturbation
        return Perturbation(std=self.noise_std, fresh=self.noise_mode == "fresh" and self.squeezed is not None)

    @property
    def squeezed(self) -> Bottleneck | None:
        """The bottleneck, if there is one."""
        if self.bottleneck is None:
            if self.encoder:
                raise ConfigError("--encoder goes before a bottleneck: give --bottleneck too")
            return None
        if len(self.bottleneck) != 3:
            raise ConfigError("--bottleneck: give channels,stride,bits, for instance 8,4,2")
        channels, stride, bits = self.bottleneck
        return Bottleneck(channels=channels, stride=stride, bits=bits, encoder=self.encoder)

    def arch_spec(self, image_size: tuple[int, int], num_classes: int) -> ArchSpec:
        """Returns which net this is, for images of (H, W) pixels in K classes."""
        return ArchSpec(
            name=self.arch,
            image_size=image_size,
            num_classes=num_classes,
            stem_pool=self.stem_pool,
            head_end=self.head_end,
            tail_start=self.tail_start,
            bottleneck=self.squeezed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns what ``config.json`` holds."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Builds a config from ``to_dict``'s result.

        Raises:
            ConfigError: unknown or impossible values.
        """
        # JSON has no tuples.
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        try:
            config = cls(**values)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"the run's config.json does not fit this version: {error}") from error
        # A type that no option has would only be noticed deep inside torch.
        texts = {name: values.get(name, "") for name in ("data", "arch", "head_end", "tail_start", "teacher", "device")}
        wrong = [name for name, value in texts.items() if not isinstance(value, str | None)]
        numbers: tuple[Any, ...] = (config.bottleneck or (), config.encoder)
        if wrong or any(not isinstance(each, tuple) or any(type(part) is not int for part in each) for each in numbers):
            named = ", ".join(wrong) or "bottleneck or encoder"
            raise ConfigError(f"the run's config.json does not fit this version: {named}")
        return config
