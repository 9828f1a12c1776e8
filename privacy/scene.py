"""Who knows what: a device that was exported, images, and the part of it all that an attacker may use.

A ``Scene`` holds everything. An attack is handed a ``View`` of it, in which whatever its threat model does not grant is
not there; so no attack can look by mistake at what it must not know.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.edge_runtime.sealing import BundleSecret
from ensembler.privacy.film import Film, frames_of, sent
from ensembler.protocol.errors import BundleMismatchError, ConfigError, DataError
from ensembler.protocol.manifest import Kdf, PartySpec, WireSpec
from ensembler.protocol.manifest import load_client as load_client_manifest
from ensembler.training import data as data_sets
from ensembler.training.fit import derived_seed
from ensembler.training.models import ArchSpec, build_net, normalise
from ensembler.training.operators import Hearing
from ensembler.training.perturbation import NoiseKind
from ensembler.training.runs import RunFolder
from ensembler.training.stages import Client, load_bodies, load_client
from ensembler.training.wire import fake_quantise

T = TypeVar("T")

# How the images are divided unless told otherwise, at most: for judging and for observing; the attacker owns the rest.
EVALUATED, OBSERVED = 500, 2000
AUXILIARY = ("disjoint", "train")  # whose images the attacker owns, see ``make_scene``
FEWEST = 32  # of each part; below, a mean says nothing
FOREIGN = 0.5  # of a feature's variance: a bundle whose features are further from the run's client is another client's


class Access(IntEnum):
    """What an attacker has, beside images of the same kind; each includes the ones before."""

    NONE = 0
    QUERY_FREE = 1
    OTHER_DEVICE = 2
    DEVICE = 3
    WHITE_BOX = 4

    @property
    def words(self) -> str:
        """For people."""
        return {
            Access.NONE: "images of the same kind, nothing of this system",
            Access.QUERY_FREE: "a server: its nets, the architecture, what devices send; it cannot send its own images",
            Access.OTHER_DEVICE: "a server that owns a device of another client: pairs of image and features from it",
            Access.DEVICE: "a server that also owns a device: pairs of image and features",
            Access.WHITE_BOX: "the device's weights and noise, as after a theft",
        }[self]


@dataclass(frozen=True, kw_only=True)
class View:
    """What one attack is given. What its threat model does not grant is None.

    Attributes:
        access: the threat model.
        arch: the architecture, known to everybody.
        wire: shapes and codecs, as in every server bundle.
        noise: the defence's kind of noise: ``gaussian``, ``uniform`` or ``learned``.
        noise_std: of the defence's noise, whose values are secret.
        fresh_noise: whether every request draws its own.
        dropout: the share of the features that arrives as 0.0, other ones with every request.
        num_selected: P.
        party_nets: how many nets each operator holds, in the server's order; of a coalition's alone.
        heard: the channels of the device's features that the attacker is sent; None: all.
        auxiliary: images that the attacker owns, ``(A, 3, H, W)`` uint8.
        auxiliary_labels: their classes ``(A,)``.
        observed: features as they arrived, of images that the attacker never sees, ``(O, C, h, w)`` float32.
        bodies: the N server nets in the server's order.
        send_other: as ``send``, on another client's device of the same server; None if none was given.
        send: from images uint8 ``(B, 3, H, W)`` to features, on a device that the attacker owns.
        client: the device's secrets.
        notes: what attacks with this access found out so far, for the next ones.
    """

    access: Access
    arch: ArchSpec
    wire: WireSpec
    noise: NoiseKind
    noise_std: float
    fresh_noise: bool
    dropout: float
    num_selected: int
    party_nets: tuple[int, ...]
    heard: tuple[int, ...] | None
    auxiliary: Tensor
    auxiliary_labels: Tensor
    observed: Tensor | None = None
    bodies: tuple[nn.Module, ...] | None = None
    send_other: Callable[[Tensor], Tensor] | None = None
    send: Callable[[Tensor], Tensor] | None = None
    client: Client | None = None
    notes: dict[Hashable, object] = field(default_factory=dict, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.auxiliary.device

    def new_head(self) -> nn.Module:
        """Builds a freshly initialised head of the client's architecture, cut down to the channels that are heard."""
        head = build_net(self.arch).head
        return head if self.heard is None else nn.Sequential(head, _Chosen(self.heard))

    def noted(self, key: Hashable, find: Callable[[], T]) -> T:
        """Returns what ``find`` finds out, or what it found when an attack asked with this ``key`` before."""
        if key not in self.notes:
            self.notes[key] = find()
        return cast(T, self.notes[key])


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One exported device and the images to attack it with.

    Attributes:
        everything: the view of somebody who knows all.
        evaluated: the images that reconstructions are compared with, ``(E, 3, H, W)`` uint8; no attack sees them.
        arrived: their features as the server gets them, ``(E, C, h, w)``.
        selector: the secret positions.
        client: the device's, and the nets that it selects: they judge what an attack brings back.
        selected: see there.
        auxiliary_source: ``disjoint`` from all that trained the victim, or ``train``: the very images that did.
        seed: of the division, and of the judged images' films.
    """

    everything: View
    evaluated: Tensor
    arrived: Tensor
    selector: tuple[int, ...]
    client: Client
    selected: tuple[nn.Module, ...]
    auxiliary_source: str
    seed: int = 0
    _notes: dict[Access, dict[Hashable, object]] = field(default_factory=dict, repr=False, compare=False)

    def seen_by(self, coalition: Sequence[int], parties: Sequence[PartySpec]) -> Scene:
        """Returns what some of a client's operators see when they share it.

        Operators that are all sent the same know of the images what each of them knows. Those that are sent channels of
        their own see these alone, and nothing of how the device makes the others, so no attack has its weights.

        Args:
            coalition: their positions, in ascending order.
            parties: all operators.
        """
        known, wire = self.everything, self.everything.wire
        ends = list(accumulate((party.num_nets for party in parties), initial=0))
        positions = [k for each in coalition for k in range(ends[each], ends[each + 1])]
        bodies = [(known.bodies or ())[k] for k in positions]
        codecs = tuple(wire.answer_codecs[k] for k in positions)
        selector = tuple(positions.index(k) for k in self.selector if k in positions)
        nets = tuple(parties[each].num_nets for each in coalition)
        everything = replace(
            known,
            party_nets=nets,
            bodies=tuple(bodies),
            num_selected=min(known.num_selected, len(bodies)),
            wire=replace(wire, answer_codecs=codecs),
        )
        channels = [parties[each].channels for each in coalition]
        arrived = self.arrived
        if any(part is not None for part in channels):
            heard = tuple(k for part in channels if part is not None for k in range(*part))
            chosen = _Chosen(heard)
            everything = replace(
                everything,
                heard=heard,
                wire=replace(everything.wire, feature_shape=(len(heard), *wire.feature_shape[1:])),
                bodies=tuple(_moved(body, heard) for body in bodies),
                observed=None if known.observed is None else chosen(known.observed),
                send=_then(known.send, chosen),
                send_other=_then(known.send_other, chosen),
                client=None,
            )
            arrived = chosen(arrived)
        return replace(self, everything=everything, arrived=arrived, selector=selector, _notes={})

    def view(self, access: Access) -> View:
        """Returns what an attacker with ``access`` knows."""
        all_of_it = self.everything
        hidden: dict[str, None] = {}
        if access < Access.QUERY_FREE:
            hidden |= {"observed": None, "bodies": None}
        if access < Access.OTHER_DEVICE:
            hidden |= {"send_other": None}
        if access < Access.DEVICE:
            hidden |= {"send": None}
        if access < Access.WHITE_BOX:
            hidden |= {"client": None}
        known = {name: getattr(all_of_it, name) for name in all_of_it.__dataclass_fields__}
        return View(**(known | hidden | {"access": access, "notes": self._notes.setdefault(access, {})}))

    def filmed(self, film: Film | None) -> Tensor:
        """Returns what arrives of a film of every judged image, ``(E, film.frames, *feature_shape)``.

        Without a film it is ``arrived``, which lacks the second axis.
        """
        if film is None:
            return self.arrived
        send = self.everything.send
        assert send is not None
        taken = frames_of(self.evaluated, film, torch.Generator().manual_seed(derived_seed(self.seed, 6)))
        return sent(taken, send)


class _Chosen(nn.Module):
    """Features ``(B, C, h, w)`` -> those of some channels."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self._channels = list(channels)

    def forward(self, features: Tensor) -> Tensor:
        return features[:, self._channels]


def _moved(body: nn.Module, heard: tuple[int, ...]) -> nn.Module:
    """Returns a body for features of the channels ``heard`` alone, its own among them."""
    assert isinstance(body, Hearing)
    start = heard.index(body.channels[0])
    return Hearing(body.inner, (start, start + body.channels[1] - body.channels[0]))


def _then(send: Callable[[Tensor], Tensor] | None, chosen: nn.Module) -> Callable[[Tensor], Tensor] | None:
    if send is None:
        return None
    return lambda images: cast(Tensor, chosen(send(images)))


def check_attacker(
    run: RunFolder, *, operators: int, auxiliary: str, other_device: Path | None, coalition: Sequence[int] | None
) -> None:
    """Refuses an attacker that a client of a run cannot have; before anything is exported or computed.

    Args:
        run: the run.
        operators: of the client: the run's, or as many as it was exported for.
        auxiliary: as for ``make_scene``.
        other_device: as for ``make_scene``.
        coalition: as for ``make_scene``.

    Raises:
        ConfigError: an unknown choice, or operators that the client does not have.
        BundleError: the other device's bundle is damaged, or of another server.
    """
    if auxiliary not in AUXILIARY:
        raise ConfigError(f"--aux {auxiliary}: choose {' or '.join(AUXILIARY)}")
    if coalition is not None and not (
        coalition and list(coalition) == sorted({*coalition}) and all(0 <= each < operators for each in coalition)
    ):
        if operators == 1:
            raise ConfigError("--operators: the client has one operator, who is sent everything; leave it out")
        raise ConfigError(
            f"--operators: the client has {operators} operators: name some of 1 to {operators}, each once"
        )
    if other_device is None:
        return
    wire, others = run.read_wire().spec, load_client_manifest(other_device).wire
    if others != wire:
        raise BundleMismatchError(
            f"--other-device {other_device}: its bodies_id is {others.bodies_id[:12]}..., the audited client's is "
            f"{wire.bodies_id[:12]}...; give a client of the same server"
        )


def make_scene(
    run_path: Path,
    bundle: Path,
    *,
    data: str | None = None,
    auxiliary: str = "disjoint",
    observed: int = OBSERVED,
    evaluated: int = EVALUATED,
    other_device: Path | None = None,
    coalition: Sequence[int] | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    secret: Callable[[Kdf], BundleSecret | None] = lambda _: None,
) -> Scene:
    """Reads an exported device and divides the images.

    Args:
        run_path: the run that the bundle was exported from; float bodies and, for white-box attacks, the client.
        bundle: the client bundle, whose features are attacked: quantised, as they cross the wire.
        data: whose held-out part is divided; None takes the run's own data.
        auxiliary: ``disjoint``: the attacker owns a part of the held-out images; ``train``: it owns the images that
            trained the victim, as the paper assumes.
        observed: how many images' features the server collects.
        evaluated: how many images the reconstructions are judged on.
        other_device: the bundle of another client of the same server, which the attacker owns.
        coalition: positions of the operators who share what they see; None: all.
        seed: of the division.
        device: where attacks compute.
        secret: opens encrypted bundles, see ``EdgeRuntime``.

    Raises:
        KeyFileError: the bundle is encrypted, and there is no secret or a wrong one.
        ConfigError: impossible counts.
        DataError: too few images, other classes, or images of another size.
        BundleError: damaged, or not of this run.
    """
    device = device or torch.device("cpu")
    run = RunFolder.open(run_path)
    runtime = EdgeRuntime(bundle, secret=secret)
    parties = runtime.manifest.parties
    check_attacker(run, operators=len(parties), auxiliary=auxiliary, other_device=other_device, coalition=coalition)
    wire = run.read_wire().spec
    if runtime.manifest.wire != wire:
        raise BundleMismatchError(
            f"{bundle} was not exported from {run_path}: its bodies_id is {runtime.manifest.wire.bodies_id[:12]}..., "
            f"the run's is {wire.bodies_id[:12]}...; give the --run that it came from"
        )
    other = None if other_device is None else EdgeRuntime(other_device, secret=secret)
    config = run.config
    images = load_images(run, data)
    held_out = len(images.test_x)
    # Small data sets are divided evenly rather than not at all.
    evaluated, observed = min(evaluated, held_out // 4), min(observed, held_out // 3)
    if min(evaluated, observed) < FEWEST:
        raise too_few(data or config.data, held_out, 4 * FEWEST)
    judged, seen, owned = np.split(shuffled(held_out, seed), [evaluated, evaluated + observed])
    if auxiliary == "train":
        trained = images if data is None else data_sets.load(config.data)
        owned_x, owned_y = trained.train_x[: config.train_limit], trained.train_y[: config.train_limit]
    else:
        owned_x, owned_y = images.test_x[owned], images.test_y[owned]

    def sent_by(encoder: EdgeRuntime, batch: Tensor) -> Tensor:
        pixels = np.ascontiguousarray(batch.permute(0, 2, 3, 1).cpu().numpy())
        parts = [encoder.encode(part) for part in np.split(pixels, range(256, len(pixels), 256))]
        return torch.from_numpy(wire.feature_codec.decode(np.concatenate(parts))).to(device)

    def as_tensor(array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    send = partial(sent_by, runtime)
    client = load_client(run).to(device)
    shown = as_tensor(images.test_x[judged])
    arrived = send(shown)
    if _foreign(client, shown, arrived):
        raise BundleMismatchError(
            f"{bundle} was not exported from {run_path}, but from another client of the same server: its head gives "
            "other features; give the --run that it came from"
        )
    bodies = tuple(body.to(device) for body in load_bodies(run))
    scene = Scene(
        everything=View(
            access=Access.WHITE_BOX,
            arch=run.arch,
            wire=wire,
            noise=config.noise,
            noise_std=runtime.manifest.noise_std,
            fresh_noise=runtime.manifest.noise_mode in ("fresh", "drawn"),
            dropout=runtime.manifest.dropout,
            num_selected=len(client.selector),
            party_nets=tuple(party.num_nets for party in parties),
            heard=None,
            auxiliary=as_tensor(owned_x),
            auxiliary_labels=as_tensor(owned_y),
            observed=send(as_tensor(images.test_x[seen])),
            bodies=bodies,
            send_other=None if other is None else partial(sent_by, other),
            send=send,
            client=client,
        ),
        evaluated=shown,
        arrived=arrived,
        selector=client.selector,
        client=client,
        selected=tuple(bodies[k] for k in client.selector),
        auxiliary_source=auxiliary,
        seed=seed,
    )
    return scene if coalition is None else scene.seen_by(coalition, parties)


@torch.no_grad()
def _foreign(client: Client, images: Tensor, arrived: Tensor) -> bool:
    """Returns whether what arrived of ``images`` cannot come from ``client``."""
    features, codec = client.head(normalise(images)), client.wire.feature_codec
    own, again = (fake_quantise(client.perturbed(features), codec) for _ in range(2))
    # What is drawn anew for every image differs between two requests of the same client, too.
    allowed = FOREIGN * own.var(0).mean() + (own - again).square().mean()
    return bool((arrived - own).square().mean() > allowed)


def load_images(run: RunFolder, data: str | None) -> data_sets.Dataset:
    """Returns the images to attack a run with: its own data set, or ``data``.

    Raises:
        DataError: other classes, or images of another size.
    """
    images = data_sets.load(data or run.config.data)
    if images.image_size != run.arch.image_size:
        raise DataError(
            f"--data {data}: images of {images.image_size[0]}x{images.image_size[1]} pixels; the device takes "
            f"{run.arch.image_size[0]}x{run.arch.image_size[1]}"
        )
    if tuple(images.labels) != tuple(run.labels):
        raise DataError(f"--data {data}: its classes are not the run's; the attacks on the bodies need the same")
    return images


def shuffled(held_out: int, seed: int) -> npt.NDArray[np.int64]:
    """Returns the order in which held-out images are divided."""
    return np.random.default_rng(derived_seed(seed, 4)).permutation(held_out)


def too_few(data: str, held_out: int, least: int) -> DataError:
    """Returns the error for a held-out part that cannot be divided."""
    return DataError(
        f"--data {data}: {held_out} held-out images are too few to audit with; {least} are the least, and a few "
        "thousand show more"
    )
