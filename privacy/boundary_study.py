"""What Algorithm 1 of C2PI asks of a net: its layers, how well attacks read them, what noise on them costs.

``Study`` measures each once and keeps it in ``NAME.parts/``, so that a run that was killed goes on, and another
threshold costs nothing.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ensembler.privacy.attacks.base import AttackImpossibleError
from ensembler.privacy.attacks.inversion import COEFFICIENTS, KINDS, noised, sub_blocks, train_inversion, whole_front
from ensembler.privacy.attacks.likelihood import IMAGES, search
from ensembler.privacy.decoder import CHUNK, Effort, pixels
from ensembler.privacy.metrics import ssim
from ensembler.privacy.parts import Parts
from ensembler.privacy.scene import FEWEST, load_images, shuffled, too_few
from ensembler.protocol.errors import ConfigError, DataError
from ensembler.training.checkpoint import data_digest
from ensembler.training.fit import Reporter, accuracy, derived_seed
from ensembler.training.models import normalise, placed, traced_net
from ensembler.training.runs import RunFolder
from ensembler.training.splits import Cut, TracedNet
from ensembler.training.stage1 import load_stage1

STRONGEST = "strongest"
ATTACKS = (*KINDS, "mla")  # a layer's seed counts by the place here
NUMBERED = ("alexnet", "vgg16", "vgg19")  # whose parts conv L and relu L are C2PI's layers L and L.5
TIMED, WARM = 30, 5
MANTISSAS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)


@dataclass(frozen=True, kw_only=True)
class BoundaryOptions:
    """What Algorithm 1 asks for, and how hard the attacks try.

    Attributes:
        ssim_threshold: sigma; an attack whose mean SSIM is below it has failed.
        max_accuracy_drop_points: delta, as the drop that is accepted.
        noise_magnitude: lambda; the noise is uniform in [-lambda, lambda].
        idpa: one of ``ATTACKS``, or ``strongest``: the best of them at each layer.
        layers: numbers of the layers to look at; None takes all.
        whole_curve: attack every layer, also those that the algorithm does not ask for.
        images: judge on so many, at most.
        effort: of the attacks; its steps are MLA's too.
        scheme: DINA's coefficients.
        seed: of the division of the images, and of the attacks.
    """

    ssim_threshold: float = 0.3
    max_accuracy_drop_points: float = 2.5
    noise_magnitude: float = 0.1
    idpa: str = "dina"
    layers: tuple[float, ...] | None = None
    whole_curve: bool = True
    images: int = 1000
    effort: Effort = field(default_factory=lambda: Effort(steps=4000, ssim_weight=0.0))
    scheme: str = "c1"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.idpa not in (*ATTACKS, STRONGEST):
            raise ConfigError(f"--idpa {self.idpa}: choose {', '.join((*ATTACKS, STRONGEST))}")
        if not -1 <= self.ssim_threshold <= 1:
            raise ConfigError(f"--ssim {self.ssim_threshold}: an SSIM lies between -1 and 1")
        if not 0 <= self.max_accuracy_drop_points <= 100:
            raise ConfigError(f"--max-drop {self.max_accuracy_drop_points}: points of accuracy, 0 to 100")
        if not 0 <= self.noise_magnitude < float("inf"):
            raise ConfigError(f"--noise {self.noise_magnitude}: it must be finite and not negative")
        if self.images < FEWEST:
            raise ConfigError(f"--images {self.images}: {FEWEST} are the least; below, a mean says nothing")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed}: not negative")
        if self.effort.steps < 1:
            raise ConfigError(f"--steps {self.effort.steps}: at least one")
        if self.scheme not in COEFFICIENTS:
            raise ConfigError(f"coefficients {self.scheme}: choose {' or '.join(COEFFICIENTS)}")

    @property
    def attacks(self) -> tuple[str, ...]:
        """The attacks that run at a layer."""
        return ATTACKS if self.idpa == STRONGEST else (self.idpa,)


@dataclass(frozen=True, kw_only=True)
class Depth:
    """One layer, as somebody needs it who decides how much to compute in private.

    Attributes:
        layer: its number; L.5 is the ReLU of layer L.
        name: of the cut, as ``--head-end`` takes it.
        feature_shape: of one image's output.
        feature_bytes: of one image's output, at 8 bits a value.
        head_flops: operations up to here for one image, two for each multiply-accumulate.
        head_share: of the net's operations, 0 to 1.
        front_ms: the layers up to here, one image, median, measured on this machine's CPU.
        ssim: what each attack reached, the mean over the judged images; empty where none was run.
        steps: of each attack.
        accuracy: in percent with noise on this output; None where it was not asked for.
    """

    layer: float
    name: str
    feature_shape: tuple[int, ...]
    feature_bytes: int
    head_flops: int
    head_share: float
    front_ms: float
    ssim: dict[str, float]
    steps: dict[str, int]
    accuracy: float | None

    @property
    def highest_ssim(self) -> float | None:
        """Of the strongest attack that was run."""
        return max(self.ssim.values(), default=None)


@dataclass(frozen=True)
class Layer:
    """A place where the net can be cut.

    Attributes:
        number: C2PI's where the net has such, else the place among the net's cuts, from 1.
        index: among all layers of the net.
        cut: see there.
    """

    number: float
    index: int
    cut: Cut


def layers_of(net: TracedNet, arch: str) -> list[Layer]:
    """Returns the layers of a net, from the image on.

    In the nets of C2PI batch norm and pooling carry no number. Other nets have their valid cuts counted.

    Args:
        net: whole.
        arch: its name.
    """
    if arch not in NUMBERED:
        return [Layer(float(index + 1), index, cut) for index, cut in enumerate(net.cuts)]
    found = []
    for cut in net.cuts:
        match = re.fullmatch(r"(conv|relu)(\d+)", cut.names[0])
        if match:
            found.append((int(match[2]) + (0.5 if match[1] == "relu" else 0.0), cut))
    return [Layer(number, index, cut) for index, (number, cut) in enumerate(found)]


def chosen_layers(layers: Sequence[Layer], asked: Sequence[float] | None, arch: str) -> list[Layer]:
    """Returns the layers of these numbers, from the image on.

    Raises:
        ConfigError: an unknown number; the message lists the valid ones.
    """
    if asked is None:
        return list(layers)
    known = {layer.number for layer in layers}
    unknown = [number for number in asked if number not in known]
    if unknown or not asked:
        valid = ", ".join(f"{layer.number:g} ({layer.cut.names[0]})" for layer in layers)
        what = f"{unknown[0]:g} is no layer of {arch}" if unknown else "give one at least"
        raise ConfigError(f"--layers: {what}; valid: {valid}")
    return [layer for layer in layers if layer.number in asked]


def plain_net(run: RunFolder) -> TracedNet:
    """Returns the whole net of a run without a defence, with its weights, frozen.

    Raises:
        ConfigError: the run has a defence, or a bottleneck, which is no part of the whole net.
        DataError: the weights are not those of this net.
    """
    config = run.config
    if config.defense != "none":
        raise ConfigError(
            f"{run.path} was trained with --defense {config.defense}; a boundary is looked for in one plain net: give "
            "a run that was trained with --defense none"
        )
    if config.squeezed is not None:
        raise ConfigError(f"{run.path} has a bottleneck at its cut, which the net cut elsewhere has not: train without")
    net = traced_net(run.arch)
    (stored,) = load_stage1(run)
    weights: dict[str, Tensor] = {}
    for part in (stored.net.head, stored.net.body, stored.net.tail):
        weights |= part.state_dict()
    if net.module.load_state_dict(weights, strict=False).missing_keys:
        raise DataError(f"{run.path} holds no net of this version; train again")
    net.module.eval().requires_grad_(False)
    return net


class Study:
    """One net with its images: measures what is asked for, once, and keeps it."""

    def __init__(
        self,
        run: RunFolder,
        out: Path,
        options: BoundaryOptions,
        data: str | None,
        device: torch.device,
        reporter: Reporter,
    ) -> None:
        self.options, self._reporter, self._device = options, reporter, device
        self._net = plain_net(run)
        placed(self._net.module, device)
        self.layers = chosen_layers(layers_of(self._net, run.config.arch), options.layers, run.config.arch)
        images = load_images(run, data)
        held_out = len(images.test_x)
        judged = min(options.images, held_out // 3)
        if judged < FEWEST:
            raise too_few(data or run.config.data, held_out, 3 * FEWEST)
        order = shuffled(held_out, options.seed)
        self._tested = torch.from_numpy(np.ascontiguousarray(images.test_x)).to(device)
        self._labels = torch.from_numpy(np.ascontiguousarray(images.test_y)).to(device)
        places = torch.from_numpy(order).to(device)
        self._judged, self._owned = self._tested[places[:judged]], self._tested[places[judged:]]
        weights = hashlib.sha256((run.path / run.stage1_file(0)).read_bytes()).hexdigest()
        self.subject: dict[str, Any] = {
            "run": str(run.path),
            "weights": weights,
            "arch": run.config.arch,
            "image_size": list(run.arch.image_size),
            "data": data or run.config.data,
            "data_digest": data_digest(images),
            "judged": judged,
            "auxiliary": len(self._owned),
            "tested": held_out,
        }
        identity = {name: self.subject[name] for name in ("weights", "data_digest", "judged")} | {
            "noise": options.noise_magnitude,
            "effort": asdict(options.effort),
            "scheme": options.scheme,
            "seed": options.seed,
        }
        self._parts = Parts(out.with_suffix(".parts"), identity)
        self.not_run: dict[str, str] = {}
        self._attacked: dict[int, dict[str, tuple[float, int]]] = {}
        self._accuracies: dict[int, float] = {}
        self.plain_accuracy = self._accuracy("accuracy", self._net.module)
        mean = pixels(self._owned).mean(0, keepdim=True)
        self.floor = float(ssim(mean.expand(judged, -1, -1, -1), pixels(self._judged)).mean())

    # --- what Algorithm 1 asks for ---

    def highest_ssim(self, place: int) -> float:
        """Returns the mean SSIM of the strongest attack at a layer."""
        if place not in self._attacked:
            self._attacked[place] = self._attack(self.layers[place])
        return max(value for value, _ in self._attacked[place].values())

    def accuracy(self, place: int) -> float:
        """Returns the accuracy in percent over all held-out images, with noise on a layer's output."""
        if place not in self._accuracies:
            layer = self.layers[place]
            front, rest = self._net.chain([layer.cut.names[0]])
            generator = torch.Generator(self._device).manual_seed(self._seed(layer, len(ATTACKS)))
            self._accuracies[place] = self._accuracy(
                f"{layer.cut.names[0]}-accuracy",
                lambda x: rest(noised(front(x), self.options.noise_magnitude, generator)),
            )
        return self._accuracies[place]

    @torch.inference_mode()
    def noise_curve(self, place: int) -> list[tuple[float, float]]:
        """Returns magnitudes of noise on a layer's output, and the accuracy in percent over all held-out images.

        The magnitudes are of ``MANTISSAS``, from a tenth to ten times the standard deviation of the layer's output. All
        are tried on the same features and the same draw of the generator, so that they differ in magnitude alone.
        """
        layer = self.layers[place]
        name = f"{layer.cut.names[0]}-noises"
        stored = self._parts.read(name)
        if stored is None:
            front, rest = self._net.chain([layer.cut.names[0]])
            generator = torch.Generator(self._device).manual_seed(self._seed(layer, len(ATTACKS)))
            hits: dict[float, int] = {}
            for images, labels in zip(torch.split(self._tested, CHUNK), torch.split(self._labels, CHUNK), strict=True):
                features = front(normalise(images).to(memory_format=torch.channels_last))
                if not hits:
                    hits = dict.fromkeys(_magnitudes(max(float(features.std()), 1e-6)), 0)
                unit = noised(torch.zeros_like(features), 1.0, generator)
                for magnitude in hits:
                    hits[magnitude] += int((rest(features + magnitude * unit).argmax(1) == labels).sum())
            curve = [[magnitude, round(100 * right / len(self._tested), 4)] for magnitude, right in hits.items()]
            stored = {"curve": curve}, {}
            self._parts.write(name, *stored)
        return [(float(magnitude), float(right)) for magnitude, right in stored[0]["curve"]]

    def largest_noise(self, place: int) -> float | None:
        """Returns the largest magnitude of the curve up to which all keep the accuracy (C2PI, III-A), if one does."""
        accepted = None
        for magnitude, right in self.noise_curve(place):
            if self.plain_accuracy - right > self.options.max_accuracy_drop_points:
                break
            accepted = magnitude
        return accepted

    def _accuracy(self, name: str, predict: Callable[[Tensor], Tensor]) -> float:
        """Returns a stored accuracy, or measures and stores it."""
        stored = self._parts.read(name)
        if stored is None:
            stored = {"accuracy": accuracy(predict, self._tested, self._labels)}, {}
            self._parts.write(name, *stored)
        return float(stored[0]["accuracy"])

    def accuracy_drop(self, place: int) -> float:
        """Returns the points of accuracy that the noise costs at a layer."""
        return self.plain_accuracy - self.accuracy(place)

    # --- attacks ---

    def _attack(self, layer: Layer) -> dict[str, tuple[float, int]]:
        """Returns {attack: (mean SSIM, steps)}."""
        found = {}
        for kind in self.options.attacks:
            if kind in self.not_run:
                continue
            name = f"{layer.cut.names[0]}-{kind}"
            stored = self._parts.read(name)
            if stored is None:
                self._reporter.begin(f"{kind} at layer {layer.number:g} ({layer.cut.names[0]})", self._steps)
                try:
                    scores, steps = self._run(kind, layer)
                except AttackImpossibleError as error:
                    if self.options.idpa != STRONGEST:
                        raise
                    self.not_run[kind] = str(error)
                    self._reporter.end("not possible")
                    continue
                self._reporter.end(f"SSIM {float(scores.mean()):.3f}, {steps} steps")
                if not bool(torch.isfinite(scores).all()):  # a comparison with it would pass for a failed attack
                    raise DataError(
                        f"layer {layer.number:g} ({layer.cut.names[0]}): what {kind} makes of its features is not "
                        "finite; the net did not train, so train again with a lower --learning-rate"
                    )
                stored = {"steps": steps}, {"ssim": scores.cpu().numpy()}
                self._parts.write(name, *stored)
            found[kind] = float(stored[1]["ssim"].mean()), int(stored[0]["steps"])
        return found

    @property
    def _steps(self) -> int:
        return self.options.effort.steps

    def _seed(self, layer: Layer, purpose: int) -> int:
        return derived_seed(self.options.seed, 6, layer.index, purpose)

    def _run(self, kind: str, layer: Layer) -> tuple[Tensor, int]:
        """Returns the SSIM of each judged image, and the attack's steps."""
        seed, magnitude = self._seed(layer, ATTACKS.index(kind)), self.options.noise_magnitude
        cut = layer.cut.names[0]
        front = sub_blocks(self._net, cut) if kind == "dina" else whole_front(self._net, cut)
        maps_of = front.noisy(magnitude, torch.Generator(self._device).manual_seed(derived_seed(seed, 1)))

        def features(images: Tensor) -> Tensor:
            """Of images in [0, 1]; without noise."""
            return front.maps(normalise(255 * images).to(memory_format=torch.channels_last))[-1]

        def tick() -> None:
            self._reporter.step("")

        if kind == "mla":
            with torch.no_grad():
                arrived = maps_of(self._judged[:IMAGES])[-1]
            generator = torch.Generator().manual_seed(seed)
            images = search(features, arrived, self._net.image_size, steps=self._steps, generator=generator, tick=tick)
            return ssim(images, pixels(self._judged[:IMAGES])), self._steps
        trained = train_inversion(
            kind,
            front.shapes,
            maps_of,
            self._owned,
            self.options.effort,
            seed=seed,
            scheme=self.options.scheme,
            tick=tick,
        )
        with torch.no_grad():
            scores = [
                ssim(trained.reconstruct(maps_of(part)[-1]), pixels(part)) for part in torch.split(self._judged, CHUNK)
            ]
        return torch.cat(scores), trained.steps

    # --- what is told ---

    def depth(self, place: int) -> Depth:
        """Returns what is known of a layer, and measures its time."""
        cut = self.layers[place].cut
        attacked = self._attacked.get(place, {})
        return Depth(
            layer=self.layers[place].number,
            name=cut.names[0],
            feature_shape=cut.shape,
            feature_bytes=cut.values,
            head_flops=2 * cut.macs,
            head_share=round(cut.share, 6),
            front_ms=round(_median_ms(self._net.chain([cut.names[0]])[0], self._net.image_size), 4),
            ssim={kind: round(value, 4) for kind, (value, _) in attacked.items()},
            steps={kind: steps for kind, (_, steps) in attacked.items()},
            accuracy=self._accuracies.get(place),
        )


def _magnitudes(spread: float) -> list[float]:
    """Returns round numbers from a tenth of ``spread`` to ten times it, the smallest first."""
    decades = range(math.floor(math.log10(spread)) - 2, math.ceil(math.log10(spread)) + 2)
    found = [float(f"{mantissa:g}e{decade}") for decade in decades for mantissa in MANTISSAS]
    return [magnitude for magnitude in found if spread / 10 <= magnitude <= 10 * spread]


@torch.inference_mode()
def _median_ms(front: nn.Module, image_size: tuple[int, int]) -> float:
    """Returns how long one image takes on the CPU; of a copy, since the net may be elsewhere."""
    front = copy.deepcopy(front).cpu().eval()
    image = torch.zeros(1, 3, *image_size).to(memory_format=torch.channels_last)
    times = []
    for _ in range(WARM + TIMED):
        begun = time.perf_counter()
        front(image)
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times[WARM:])
