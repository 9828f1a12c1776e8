"""The three stages of Ensembler (Section III-C) and the fixing of the wire between the first and the second.

``train()`` runs them into a run folder, ``resume()`` goes on with one that was interrupted; ``load_client()`` and
``load_bodies()`` read the result back for export, tests and attacks. The algorithm is the three functions ``stage1``,
``stage2``, ``stage3``, in this order.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from math import comb
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.errors import ConfigError, DataError
from ensembler.protocol.manifest import WireSpec
from ensembler.training import data as data_sets
from ensembler.training.checkpoint import Checkpoint, data_digest, training_lock
from ensembler.training.config import TrainConfig
from ensembler.training.fit import (
    EVALUATION_BATCH,
    Reporter,
    Silent,
    StepResult,
    Tensors,
    accuracy,
    derived_seed,
    fit,
    pick_device,
)
from ensembler.training.fixing import (
    BITS_IMAGES,
    CALIBRATION_IMAGES,
    fewest_answer_bits,
    fewest_bits,
    fix_wire,
)
from ensembler.training.hiding import Hiding
from ensembler.training.impartial import Impartial
from ensembler.training.losses import OVERLAPS, classification_loss, stage3_loss
from ensembler.training.models import ArchSpec, Net, build_net, feature_shape, normalise, placed
from ensembler.training.perturbation import Draw, Perturbation
from ensembler.training.ray_pool import RayPool
from ensembler.training.runs import (
    CONFUSION_FILE,
    TAIL_STAGE,
    ClientSecret,
    RunFolder,
    WireState,
    module_tensors,
    restore,
)
from ensembler.training.shredder import learn
from ensembler.training.splits import joined, only_linear
from ensembler.training.stage1 import (
    Stage1Net,
    freeze,
    load_stage1,
    stage1,
    teacher_of,
)
from ensembler.training.wire import (
    fake_quantise,
    fake_quantise_answers,
)


class Client(nn.Module):
    """The client's whole pipeline in float: head, noise, dropout, wire, the P selected bodies, wire, selector, tail.

    Attributes:
        head: trained in stage 3.
        noise: ``(C, h, w)``, or as ``Perturbation.start`` shapes it; zeros where there is none or it is drawn anew.
        tail: trained in stage 3.
        selector: P positions in the server's order.
        perturbation: what is done to the features.
    """

    def __init__(
        self, net: Net, noise: Tensor, wire: WireSpec, selector: Sequence[int], perturbation: Perturbation
    ) -> None:
        super().__init__()
        self.head = net.head
        self.tail = net.tail
        self.noise: Tensor
        self.register_buffer("noise", noise)
        self.wire = wire
        self._quantises = net.codec is not None
        self.selector = tuple(selector)
        self.perturbation = perturbation

    def draw(self, count: int, generator: torch.Generator | None = None) -> Draw:
        """Draws what ``count`` images get; ``generator`` as for ``Perturbation.draw``."""
        return self.perturbation.draw(self.noise, count, generator)

    def perturbed(self, features: Tensor) -> Tensor:
        """Returns what is sent, in float, for the head's output ``(B, C, h, w)``."""
        return self.draw(len(features)).applied(features)

    def referred(self, sent: Tensor) -> Tensor:
        """Returns what bodies get in the float reference for ``perturbed`` features: these, or a bottleneck's codes."""
        return fake_quantise(sent, self.wire.feature_codec) if self._quantises else sent

    def combine(self, answers: Tensor) -> Tensor:
        """Returns logits ``(B, K)`` from the selected answers ``(B, P, F)``: S_i = 1/P, concatenation (Eq. 1), tail."""
        logits: Tensor = self.tail((answers / len(self.selector)).flatten(1))
        return logits

    def finish(self, features: Tensor, selected: Sequence[nn.Module], *, through_wire: bool = True) -> Tensor:
        """Returns logits from the head's own ``features``, through the P selected bodies.

        Args:
            features: ``(B, C, h, w)``, the head's output.
            selected: the P bodies, in the selector's order.
            through_wire: quantise what travels, as the product does; off gives the float reference, in which only a
                bottleneck quantises: it is a part of the net.
        """
        if through_wire:
            return self.combine(self.answers(features, selected))
        sent = self.referred(self.perturbed(features))
        return self.combine(torch.stack([body(sent) for body in selected], dim=1))

    def answers(self, features: Tensor, selected: Sequence[nn.Module]) -> Tensor:
        """Returns what the P selected bodies answer to the head's own ``features``: ``asked`` with their codecs."""
        return self.asked(features, selected, [self.wire.answer_codecs[i] for i in self.selector])

    def asked(self, features: Tensor, bodies: Sequence[nn.Module], codecs: Sequence[AffineCodec]) -> Tensor:
        """Returns what bodies answer to the head's own ``features``, through the wire: ``(B, number of bodies, F)``."""
        sent = fake_quantise(self.perturbed(features), self.wire.feature_codec)
        return fake_quantise_answers(torch.stack([body(sent) for body in bodies], dim=1), tuple(codecs))


# --- stage 2 ---


def stage2(config: TrainConfig) -> ClientSecret:
    """Draws the secret selector, P of N positions, from the operating system's generator."""
    selector = drawn_selector(config.party_sizes, config.used_nets)
    seed = config.client_seed if config.client_seed is not None else secrets.randbits(62)
    return ClientSecret(selector=selector, seed=seed)


def drawn_selector(sizes: Sequence[int], num_selected: int) -> tuple[int, ...]:
    """Draws P positions from the operating system's generator: any set in which each operator has one, as likely.

    Args:
        sizes: how many nets each operator holds.
        num_selected: P, at least as many as there are operators.
    """
    # ways[m][p]: in how many sets the operators from m on have p nets.
    ways = [[0] * (num_selected + 1) for _ in sizes] + [[1] + [0] * num_selected]
    for m in reversed(range(len(sizes))):
        for p in range(num_selected + 1):
            ways[m][p] = sum(comb(sizes[m], k) * ways[m + 1][p - k] for k in range(1, p + 1))
    system, left, start = secrets.SystemRandom(), num_selected, 0
    selector: list[int] = []
    for m, size in enumerate(sizes):
        drawn = system.randrange(ways[m][left])
        for k in range(1, left + 1):
            drawn -= comb(size, k) * ways[m + 1][left - k]
            if drawn < 0:
                break
        selector += system.sample(range(start, start + size), k)
        start, left = start + size, left - k
    return tuple(sorted(selector))


# --- stage 3 ---


def stage3(
    run: RunFolder,
    config: TrainConfig,
    arch: ArchSpec,
    data: Tensors,
    nets: Sequence[Stage1Net],
    wire: WireState,
    secret: ClientSecret,
    reporter: Reporter,
) -> Client:
    """Trains a new head and tail from scratch on the frozen bodies, through the fake-quantised wire (Eq. 3).

    The head learns from the P selected ones, or from all N, see ``impartial``, and then the tail, which always learns
    from the P, comes after it.
    """
    device = data.train_x.device
    torch.manual_seed(derived_seed(secret.seed, 3, 0))
    net = build_net(arch, config.num_selected)
    perturbation, shape = config.perturbation, wire.spec.feature_shape
    is_learned = perturbation.noise == "learned"
    # Noise that is learned comes when head and tail are there.
    trained_with = Perturbation(dropout=perturbation.dropout) if is_learned else perturbation
    noise = trained_with.start(shape, derived_seed(secret.seed, 3, 1))
    client = placed(Client(net, noise, wire.spec, secret.selector, trained_with), device)
    bodies = [nets[i].net.body for i in wire.order]
    selected = [bodies[k] for k in secret.selector]
    previous = [nets[i].net.head for i in wire.order]
    if config.reg_over == "selected":
        previous = [previous[k] for k in secret.selector]
    teacher = teacher_of(config, arch, run.labels, device)
    hiding = Hiding(config, arch, device)
    impartial = placed(Impartial(arch, len(bodies)), device) if config.head_for == "all" else None

    def ask(features: Tensor, net: int) -> Tensor:
        return client.asked(features, [bodies[net]], [wire.spec.answer_codecs[net]])[:, 0]

    def step(x: Tensor, targets: Tensor) -> StepResult:
        features = client.head(x)
        logits = client.finish(features, selected) if impartial is None else impartial.logits(features, ask)
        loss = classification(x, logits, targets) + hiding.loss(x, features, targets)
        if not config.reg_weight:  # N heads cost as much as all the rest
            return StepResult(loss, logits)
        with torch.no_grad():
            others = [head(x) for head in previous]
        overlap = OVERLAPS[config.reg_kind](features, others)
        return StepResult(stage3_loss(loss, overlap, config.reg_weight), logits, overlap)

    def classification(x: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        return classification_loss(logits, targets=targets, taught=teacher(x), weight=config.teacher_weight)

    client.train()
    trained = list(client.parameters() if impartial is None else [*client.head.parameters(), *impartial.parameters()])
    beside = {**hiding.state(), **(impartial.train().state() if impartial is not None else {})}
    for metrics in fit(
        [*trained, *hiding.parameters()],
        step,
        data,
        config,
        epochs=config.epochs_stage3,
        seed=derived_seed(secret.seed, 3, 2),
        reporter=reporter,
        label="stage 3, the client" if impartial is None else "stage 3, the client's head",
        checkpoint=Checkpoint(run, run.CLIENT_CHECKPOINT, {**module_tensors("client", client), **beside}, {"stage": 3}),
    ):
        run.append_metrics({"stage": 3, **asdict(metrics)})
    if impartial is not None:
        _learn_tail(run, config, client, selected, classification, data, secret.seed, reporter)
    client.eval()
    if is_learned:
        client.requires_grad_(False)

        def with_noise(x: Tensor, noise: Tensor) -> Tensor:
            sending = Client(net, noise, wire.spec, secret.selector, perturbation)
            return sending.finish(client.head(x), selected)

        seed = derived_seed(secret.seed, 3, 3)
        noise = learn(run, config, perturbation, shape, with_noise, data, seed=seed, reporter=reporter)
        client = Client(net, noise, wire.spec, secret.selector, perturbation).eval()
    return client


def _learn_tail(
    run: RunFolder,
    config: TrainConfig,
    client: Client,
    selected: Sequence[nn.Module],
    classification: Callable[[Tensor, Tensor, Tensor], Tensor],
    data: Tensors,
    seed: int,
    reporter: Reporter,
) -> None:
    """Trains the client's tail on what the selected bodies answer to its head, which no longer changes."""
    client.eval()
    client.tail.train()

    def step(x: Tensor, targets: Tensor) -> StepResult:
        with torch.no_grad():
            answers = client.answers(client.head(x), selected)
        logits = client.combine(answers)
        return StepResult(classification(x, logits, targets), logits)

    torch.manual_seed(derived_seed(seed, 3, 5))
    piece = {"stage": TAIL_STAGE}
    for metrics in fit(
        client.tail.parameters(),
        step,
        data,
        config,
        epochs=config.epochs_of_tail,
        seed=derived_seed(seed, 3, 6),
        reporter=reporter,
        label="stage 3, the client's tail",
        checkpoint=Checkpoint(run, run.TAIL_CHECKPOINT, module_tensors("tail", client.tail), piece),
    ):
        run.append_metrics({**piece, **asdict(metrics)})


def _baseline_client(nets: Sequence[Stage1Net], wire: WireState, secret: ClientSecret) -> Client:
    """A baseline keeps its stage-1 head, noise and tail: one net cut in three, or all N behind one head."""
    ordered = [nets[wire.order[k]] for k in secret.selector]
    first = ordered[0]
    net = first.net
    if len(ordered) > 1:
        net = Net(net.head, net.body, joined([item.net.tail for item in ordered]), net.codec)
    return Client(net, first.noise, wire.spec, secret.selector, first.perturbation).eval()


# --- all of it ---


def train(
    config: TrainConfig,
    out: Path,
    *,
    stage1_from: Path | None = None,
    reporter: Reporter | None = None,
    pool: RayPool | None = None,
) -> dict[str, Any]:
    """Runs the three stages, or a baseline, into the new run folder ``out``.

    Args:
        config: the options.
        out: must not exist, or be empty.
        stage1_from: take stage 1 and the wire of this run, so that the new client fits the same server; the run's own
            client may still be in training.
        reporter: told of the progress.
        pool: the machines that train the nets of stage 1; None is this one. All else is always done here.

    Returns:
        What ``summary.json`` holds: accuracies in percent and what the heads have in common.

    Raises:
        ConfigError: an impossible option.
        DataError: the data, or the run ``stage1_from``.
    """
    reporter = reporter or Silent()
    device = pick_device(config.device)
    dataset, arch = load_data(config, stage1_from)
    if config.teacher is not None:
        if pool is not None:
            raise ConfigError("--teacher lies on this machine: leave --engine ray away")
        config = replace(config, teacher=str(Path(config.teacher).absolute()))
    # An impossible net or teacher is refused before anything is written.
    feature_shape(arch)
    teacher_of(config, arch, dataset.labels, device)
    if config.defense == "joint":
        only_linear(build_net(arch).tail)
    run = RunFolder.create(out, config, arch, dataset.labels, data_digest=data_digest(dataset), stage1_from=stage1_from)
    with training_lock(run):
        return _run_stages(run, config, arch, Tensors.of(dataset, device, config.train_limit), reporter, pool)


def resume(
    path: Path,
    *,
    device: str | None = None,
    jobs: int | None = None,
    reporter: Reporter | None = None,
    pool: RayPool | None = None,
) -> dict[str, Any]:
    """Goes on with an interrupted run at its last finished epoch.

    On the CPU, with the same number of threads, it ends in the same bits as a run that nobody interrupted.

    Args:
        path: the run folder; every option comes from its ``config.json``.
        device: ``auto``, ``cpu`` or ``cuda`` in place of the stored one.
        jobs: in place of the stored number.
        reporter: told of the progress.
        pool: as for ``train``; the run does not remember where it was trained.

    Returns:
        As ``train``.

    Raises:
        ConfigError: the run is finished, or another process trains it.
        DataError: not a run folder, a damaged file in it, or other data than it began with.
    """
    run = RunFolder.open_unfinished(path)
    with training_lock(run):
        config = run.config
        config = replace(config, device=device or config.device, jobs=jobs or config.jobs)
        placed = pick_device(config.device)
        dataset = data_sets.load(config.data)
        if data_digest(dataset) != run.data_digest:
            raise DataError(
                f"--resume {path}: --data {config.data} now holds other images or labels than the run began with; "
                "put those back, or train again into a new folder"
            )
        data = Tensors.of(dataset, placed, config.train_limit)
        return _run_stages(run, config, run.arch, data, reporter or Silent(), pool)


def _run_stages(
    run: RunFolder, config: TrainConfig, arch: ArchSpec, data: Tensors, reporter: Reporter, pool: RayPool | None
) -> dict[str, Any]:
    """Does what is missing in the run folder; what is there is taken as it is. Returns the summary."""
    if run.has("wire.json"):
        _require_stage1(run, config)
        nets = stage1(run, config, arch, data, reporter, pool)
    else:
        source = RunFolder.open_stage1(run.stage1_source) if run.stage1_source is not None else None
        if source is not None:
            run.copy_stage1(source)
        nets = stage1(run, config, arch, data, reporter, pool)
        run.write_wire(_wire(config, source, nets, data))
    wire = run.read_wire()
    if not run.has(run.SECRET_FILE):
        run.write_secret(stage2(config))
    secret = run.read_secret()
    if config.is_ensemble:
        client = stage3(run, config, arch, data, nets, wire, secret, reporter)
    else:
        client = _baseline_client(nets, wire, secret)
    run.save_tensors(
        run.CLIENT_FILE,
        {**module_tensors("head", client.head), **module_tensors("tail", client.tail), "noise": client.noise},
    )
    torch.manual_seed(derived_seed(secret.seed, 3, 4))  # what is drawn for every image is, in the summary too
    summary = _summary(run, config, client, nets, wire, data)
    run.write_json("summary.json", {**summary, "feature_shape": list(wire.spec.feature_shape)})
    run.remove_checkpoints()  # only now: until then a resumed run takes head, tail and noise from them
    return summary


def _wire(config: TrainConfig, source: RunFolder | None, nets: Sequence[Stage1Net], data: Tensors) -> WireState:
    """Takes the wire of ``source`` where its codecs are the wanted ones, so that the client fits its server."""
    bottleneck = config.squeezed
    given = None if source is None else source.read_wire()
    tried = (data.train_x[:BITS_IMAGES], data.train_y[:BITS_IMAGES], config.max_wire_drop_points)
    # A further client takes what was found for the first: found again, on another machine, it might be another number.
    if bottleneck is not None:
        bits = bottleneck.bits
    elif config.wire_bits == "auto":
        bits = fewest_bits(nets, *tried) if given is None else given.spec.feature_codec.bits
    else:
        bits = config.wire_bits
    if config.answer_bits == "auto":
        answer_bits = fewest_answer_bits(nets, *tried) if given is None else given.spec.answer_bits
    else:
        answer_bits = config.answer_bits
    if given is not None and (given.spec.feature_codec.bits, given.spec.answer_bits) == (bits, answer_bits):
        return given
    return fix_wire(
        nets,
        data.train_x[:CALIBRATION_IMAGES],
        wire_bits=bits,
        answer_bits=answer_bits,
        bottleneck=bottleneck,
        sizes=config.party_sizes,
    )


def _require_stage1(run: RunFolder, config: TrainConfig) -> None:
    """The wire was fixed for nets that are stored: others must not take their place in silence."""
    for index in range(config.trained_nets):
        if not run.has(run.stage1_file(index)):
            raise DataError(
                f"{run.path / run.stage1_file(index)} is missing, and wire.json was made with it; put it back, or "
                "train again into a new folder"
            )


def load_data(config: TrainConfig, stage1_from: Path | None) -> tuple[data_sets.Dataset, ArchSpec]:
    """Returns the data and the net of a new run; a run whose stage 1 it cannot take is refused, early where possible.

    Raises:
        ConfigError: the nets of ``stage1_from`` are others than the options ask for.
        DataError: the data; or ``stage1_from`` is no run folder, or its stage 1 was not finished.
    """
    source = RunFolder.open_stage1(stage1_from) if stage1_from is not None else None
    dataset = data_sets.load(config.data)
    arch = config.arch_spec(dataset.image_size, len(dataset.labels))
    if source is not None:
        _require_same_nets(source, config, arch, dataset.labels)
    return dataset, arch


def _require_same_nets(source: RunFolder, config: TrainConfig, arch: ArchSpec, labels: Sequence[str]) -> None:
    if not source.config.is_ensemble or not config.is_ensemble:
        raise ConfigError(f"--stage1 {source.path}: only runs with --defense ensembler share their stage 1")
    theirs, own = ((each.num_nets, each.parties) for each in (source.config, config))
    if (source.arch, source.labels, theirs) != (arch, tuple(labels), own):
        raise ConfigError(
            f"--stage1 {source.path}: that run has another architecture, image size, classes, N or operators; "
            "give the same --arch, --head-end, --tail-start, --bottleneck, --data, -N and --parties"
        )


@torch.inference_mode()
def _summary(
    run: RunFolder,
    config: TrainConfig,
    client: Client,
    nets: Sequence[Stage1Net],
    wire: WireState,
    data: Tensors,
) -> dict[str, Any]:
    selected = [nets[wire.order[k]].net.body for k in client.selector]
    predicted: list[Tensor] = []

    def through_wire(x: Tensor) -> Tensor:
        logits = client.finish(client.head(x), selected)
        predicted.append(logits.argmax(1))
        return logits

    summary: dict[str, Any] = {
        "defense": config.defense,
        "num_nets": config.trained_nets,
        "num_selected": len(client.selector),
        "train_images": len(data.train_x),
        "test_images": len(data.test_x),
        "accuracy_float": accuracy(
            lambda x: client.finish(client.head(x), selected, through_wire=False), data.test_x, data.test_y
        ),
        "accuracy_wire": accuracy(through_wire, data.test_x, data.test_y),
    }
    classes = len(run.labels)
    counts = torch.bincount(data.test_y * classes + torch.cat(predicted), minlength=classes**2)
    run.write_json(CONFUSION_FILE, {"counts": counts.reshape(classes, classes).tolist()})
    if config.is_ensemble:
        x = normalise(data.test_x[:EVALUATION_BATCH]).to(memory_format=torch.channels_last)
        heads = [item.net.head(x) for item in nets]
        own = client.head(x)
        for kind, overlap in OVERLAPS.items():
            summary[f"max_{kind}"] = float(overlap(own, heads))
            if len(heads) > 1:
                # What two heads that never met have in common: the client's figure means little without it.
                across = [overlap(head, heads[:i] + heads[i + 1 :]) for i, head in enumerate(heads)]
                summary[f"max_{kind}_between_stage1_heads"] = float(torch.stack(across).mean())
    run.keep_metrics(lambda record: "summary" not in record)
    run.append_metrics({"summary": summary})
    return summary


# --- reading it back ---


def load_client(run: RunFolder) -> Client:
    """Reads the trained client, frozen, on the CPU."""
    config, secret = run.config, run.read_secret()
    tensors = run.load_tensors(run.CLIENT_FILE)
    net = build_net(run.arch, len(secret.selector))
    for name, module in (("head", net.head), ("tail", net.tail)):
        restore(module, name, tensors)
    return Client(freeze(net), tensors["noise"], run.read_wire().spec, secret.selector, config.perturbation).eval()


def load_bodies(run: RunFolder) -> list[nn.Module]:
    """Reads the N bodies, frozen, in the server's order."""
    nets = load_stage1(run)
    return [nets[i].net.body for i in run.read_wire().order]
