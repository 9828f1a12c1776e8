"""The privacy audit: metrics as pinned, attacks that know what they may, and a verdict that cannot flatter."""

from __future__ import annotations

import copy
import json
import math
import shutil
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import brief_plan
from skimage.metrics import structural_similarity
from torch import nn

from ensembler.cli import main
from ensembler.export.parity import Gates
from ensembler.export.pipeline import ExportOptions, export
from ensembler.privacy import audit as audits
from ensembler.privacy import scene as scenes
from ensembler.privacy.attacks import ATTACKS, matching
from ensembler.privacy.attacks.base import OWN_SSIM, AttackImpossibleError, DivergedError, Finding
from ensembler.privacy.attacks.eye import Colours, train_eye
from ensembler.privacy.attacks.matching import Shadow, guessed_head, known_head, matched
from ensembler.privacy.attacks.moments import Cleaner, Moments
from ensembler.privacy.attacks.shadow import ShadowHead
from ensembler.privacy.audit import BUDGETS, FLOOR, ORACLE, Budget, audit
from ensembler.privacy.card import require_ssim
from ensembler.privacy.decoder import Decoder, Effort, as_map, is_small, painted, pixels, train_decoder, train_on_pairs
from ensembler.privacy.film import HAND_HELD, MOUNTED, SENSOR_STD, Film, frames_of
from ensembler.privacy.identity import Identifier
from ensembler.privacy.metrics import entropy_bits, mse, psnr_db, ssim
from ensembler.privacy.parts import Parts
from ensembler.privacy.scene import Access, make_scene
from ensembler.privacy.selector import auc, rankings
from ensembler.protocol.errors import BundleMismatchError, ConfigError, DataError, GateFailedError
from ensembler.training.models import normalise
from ensembler.training.perturbation import Perturbation
from ensembler.training.runs import RunFolder
from ensembler.training.stages import train

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = brief_plan()
DECODER_STEPS = 60
IMPOSSIBLE = {  # on this scene
    "known-pairs-1000": "1000 pairs: the attacker has",
    "shadow-colluding": "one operator holds all the nets",
    "other-device": "this attack needs a device of another client",
}


@pytest.fixture(scope="module")
def scene(tiny, audit_images):
    return make_scene(tiny.run, tiny.client, data=audit_images, observed=128, evaluated=32)


def test_the_operators_are_those_of_the_export_whatever_the_run_was_trained_for(other, tiny, audit_images):
    options = {"data": audit_images, "observed": 128, "evaluated": 32}
    second = make_scene(tiny.run, other / "client", coalition=[1], **options)
    assert second.everything.party_nets == (1,)
    assert torch.equal(second.arrived, make_scene(tiny.run, other / "client", **options).arrived)
    with pytest.raises(ConfigError, match="the client has 3 operators: name some of 1 to 3"):
        make_scene(tiny.run, other / "client", coalition=[3], **options)
    with pytest.raises(ConfigError, match="the client has one operator, who is sent everything; leave it out"):
        make_scene(tiny.run, tiny.client, coalition=[1], **options)


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


# --- metrics ---


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.4])
def test_ssim_is_that_of_scikit_image_with_the_pinned_options(random, noise):
    images = torch.rand(5, 3, 24, 31, generator=random)
    others = (images + noise * torch.randn(images.shape, generator=random)).clamp(0, 1)
    wanted = [
        structural_similarity(
            x.numpy(),
            y.numpy(),
            channel_axis=0,
            data_range=1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(images, others, strict=True)
    ]
    assert ssim(images, others).tolist() == pytest.approx(wanted, abs=2e-3)


@pytest.mark.parametrize("count", [2, 4, 256])
def test_the_entropy_of_uniform_codes_is_all_their_bits_and_of_constant_ones_none(count):
    generator = torch.Generator().manual_seed(0)
    uniform = torch.randint(count, (4000, 3, 5, 7), generator=generator)
    assert entropy_bits(uniform, count) == pytest.approx(105 * math.log2(count), rel=1e-3)
    assert entropy_bits(uniform % 1 + 1, count) == 0
    # A number that only repeats another counts again: the sum is a bound and no estimate of what they tell together.
    twice = torch.cat([uniform, uniform], 1)
    assert entropy_bits(twice, count) == pytest.approx(2 * entropy_bits(uniform, count))


def test_the_entropy_of_uneven_codes_is_shannons():
    codes = torch.zeros(10_000, 1, dtype=torch.int64)
    codes[:1000] = 1
    expected = -(0.9 * math.log2(0.9) + 0.1 * math.log2(0.1))
    assert entropy_bits(codes, 2) == pytest.approx(expected, abs=1e-3)


def test_ssim_of_the_negative_is_negative_and_kept(random):
    images = torch.rand(2, 3, 16, 16, generator=random)
    assert (ssim(images, 1 - images) < -0.5).all()


def test_psnr_and_mse_are_of_each_image():
    images = torch.zeros(2, 3, 11, 11)
    others = torch.stack([torch.full((3, 11, 11), 0.1), torch.zeros(3, 11, 11)])
    assert mse(images, others).tolist() == pytest.approx([0.01, 0])
    assert psnr_db(images, others).tolist() == pytest.approx([20, 100])


@pytest.mark.parametrize(
    "shapes", [((1, 3, 10, 16), (1, 3, 10, 16)), ((1, 3, 16, 16), (2, 3, 16, 16)), ((3, 16, 16),) * 2]
)
def test_ssim_refuses_what_it_is_not_defined_for(shapes):
    with pytest.raises(ConfigError, match="SSIM"):
        ssim(*(torch.zeros(shape) for shape in shapes))


# --- who knows what ---


def test_the_parts_of_the_images_have_nothing_in_common(scene, tiny):
    view = scene.view(Access.DEVICE)
    owned = {image.tobytes() for image in view.auxiliary.numpy()}
    judged = {image.tobytes() for image in scene.evaluated.numpy()}
    with np.load(tiny.data.removeprefix("npz:").split(",")[0]) as stored:
        trained = {image.tobytes() for image in stored["x"]}
    assert not owned & judged
    assert not (owned | judged) & trained
    features = {f.tobytes() for f in view.observed.numpy()}
    assert not features & {f.tobytes() for f in scene.arrived.numpy()}
    assert not features & {f.tobytes() for f in view.send(view.auxiliary).numpy()}


def test_with_aux_train_the_attacker_owns_what_trained_the_victim(tiny, audit_images):
    held_out = audit_images.split(",")[1]
    scene = make_scene(tiny.run, tiny.client, data=f"npz:{held_out},{held_out}", auxiliary="train")
    owned = scene.everything.auxiliary
    with np.load(tiny.data.removeprefix("npz:").split(",")[0]) as stored:
        assert {image.tobytes() for image in owned.numpy()} == {image.tobytes() for image in stored["x"]}


def test_features_are_those_of_the_exported_client_as_they_cross_the_wire(scene):
    steps = scene.arrived / scene.everything.wire.feature_codec.scale
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    client = scene.everything.client
    in_float = client.perturbed(client.head(normalise(scene.evaluated)))
    assert 0 < float((scene.arrived - in_float).abs().max()) < float(in_float.abs().max())


@pytest.mark.parametrize(
    ("access", "hidden"),
    [
        (Access.NONE, {"observed", "bodies", "send_other", "send", "client"}),
        (Access.QUERY_FREE, {"send_other", "send", "client"}),
        (Access.OTHER_DEVICE, {"send", "client"}),
        (Access.DEVICE, {"client"}),
        (Access.WHITE_BOX, set()),
    ],
)
def test_a_view_holds_what_its_threat_model_grants_and_no_more(scene, access, hidden):
    everything = replace(scene.everything, send_other=scene.everything.send)
    view = replace(scene, everything=everything).view(access)
    secrets = ("observed", "bodies", "send_other", "send", "client")
    assert {name for name in secrets if getattr(view, name) is None} == hidden
    assert view.access is access
    assert not any("selector" in name for name in view.__dataclass_fields__)


def test_a_view_tells_the_kind_of_the_defence_and_none_of_its_values(tiny, audit_images, tmp_path):
    config = RunFolder.open(tiny.run).config
    changes = {"defense": "single", "noise": "learned", "noise_mode": "fresh", "noise_std": 0.3, "dropout": 0.2}
    train(replace(config, **changes, epochs_stage1=1, epochs_stage3=1), tmp_path / "run")
    gates = Gates(min_sqnr_db=0.0, max_accuracy_drop_points=100.0)
    export(tmp_path / "run", tmp_path / "out", ExportOptions(gates=gates, server_precision="float32"))
    made = make_scene(tmp_path / "run", tmp_path / "out" / "client", data=audit_images, observed=128, evaluated=32)
    view = made.view(Access.QUERY_FREE)
    assert (view.noise, view.fresh_noise, view.dropout) == ("learned", True, 0.2)
    assert view.noise_std == pytest.approx(float(made.everything.client.noise.std()))
    assert view.client is None
    assert float((view.observed == 0).float().mean()) >= 0.19


@pytest.mark.parametrize(
    ("change", "message"),
    [({"auxiliary": "mine"}, "choose disjoint or train"), ({"data": "demo"}, "the device takes 16x16")],
)
def test_an_impossible_scene_is_refused(tiny, change, message):
    with pytest.raises((ConfigError, DataError), match=message):
        make_scene(tiny.run, tiny.client, **change)


def with_names(tmp_path, images, names):
    parts = []
    for name in images.removeprefix("npz:").split(","):
        with np.load(name) as stored:
            arrays = {key: stored[key] for key in stored} | {"label_names": np.array(names)}
        parts.append(str(tmp_path / name.rsplit("/", 1)[1]))
        np.savez(parts[-1], **arrays)
    return "npz:" + ",".join(parts)


def test_too_few_images_and_other_classes_are_named(tiny, audit_images, tmp_path):
    with pytest.raises(DataError, match="96 held-out images are too few to audit with; 128"):
        make_scene(tiny.run, tiny.client)
    with pytest.raises(DataError, match="its classes are not the run's"):
        make_scene(tiny.run, tiny.client, data=with_names(tmp_path, audit_images, ["a", "b", "c"]))


def test_a_bundle_of_another_run_is_named(tiny, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(tiny.run, other)
    wire = json.loads((other / "wire.json").read_text())
    wire["bodies_id"] = "0" * 64
    (other / "wire.json").write_text(json.dumps(wire))
    with pytest.raises(BundleMismatchError, match=r"was not exported from.*give the --run that it came from"):
        make_scene(other, tiny.client)


def test_another_client_of_the_same_server_is_told_apart_by_its_features(scene):
    client = scene.everything.client
    assert not scenes._foreign(client, scene.evaluated, scene.arrived)
    other = copy.deepcopy(client)
    torch.manual_seed(0)
    for module in other.head.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    assert scenes._foreign(other, scene.evaluated, scene.arrived)
    fresh = copy.deepcopy(client)
    # The codes of one client that draws anew for every image differ, and not by more than that.
    for kind in (Perturbation(std=0.1, fresh=True), Perturbation(dropout=0.3)):
        fresh.perturbation = other.perturbation = kind
        with torch.no_grad():
            arrived = fresh.perturbed(fresh.head(normalise(scene.evaluated)))
        assert not scenes._foreign(fresh, scene.evaluated, arrived)
        assert scenes._foreign(other, scene.evaluated, arrived)


# --- the decoder ---


@pytest.mark.parametrize(
    ("shape", "wanted"), [((16, 8, 8), (16, 8, 8)), ((17, 6), (6, 4, 4)), ((16, 6), (6, 4, 4)), ((40,), (40, 1, 1))]
)
def test_features_of_any_shape_are_maps(shape, wanted):
    assert as_map(torch.zeros(2, *shape)).shape == (2, *wanted)


def test_the_linear_map_inverts_what_is_linear(random):
    images = torch.randint(0, 256, (64, 3, 16, 16), generator=random, dtype=torch.uint8)
    head = nn.Conv2d(3, 16, 2, stride=2)  # 12 pixels to 16 numbers
    with torch.no_grad():
        features = head(normalise(images))
    decoder = Decoder((16, 8, 8), (16, 16), 4)
    decoder.fit_linear(features, images, 1e-9)
    assert float(mse(painted(decoder.eval(), features), pixels(images)).max()) < 1e-4


@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize(
    ("feature_shape", "image_size"),
    [((3, 4, 4), (24, 24)), ((3, 3, 5), (24, 40)), ((7, 1, 1), (32, 32)), ((5, 8, 8), (64, 64)), ((5, 8, 8), (16, 16))],
)
def test_a_decoder_begins_with_the_linear_map_alone_whatever_the_sizes(feature_shape, image_size, stepwise):
    decoder = Decoder(feature_shape, image_size, 12, stepwise=stepwise).train()
    images = decoder(torch.ones(2, *feature_shape))
    assert images.shape == (2, 3, *image_size)
    with torch.no_grad():
        decoder.linear.weight.zero_()
    assert not decoder(torch.ones(2, *feature_shape)).any()


@pytest.mark.parametrize("pool", [2, 4])
def test_training_improves_on_the_linear_map_and_never_ends_worse(random, pool):
    coarse = torch.rand(200, 3, 4, 4, generator=random)
    images = (255 * nn.functional.interpolate(coarse, (16, 16), mode="bilinear")).to(torch.uint8)
    torch.manual_seed(0)
    head = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(pool))

    @torch.no_grad()
    def features(batch):
        return head(normalise(batch))

    held, owned = images[:50], images[50:]
    scores = []
    for steps in (0, DECODER_STEPS):
        effort = Effort(steps=steps, check_every=10, width=16)
        shape = (8, 16 // pool, 16 // pool)
        decoder = train_decoder(
            features, owned, shape, effort, torch.Generator().manual_seed(0), stepwise=is_small(shape, (16, 16))
        )
        scores.append(float(ssim(painted(decoder, features(held)), pixels(held)).mean()))
    assert scores[1] > scores[0]


# --- attacks: one table for all ---


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_works_with_what_its_threat_model_grants_and_gives_images(scene, name):
    attack = ATTACKS[name]
    ticks = []
    plan = replace(TINY, num_nets=3, tick=ticks.append)
    if name in IMPOSSIBLE:
        with pytest.raises(AttackImpossibleError, match=IMPOSSIBLE[name]):
            attack.run(scene.view(attack.ACCESS), plan)
        return
    finding = attack.run(scene.view(attack.ACCESS), plan)
    assert len(ticks) <= attack.ticks(plan)
    for reconstruct in finding.variants.values():
        images = reconstruct(scene.filmed(finding.film)[:3])
        assert images.shape == (3, 3, 16, 16)
        assert torch.isfinite(images).all()
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert name == attack.NAME
    assert attack.SOURCE
    assert attack.WORDS


def test_an_attacker_who_knows_ten_pairs_asks_the_device_for_ten_and_no_more(scene):
    asked = []
    view = scene.view(Access.DEVICE)

    def send(images):
        asked.append(len(images))
        return view.send(images)

    finding = ATTACKS["known-pairs-10"].run(replace(view, send=send), TINY)
    assert asked == [10]
    assert set(finding.variants) == {"ridge regression", "network"}


def test_what_a_network_learned_of_a_few_pairs_is_more_than_their_linear_map(random):
    coarse = torch.rand(160, 3, 4, 4, generator=random)
    images = (255 * nn.functional.interpolate(coarse, (16, 16), mode="bilinear")).to(torch.uint8)
    torch.manual_seed(0)
    head = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    with torch.no_grad():
        features = head(normalise(images))
    scores = []
    for steps in (0, DECODER_STEPS):
        effort = Effort(steps=steps, check_every=10, width=16)
        decoder = train_on_pairs(features[:100], images[:100], 1e-3, effort, torch.Generator().manual_seed(0))
        scores.append(float(ssim(painted(decoder, features[100:]), pixels(images[100:])).mean()))
    assert scores[1] > scores[0]


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if attack.ACCESS > Access.NONE])
def test_an_attack_without_what_it_needs_says_so(scene, name):
    attack = ATTACKS[name]
    with pytest.raises(AttackImpossibleError, match="this attack needs"):
        attack.run(scene.view(Access(attack.ACCESS - 1)), TINY)


@pytest.mark.parametrize("name", ["distribution-matching", "shadow-single"])
def test_the_same_seed_gives_the_same_images_and_another_one_others(scene, name):
    attack = ATTACKS[name]

    def images(seed):
        finding = attack.run(scene.view(attack.ACCESS), replace(TINY, seed=seed))
        return next(iter(finding.variants.values()))(scene.arrived[:2])

    assert torch.equal(images(0), images(0))
    assert not torch.equal(images(0), images(1))


@pytest.mark.parametrize("name", ["oracle-decoder", "frames-8"])
def test_the_bound_may_take_longer_than_other_decoders(scene, name):
    attack, plan, steps = ATTACKS[name], replace(TINY, bound_length=3), []
    finding = attack.run(scene.view(attack.ACCESS), replace(plan, tick=steps.append))
    assert attack.ticks(plan) == 3 * attack.ticks(TINY) >= len(steps) > attack.ticks(TINY)
    assert finding.seen.get("steps_at_most", 12) == 12


def test_a_shadow_drops_what_the_device_drops(scene):
    view = replace(scene.view(Access.QUERY_FREE), dropout=0.4)
    head = ShadowHead(view).eval()
    with torch.no_grad():
        first, second = (head(normalise(scene.evaluated)) for _ in range(2))
    assert float((first == 0).float().mean()) > 0.35
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("num_selected", "sets"), [(1, 0), (2, 3), (3, 0)])
def test_a_shadow_is_trained_for_each_set_of_p_nets(scene, num_selected, sets):
    attack = ATTACKS["shadow-subsets"]
    view = replace(scene.view(Access.QUERY_FREE), num_selected=num_selected)
    if not sets:
        with pytest.raises(AttackImpossibleError, match="what the other shadow attacks try"):
            attack.run(view, TINY)
        return
    assert list(attack.run(view, TINY).variants) == ["nets 1, 2", "nets 1, 3", "nets 2, 3"]


def test_too_many_sets_are_not_tried(scene):
    view = scene.view(Access.QUERY_FREE)
    many = replace(view, bodies=view.bodies * 4, num_selected=4)
    with pytest.raises(AttackImpossibleError, match="495 sets of 4 of 12 nets are too many"):
        ATTACKS["shadow-subsets"].run(many, TINY)
    with pytest.raises(AttackImpossibleError, match="31 groups of operators"):
        ATTACKS["shadow-colluding"].run(replace(many, party_nets=(2, 2, 2, 3, 3)), TINY)


def test_colluding_operators_try_what_each_group_holds(scene):
    view = replace(scene.view(Access.QUERY_FREE), party_nets=(2, 1))
    finding = ATTACKS["shadow-colluding"].run(view, TINY)
    assert list(finding.variants) == ["nets 1, 2", "nets 3", "nets 1, 2, 3"]


def test_another_device_helps_as_far_as_it_is_like_this_one(scene):
    everything = scene.everything
    attack = ATTACKS["other-device"]
    louder = replace(everything, send_other=lambda images: 2 * everything.send(images))
    finding = attack.run(replace(scene, everything=louder).view(Access.OTHER_DEVICE), TINY)
    as_it_is, scaled = (finding.variants[name](scene.arrived) for name in ("", "scaled"))
    truth = pixels(scene.evaluated)
    assert mse(scaled, truth).mean() < mse(as_it_is, truth).mean()


def test_a_calibrated_shadow_sees_what_arrives_scaled_like_its_own_features(scene):
    view = scene.view(Access.QUERY_FREE)
    plain = ATTACKS["shadow-single"].run(view, TINY)
    louder = replace(view, observed=3 * view.observed + 1, notes=view.notes)
    calibrated = ATTACKS["shadow-calibrated"].run(louder, TINY)
    again = ATTACKS["shadow-calibrated"].run(view, TINY)
    for name, reconstruct in calibrated.variants.items():
        same = again.variants[name](scene.arrived)
        assert torch.allclose(reconstruct(3 * scene.arrived + 1), same, atol=1e-4)
        assert not torch.allclose(plain.variants[name](scene.arrived), same, atol=1e-2)


def test_an_image_is_found_again_among_the_judged_ones_and_noise_is_not(scene):
    identifier = Identifier(scene)
    truth = pixels(scene.evaluated)
    reidentified, same_class = identifier.judge(truth)
    assert reidentified.all()
    assert same_class.all()
    noise, _ = identifier.judge(torch.rand(truth.shape))
    assert noise.float().mean() < 0.2
    fewer, _ = identifier.judge(truth[:5])
    assert fewer.shape == (5,)


def test_a_film_of_a_scene_begins_with_it_and_moves_as_a_hand_does(random):
    # A ramp to the right and one downwards: what a pixel shows says where it came from.
    side = torch.arange(24)
    ramps = torch.stack([(10 * side).expand(24, 24), (10 * side)[:, None].expand(24, 24), torch.zeros(24, 24)])
    images = ramps.expand(3, -1, -1, -1).to(torch.uint8)
    film = frames_of(images, Film(40, HAND_HELD), random)
    assert film.shape == (3, 40, 3, 24, 24)
    assert film.dtype == torch.uint8
    assert torch.equal(film[:, 0], images)
    middle = film[:, 1:, :2, 12, 12].float() / 10 - 12
    shift, brightness = HAND_HELD.shift_pixels, HAND_HELD.brightness
    assert float(middle.abs().max()) <= shift * (1 + brightness) + 12 * brightness + 1
    for axis in (0, 1):  # to both sides
        assert middle[..., axis].min() < -1
        assert middle[..., axis].max() > 1
    assert torch.equal(film, frames_of(images, Film(40, HAND_HELD), torch.Generator().manual_seed(0)))


def test_pictures_of_a_camera_that_stands_still_differ_by_its_sensors_noise_alone(random):
    images = torch.full((2, 3, 24, 24), 128, dtype=torch.uint8)
    images[:, :, :, 12:] = 64  # an edge, which would move with the camera
    film = frames_of(images, Film(40, MOUNTED), random)
    assert torch.equal(film[:, 0], images)
    difference = film[:, 1:].float() - images[:, None]
    assert float(difference.mean()) == pytest.approx(0, abs=0.05)
    assert float(difference.std()) == pytest.approx(SENSOR_STD, rel=0.05)


@pytest.mark.parametrize("name", ["frames-8", "still-8"])
def test_a_film_of_a_scene_says_more_than_one_image_where_noise_is_fresh(scene, name):
    drawn = torch.Generator().manual_seed(0)

    def send(images):
        """Images of half the size, under noise that hides them."""
        small = nn.functional.avg_pool2d(pixels(images), 2)
        return small + torch.randn(small.shape, generator=drawn)

    wire = replace(scene.everything.wire, feature_shape=(3, 8, 8))
    noisy = replace(scene, everything=replace(scene.everything, send=send, wire=wire), arrived=send(scene.evaluated))
    plan = replace(TINY, effort=Effort(steps=DECODER_STEPS, check_every=20, width=16))
    errors = {}
    for attack in (ORACLE, name):
        finding = ATTACKS[attack].run(noisy.view(Access.DEVICE), plan)
        images = finding.variants["squared error"](noisy.filmed(finding.film))
        errors[attack] = float(mse(images, pixels(scene.evaluated)).mean())
    assert errors[name] < 0.85 * errors[ORACLE]


def test_a_film_that_says_more_does_not_put_the_oracle_in_doubt():
    rows = [row(FLOOR, 0.1, 0), row(ORACLE, 0.3, Access.DEVICE), row("frames-8", 0.6, Access.DEVICE, frames=8)]
    assert all(gate["passed"] for gate in audits._gates(rows, []))
    assert audits._verdict(rows, [])["attack"] == "frames-8"


@pytest.mark.parametrize(("film", "passed"), [(0.6, True), (0.295, True), (0.28, False)])
def test_a_film_that_says_less_than_one_image_puts_its_own_decoder_in_doubt(film, passed):
    rows = [row(FLOOR, 0.1, 0), row(ORACLE, 0.3, Access.DEVICE), row("frames-8", film, Access.DEVICE, frames=8)]
    (gate,) = (each for each in audits._gates(rows, []) if each["about"] == "frames-8")
    assert gate["passed"] == passed


def test_who_has_a_film_has_what_its_first_frame_says(scene):
    view = scene.view(Access.DEVICE)
    of_one, of_film = (ATTACKS[name].run(view, TINY).variants for name in (ORACLE, "frames-8"))
    film = scene.filmed(Film(8, HAND_HELD))
    for name, reconstruct in of_one.items():
        assert torch.equal(of_film[f"first frame, {name}"](film), reconstruct(film[:, 0]))


@pytest.mark.parametrize("name", ["ina", "eina", "dina"])
def test_an_inverse_net_reads_more_than_the_mean_image_from_what_crosses_the_wire(scene, name):
    plan = replace(TINY, effort=Effort(steps=DECODER_STEPS, check_every=20, width=16))
    attack = ATTACKS[name]
    reconstruct = attack.run(scene.view(attack.ACCESS), plan).variants[""]
    truth = pixels(scene.evaluated)
    floor = pixels(scene.everything.auxiliary).mean(0).expand_as(truth)
    assert mse(reconstruct(scene.arrived), truth).mean() < 0.7 * mse(floor, truth).mean()


def test_no_attack_changes_the_servers_nets(scene):
    def state():
        return [value.clone() for body in scene.everything.bodies for value in body.state_dict().values()]

    before = state()
    for name in ("shadow-single", "shadow-adaptive"):
        ATTACKS[name].run(scene.view(Access.QUERY_FREE), TINY)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))


# --- distribution matching ---


def test_fixed_noise_after_a_relu_can_be_seen_in_what_arrives(scene):
    view = scene.view(Access.QUERY_FREE)
    cleaner = Cleaner(view, view.observed)
    noise = scene.everything.client.noise
    assert cleaner.after_relu
    left = float((cleaner.offset[0] - noise).abs().mean() / noise.std())
    assert left < 0.35  # of 32 images; a guess of nothing would be off by 0.8


def test_fresh_noise_is_added_to_the_shadow_instead_of_taken_off(scene):
    view = replace(scene.view(Access.QUERY_FREE), fresh_noise=True)
    cleaner = Cleaner(view, view.observed)
    assert not cleaner.offset.any()
    same = torch.zeros(1, *view.wire.feature_shape)
    assert not torch.equal(cleaner.sent(same), cleaner.sent(same))


def test_a_guessed_head_gives_features_of_the_right_shape(scene):
    view = scene.view(Access.QUERY_FREE)
    for shape in ((4, 8, 8), (5, 16, 16), (3, 5, 7)):
        there = replace(view, wire=replace(view.wire, feature_shape=shape))
        assert guessed_head(there)(torch.rand(2, 3, 16, 16)).shape == (2, *shape)
    with pytest.raises(AttackImpossibleError, match="no maps"):
        guessed_head(replace(view, wire=replace(view.wire, feature_shape=(17, 8))))


def test_what_a_device_drops_is_left_out_of_the_noise_and_dropped_by_the_shadow(scene):
    view = replace(scene.view(Access.QUERY_FREE), dropout=0.3)
    keep = torch.rand(view.observed.shape, generator=torch.Generator().manual_seed(0)) >= 0.3
    cleaner = Cleaner(view, view.observed * keep)
    whole = Cleaner(replace(view, dropout=0.0), view.observed)
    assert cleaner.after_relu
    spread = whole.offset.std()
    assert (cleaner.offset - whole.offset).abs().mean() < 0.2 * spread
    sent = cleaner.sent(torch.full_like(view.observed, 0.5)) + cleaner.offset
    assert float((sent == 0).float().mean()) == pytest.approx(0.3, abs=0.02)


def test_an_eye_that_saw_images_turns_reflected_colours_back(random):
    # Mostly dark patches, and a few that are bright in one colour: no reflection leaves that as it is.
    patches = 255 * torch.rand(400, 3, 4, 4, generator=random) ** 3
    images = patches.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8)
    eye = train_eye(images[:300], 200, torch.Generator().manual_seed(0))
    shown = pixels(images[300:])
    assert eye.turned(shown) == 0
    for which in range(1, 8):
        reflected = eye.colours.reflected(shown, which)
        assert eye.turned(reflected) == which
        assert torch.allclose(eye.colours.reflected(reflected, which), shown, atol=1e-5)
    larger = torch.nn.functional.interpolate(shown, (48, 80))
    assert eye.turned(larger) == 0


def test_a_head_that_is_reflected_sees_of_an_image_what_it_saw_of_the_reflected_one(scene):
    view = scene.view(Access.QUERY_FREE)
    cleaner = Cleaner(replace(view, noise_std=0.0), view.observed)
    head = Shadow(view, cleaner, known_head, torch.Generator().manual_seed(0))
    colours = Colours(view.auxiliary)
    other = head.copied()
    other.reflect(colours.reflections[1])
    images = pixels(scene.evaluated)
    with torch.no_grad():
        was = head.arriving(255 * colours.reflected(images, 1))
        now, before = other.arriving(255 * images), head.arriving(255 * images)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # the padding is black in both
    assert (now - was)[inner].abs().mean() < 0.1 * (before - was)[inner].abs().mean()


def test_a_head_is_turned_when_the_eye_says_so(scene, monkeypatch):
    view = scene.view(Access.QUERY_FREE)
    asked = iter((5, 0))
    eye = train_eye(view.auxiliary, 1, torch.Generator().manual_seed(0))
    monkeypatch.setattr(matching, "train_eye", lambda *_: eye)
    monkeypatch.setattr(eye, "turned", lambda _: next(asked))
    turned = []
    monkeypatch.setattr(Shadow, "reflect", lambda _, colours: turned.append(colours))
    assert matching.matched(replace(view, notes={}), TINY).attempts[0].turns == (5, 0)
    assert torch.equal(turned[0], eye.colours.reflections[5])


def test_a_second_attack_by_matching_has_the_head_at_once_and_leaves_it_alone(scene):
    view = scene.view(Access.QUERY_FREE)
    ticks = []
    plan = replace(TINY, seed=7, tick=ticks.append)
    first = matched(view, plan)
    before = {name: value.clone() for name, value in first.head.head.state_dict().items()}
    searched = len(ticks)
    ATTACKS["distribution-matching-critic"].run(view, plan)
    assert ticks.count("matching") == searched
    assert matched(view, plan) is first
    assert all(torch.equal(value, before[name]) for name, value in first.head.head.state_dict().items())
    assert matched(scene.view(Access.DEVICE), plan) is not first  # another attacker has to find it again


def test_the_clients_own_head_is_nearer_than_any_other(scene):
    view = scene.view(Access.QUERY_FREE)
    cleaner = Cleaner(view, view.observed)
    target = Moments(cleaner.clean(view.observed))
    own = target.distance_of_all([cleaner.clean(scene.arrived)])
    other = Shadow(view, cleaner, known_head, torch.Generator().manual_seed(0))
    assert own < other.distance(target) / 3


def test_the_distance_of_many_batches_is_that_of_their_mean_and_small_for_the_same_source(scene):
    view = scene.view(Access.QUERY_FREE)
    cleaner = Cleaner(view, view.observed)
    clean = cleaner.clean(view.observed)
    target = Moments(clean)
    parts = torch.split(clean, len(clean) // 2)
    assert target.distance_of_all(parts) < 1e-3  # what the target was made from
    alone = [float(target.distance(part)) for part in parts]
    assert target.distance_of_all(parts) < min(alone)
    assert target.chance > 0
    ragged = [*parts, parts[0][:5]]
    assert target.distance_of_all(ragged) == target.distance_of_all(parts)


def test_a_channel_that_says_nothing_does_not_outshout_the_others(scene):
    view = scene.view(Access.QUERY_FREE)
    quiet = view.observed.clone()
    quiet[:, 0] = 0.5
    quiet[0, 0, 0, 0] += view.wire.feature_codec.scale  # as once in a thousand images
    cleaner = Cleaner(view, quiet)
    assert cleaner.heard.flatten().tolist() == [False] + [True] * (quiet.shape[1] - 1)
    target = Moments(cleaner.clean(quiet))
    shadow = Shadow(view, cleaner, known_head, torch.Generator().manual_seed(0))
    whole = Cleaner(view, view.observed)
    usual = Shadow(view, whole, known_head, torch.Generator().manual_seed(0))
    assert shadow.distance(target) < 2 * usual.distance(Moments(whole.clean(view.observed)))
    assert not shadow.sent()[:, 0].any()


def test_a_decoder_is_not_outshouted_by_a_channel_that_was_silent_where_it_learned(random):
    coarse = torch.rand(60, 3, 4, 4, generator=random)
    images = (255 * nn.functional.interpolate(coarse, (16, 16), mode="nearest")).to(torch.uint8)
    features = torch.cat([coarse, torch.zeros(60, 1, 4, 4)], 1)
    decoder = Decoder((4, 4, 4), (16, 16), 4).eval()
    decoder.fit_linear(features, images, 1e-6)
    features[:, 3, 0, 0] += 0.02
    assert float(ssim(painted(decoder, features), pixels(images)).mean()) > 0.9


def test_matching_comes_nearer(scene):
    view = scene.view(Access.QUERY_FREE)
    cleaner = Cleaner(view, view.observed)
    target = Moments(cleaner.clean(view.observed))
    head = Shadow(view, cleaner, known_head, torch.Generator().manual_seed(0))
    before = head.distance(target)
    head.match(target, 40, 0.05, 0.02, TINY)
    assert head.distance(target) < before / 2


# --- the selector ---


@pytest.mark.parametrize(
    ("scores", "selected", "wanted"),
    [([3, 1, 2, 0], [0, 2], 1.0), ([3, 1, 2, 0], [1, 3], 0.0), ([1, 1, 1], [0], 0.5), ([2, 1], [0, 1], 0.5)],
)
def test_the_auc_counts_pairs_that_are_ranked_rightly(scores, selected, wanted):
    assert auc(scores, selected) == wanted


def test_a_net_that_is_fed_what_it_was_trained_on_is_ranked_first(scene):
    view = scene.view(Access.QUERY_FREE)
    mine = view.bodies[1]
    norms = [m for m in mine.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [(m.running_mean.clone(), m.running_var.clone(), m.num_batches_tracked.clone()) for m in norms]
    try:
        for norm in norms:
            norm.momentum = None
            norm.reset_running_stats()
        with torch.no_grad():
            mine.train()(view.observed)
        mine.eval()
        scores = rankings(view)
    finally:
        for norm, (mean, var, count) in zip(norms, kept, strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
            norm.num_batches_tracked.copy_(count)
            norm.momentum = 0.1
    assert max(range(3), key=scores["batch norm"].__getitem__) == 1
    assert all(len(values) == 3 for values in scores.values())


def test_a_client_that_selects_all_nets_has_nothing_to_recover(scene):
    assert audits._selector(replace(scene, selector=(0, 1, 2))) == {}
    found = audits._selector(scene)
    assert all(0 <= way["auc"] <= 1 and way["first"] in (True, False) for way in found.values())


# --- the audit ---


@pytest.fixture
def run_audit(tiny, audit_images, tiny_budget):
    """Returns a function that audits the tiny client in a moment."""
    return lambda out, **options: audit(
        tiny.run, tiny.client, out, **({"budget": "quick", "data": audit_images} | options)
    )


def test_an_audit_leaves_a_page_and_its_json_and_nothing_else(run_audit, tmp_path):
    document = run_audit(tmp_path / "report.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    # Both show how the nets rank, from which whoever has the nets finds the selector; one shows images.
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    assert json.loads((tmp_path / "report.json").read_text()) == document
    means = [row["ssim"]["mean"] for row in document["attacks"]]
    assert means == sorted(means, reverse=True)
    assert {row["name"] for row in document["attacks"]} | {item["name"] for item in document["not_run"]} == set(ATTACKS)
    assert "distribution-matching" in {row["name"] for row in document["attacks"]}
    assert document["subject"]["digests"].keys() >= {"head.onnx", "tail.onnx", "manifest.json"}
    assert document["verdict"]["sentence"] in (tmp_path / "report.html").read_text()


def test_nothing_in_the_report_names_the_selector_or_the_noise(run_audit, tmp_path, scene):
    def kept(pairs):
        """How an attack's starts were turned and mirrored, [0, 1] say, looks like a selector and is none."""
        return {key: value for key, value in pairs if key != "turns"}

    document = json.dumps(run_audit(tmp_path / "report.html"))
    text = json.dumps(json.loads(document, object_pairs_hook=kept))
    assert str(list(scene.selector)) not in text
    assert not any(key in document for key in ("positions", "noise_values", "client_seed"))


def test_an_audit_that_was_interrupted_goes_on_with_what_is_done(run_audit, tmp_path, monkeypatch):
    ran = []

    class Broken:
        NAME, ACCESS, SOURCE, WORDS = ORACLE, Access.DEVICE, "test", "test"

        def ticks(self, plan):
            return 0

        def run(self, view, plan):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(ATTACKS, ORACLE, Broken())
        with pytest.raises(KeyboardInterrupt):
            run_audit(tmp_path / "report.html")
    assert stat.S_IMODE((tmp_path / "report.parts").stat().st_mode) == 0o700  # it holds reconstructions
    original = audits._score
    monkeypatch.setattr(audits, "_score", lambda attack, *rest: (ran.append(attack.NAME), original(attack, *rest))[1])
    run_audit(tmp_path / "report.html")
    assert ran == [ORACLE]
    assert not (tmp_path / "report.parts").exists()


def test_an_audit_goes_on_where_the_same_bundle_lies_in_another_folder(tiny, run_audit, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    with monkeypatch.context() as patch:
        patch.setattr(audits, "write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_audit(out)
    copied = shutil.copytree(tiny.client, tmp_path / "copied")
    monkeypatch.setattr(audits, "_score", lambda *_: pytest.fail("it is done already"))
    monkeypatch.setattr(tiny.__class__, "client", property(lambda _: copied))
    assert run_audit(out)["subject"]["bundle"] == str(copied)


def test_parts_of_another_audit_are_not_taken(run_audit, scene, tmp_path):
    parts = audits._Parts(tmp_path / "report.parts", {"subject": "another"})
    score = audits._score(ATTACKS[FLOOR], scene, audits.Judge(scene), TINY, 0, audits.Silent())
    parts.write(score)
    assert parts.read(FLOOR, 0) is not None
    (tmp_path / "report.parts" / f"{ORACLE}-0.npz").write_bytes(b"damaged")
    document = run_audit(tmp_path / "report.html")
    assert len(document["attacks"]) >= 4


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_part_that_was_cut_short_is_made_again(tmp_path, share):
    parts = Parts(tmp_path / "parts", {"of": "this"})
    parts.write("piece", {"a": 1}, {"numbers": np.arange(1000)})
    path = tmp_path / "parts" / "piece.npz"
    whole = path.read_bytes()
    assert parts.read("piece")[0] == {"a": 1}
    path.write_bytes(whole[: int(share * len(whole))])
    assert parts.read("piece") is None


def test_what_was_done_with_another_effort_is_not_taken(run_audit, tmp_path, monkeypatch):
    out, ran = tmp_path / "report.html", []
    with monkeypatch.context() as patch:
        patch.setattr(audits, "write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_audit(out)
    longer = {name: replace(each, plan=replace(each.plan, bound_length=2)) for name, each in audits.BUDGETS.items()}
    monkeypatch.setattr(audits, "BUDGETS", longer)
    original = audits._score
    monkeypatch.setattr(audits, "_score", lambda attack, *rest: (ran.append(attack.NAME), original(attack, *rest))[1])
    run_audit(out)
    assert ORACLE in ran


def row(name, value, access=1, frames=1):
    return {"name": name, "access": access, "control": access == 0, "ssim": {"mean": value}, "frames": frames}


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({FLOOR: 0.1, ORACLE: 0.9, "distribution-matching": 0.8}, "readable"),
        ({FLOOR: 0.1, ORACLE: 0.4, "distribution-matching": 0.2}, "recognisable"),
        ({FLOOR: 0.1, ORACLE: 0.25, "distribution-matching": 0.2}, "obscured"),
        ({FLOOR: 0.1, ORACLE: 0.1, "distribution-matching": 0.1}, "inconclusive"),  # an oracle that learned nothing
        ({FLOOR: 0.1, ORACLE: 0.15, "distribution-matching": 0.29}, "inconclusive"),  # beaten by who knows less
        ({FLOOR: 0.1, ORACLE: 0.2, "distribution-matching": 0.6}, "readable"),  # a leak that was seen needs no oracle
    ],
)
def test_the_verdict_is_the_strongest_attacks_and_a_low_one_needs_sound_attacks(values, word):
    rows = [row(name, value, {FLOOR: 0, ORACLE: Access.DEVICE}.get(name, 1)) for name, value in values.items()]
    verdict = audits._verdict(rows, audits._gates(rows, []))
    assert verdict["word"] == word
    assert verdict["ssim"] == max(values[name] for name in values if name != FLOOR)
    assert f"A server alone reaches {values['distribution-matching']:.2f}" in verdict["sentence"]


def failed(about):
    return {"about": about, "name": "x", "passed": False, "words": "y"}


@pytest.mark.parametrize(("value", "doubted"), [(-0.4, True), (-0.02, False)])
def test_reconstructions_that_are_negatives_put_their_low_figure_in_doubt(value, doubted, scene):
    score = audits._score(ATTACKS[FLOOR], scene, audits.Judge(scene), TINY, 0, audits.Silent())
    score = replace(score, name="distribution-matching", ssim=np.full_like(score.ssim, value))
    rows = [row(FLOOR, 0.1, 0), row(ORACLE, 0.9, Access.DEVICE), row(score.name, value)]
    gates = audits._gates(rows, [score])
    assert any("no negatives" in gate["name"] and not gate["passed"] for gate in gates) == doubted
    assert ("is inconclusive" in audits._verdict(rows, gates)["sentence"]) == doubted


@pytest.mark.parametrize(
    ("oracle", "own", "passed"),
    [(0.9, 0.75, True), (0.9, 0.65, False), (0.22, 0.17, True), (0.22, 0.15, False), (0.22, 0.03, False)],
)
def test_a_decoder_that_does_no_better_than_the_mean_image_has_not_inverted_its_head(oracle, own, passed, scene):
    score = audits._score(ATTACKS[FLOOR], scene, audits.Judge(scene), TINY, 0, audits.Silent())
    score = replace(score, name="distribution-matching", seen={OWN_SSIM: [own]})
    rows = [row(FLOOR, 0.12, 0), row(ORACLE, oracle, Access.DEVICE), row(score.name, 0.1)]
    (gate,) = (each for each in audits._gates(rows, [score]) if "inverts its own head" in each["name"])
    assert gate["passed"] == passed


def test_a_verdict_about_some_operators_says_so():
    rows = [row(FLOOR, 0.1, 0), row(ORACLE, 0.25, Access.DEVICE)]
    assert "operators 1 of 2 share" in audits._verdict(rows, [], "1 of 2 share what they see")["sentence"]


def test_an_attack_that_went_wrong_puts_what_a_server_reaches_in_doubt_and_not_the_oracle():
    rows = [row(FLOOR, 0.1, 0), row(ORACLE, 0.25, Access.DEVICE), row("distribution-matching", 0.15)]
    verdict = audits._verdict(rows, [failed("distribution-matching")])
    assert verdict["word"] == "obscured"  # the oracle has more than the attack that failed
    assert "What a server alone reaches is inconclusive: distribution-matching reaches 0.15" in verdict["sentence"]
    assert audits._verdict(rows, [failed("audit")])["word"] == "inconclusive"
    require_ssim({"verdict": verdict, "gates": [failed("distribution-matching")], "attacks": []}, 0.3)
    with pytest.raises(GateFailedError, match="the audit is inconclusive"):
        require_ssim({"verdict": verdict, "gates": [failed("audit")], "attacks": []}, 0.3)


def test_the_best_of_several_variants_counts_and_is_labelled(scene):
    class Two:
        NAME, ACCESS, SOURCE, WORDS = "two", Access.QUERY_FREE, "test", "test"

        def ticks(self, plan):
            return 0

        def run(self, view, plan):
            grey = torch.full((1, 3, 16, 16), 0.5)
            truth = pixels(scene.evaluated)
            return Finding(
                variants={"grey": lambda f: grey.expand(len(f), -1, -1, -1), "all": lambda f: truth[: len(f)]}
            )

    score = audits._score(Two(), scene, audits.Judge(scene), TINY, 0, audits.Silent())
    assert score.ssim.mean() == pytest.approx(1)
    assert score.chosen
    assert score.seen["ssim_of_variants"][0] == pytest.approx(1)
    assert score.reidentified.all()
    assert score.same_class.all()


class _Strays:
    """An attack that diverges: with every seed, or with all but the first."""

    NAME, ACCESS, SOURCE, WORDS = "known-pairs-10", Access.DEVICE, "test", "test"

    def __init__(self, fewest):
        self.fewest = fewest

    def ticks(self, plan):
        return 0

    def run(self, view, plan):
        value = torch.nan if plan.seed >= self.fewest else 0.5
        return Finding(variants={"": lambda f: torch.full((len(f), 3, 16, 16), value)})


@pytest.mark.parametrize("fewest", [0, 1])
def test_an_attack_that_diverges_has_no_figure_and_is_no_proof(run_audit, tmp_path, monkeypatch, fewest):
    monkeypatch.setitem(ATTACKS, _Strays.NAME, _Strays(fewest))
    found = run_audit(tmp_path / "report.html", attacks=[_Strays.NAME], seeds=2)
    assert "NaN" not in json.dumps(found)
    rows = [row for row in found["attacks"] if row["name"] == _Strays.NAME]
    whys = {left["name"]: left["why"] for left in found["not_run"]}
    doubts = [gate for gate in found["gates"] if gate["about"] == _Strays.NAME and not gate["passed"]]
    if fewest:
        assert len(rows) == len(doubts) == 1
        assert _Strays.NAME not in whys
    else:
        assert not rows
        assert "did not converge" in whys[_Strays.NAME]


def test_a_bound_that_diverges_ends_the_audit(run_audit, tmp_path, monkeypatch):
    monkeypatch.setitem(ATTACKS, ORACLE, _Strays(0))
    with pytest.raises(DivergedError, match="did not converge"):
        run_audit(tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_each_measure_is_of_the_variant_that_is_best_by_it(scene):
    truth = pixels(scene.evaluated)
    sharp = (truth + 0.4).clamp(0, 1)  # alike in structure, and far away

    class Two:
        NAME, ACCESS, SOURCE, WORDS = "two", Access.QUERY_FREE, "test", "test"

        def ticks(self, plan):
            return 0

        def run(self, view, plan):
            near = nn.functional.avg_pool2d(truth, 3, 1, 1)
            return Finding(variants={"sharp": lambda f: sharp[: len(f)], "near": lambda f: near[: len(f)]})

    score = audits._score(Two(), scene, audits.Judge(scene), TINY, 0, audits.Silent())
    assert float(score.ssim.mean()) == pytest.approx(float(ssim(sharp, truth).mean()), abs=1e-4)
    assert float(score.psnr_db.mean()) > float(psnr_db(sharp, truth).mean()) + 3


def test_a_search_through_one_of_several_learned_tensors_takes_their_mean(scene):
    view = scene.view(Access.WHITE_BOX)
    several = copy.deepcopy(view.client)
    several.perturbation = Perturbation(noise="learned", std=0.1, fresh=True)
    several.noise = several.noise.expand(several.perturbation.tensors, *several.noise.shape).clone()
    images = [
        ATTACKS["mla"].run(replace(view, client=c), TINY).variants[""](scene.arrived[:2])
        for c in (view.client, several)
    ]
    assert torch.allclose(*images, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "huge"}, "--budget huge: choose quick, standard, thorough"),
        ({"attacks": ["magic"]}, "--attack magic: choose mean-image"),
        ({"seeds": 0}, "--seeds 0"),
    ],
)
def test_impossible_options_are_refused(run_audit, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run_audit(tmp_path / "report.html", **options)


def test_every_budget_has_the_floor_the_oracle_and_the_strongest_attack():
    for budget in BUDGETS.values():
        assert isinstance(budget, Budget)
        assert {FLOOR, ORACLE, "distribution-matching"} <= set(budget.attacks) <= set(ATTACKS)


# --- the command line ---


def test_audit_from_a_run_exports_it_first_and_prints_the_verdict(tiny, audit_images, tiny_budget, tmp_path, capsys):
    out = tmp_path / "report.html"
    command = ["audit", str(tiny.run), "--data", audit_images, "--budget", "quick", "--out", str(out), "--json"]
    assert main(command) == 0
    printed = capsys.readouterr()
    document = json.loads(out.with_suffix(".json").read_text())
    assert json.loads(printed.out)["verdict"] == document["verdict"]
    assert "exporting the run" in printed.err
    assert document["subject"]["bundle"] == "an int8 client of the run, exported for this audit and not kept"
    assert "ensembler-audit-" not in out.read_text() + out.with_suffix(".json").read_text()


def test_audit_of_a_bundle_names_what_it_needs(tiny, tmp_path, capsys):
    assert main(["audit", str(tiny.client)]) == 2
    assert "a bundle needs --run RUN" in capsys.readouterr().err
    assert main(["audit", str(tiny.run), "--run", str(tiny.run)]) == 2
    assert "--run goes with a client bundle" in capsys.readouterr().err
    assert main(["audit", str(tiny.client), "--run", str(tiny.run), "--out", str(tmp_path / "report.pdf")]) == 2
    assert "ends in .html" in capsys.readouterr().err
    assert main(["audit", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_audit_refuses_what_is_no_other_device_before_it_exports_the_run(tiny, tmp_path, capsys):
    assert main(["audit", str(tiny.run), "--other-device", str(tmp_path)]) == 1
    assert main(["audit", str(tiny.run), "--other-device", str(tiny.run)]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path} is no bundle, or incomplete" in said
    assert f"{tiny.run} is a run of ensembler train and no bundle" in said
    assert "exporting" not in said


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--budget", "hasty"), "--budget hasty: choose"),
        (("--attack", "telepathy"), "--attack telepathy: choose"),
        (("--seeds", "0"), "--seeds 0: at least one"),
        (("--operators", "one"), "--operators one: give numbers"),
        (("--device", "abacus"), "abacus"),
        (("--out", "report.pdf"), "ends in .html"),
        (("--aux", "mine"), "--aux mine: choose disjoint or train"),
        (("--operators", "2"), "has one operator, who is sent everything; leave it out"),
    ],
)
def test_audit_refuses_what_is_wrong_before_it_exports_the_run(tiny, capsys, option, words):
    assert main(["audit", str(tiny.run), *option]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert "exporting" not in printed.out + printed.err


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("note/report.html", "note is not a folder"),
        ("note/sub/report.html", "note is not a folder"),
        ("nowhere/report.html", "nowhere is not a folder"),
        ("taken.html", "taken.html is a folder"),
        ("numbers.html", "numbers.json is a folder"),
    ],
)
def test_a_report_that_has_no_place_is_refused_before_the_hours_that_it_takes(tmp_path, place, words):
    (tmp_path / "note").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name in ("taken.html", "numbers.json"):
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=rf"--out .*: cannot be written, .*{words}; give a file in a folder of yours"):
        audits.chosen_attacks(tmp_path / place, budget="quick", attacks=None, seeds=None)
