"""The boundary of C2PI: pieces of nets and their inverses, Algorithm 1 at its edges, a search that goes on."""

from __future__ import annotations

import json
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from ensembler.cli import main
from ensembler.privacy import boundary_picture, boundary_study
from ensembler.privacy.attacks import inversion
from ensembler.privacy.attacks.base import AttackImpossibleError
from ensembler.privacy.attacks.inverse import inner_blocks
from ensembler.privacy.attacks.inversion import (
    KINDS,
    build_inverse,
    coefficients,
    noised,
    sub_blocks,
    train_inversion,
    whole_front,
)
from ensembler.privacy.boundary import crypto_clear_boundary, find_boundary
from ensembler.privacy.boundary_study import BoundaryOptions, layers_of, plain_net
from ensembler.privacy.decoder import Effort, pixels
from ensembler.protocol.errors import ConfigError, DataError
from ensembler.training.fit import Silent
from ensembler.training.models import ArchSpec, Bottleneck, build_net, normalise, traced_net
from ensembler.training.runs import RunFolder
from ensembler.training.stage1 import load_stage1
from ensembler.training.stages import train

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = "own_nets:sequential"
BRIEF = Effort(steps=2, width=8, ssim_weight=0.0)


@cache
def net_of(arch, size=32):
    torch.manual_seed(0)
    net = traced_net(ArchSpec(name=arch, image_size=(size, size), num_classes=10))
    net.module.eval()
    return net


def blots(count, seed, size=16):
    """Smooth images, of which a few features tell much: (count, 3, size, size) uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, 3, 4, 4), generator=generator)
    return (255 * functional.interpolate(coarse, (size, size), mode="bilinear")).to(torch.uint8)


def trained_inverse(kind, front, images, effort, noise, *, seed, **options):
    """What train_inversion makes of a front whose features have noise."""
    maps_of = front.noisy(noise, torch.Generator().manual_seed(seed))
    return train_inversion(kind, front.shapes, maps_of, images, effort, seed=seed, **options)


# --- layers and pieces ---


@pytest.mark.parametrize(("arch", "convolutions"), [("alexnet", 5), ("vgg16", 13)])
def test_the_papers_nets_have_its_numbers_and_its_half_numbers(arch, convolutions):
    layers = layers_of(net_of(arch), arch)
    assert [layer.number for layer in layers] == [1 + place / 2 for place in range(2 * convolutions)]
    assert [layer.cut.names[0] for layer in layers[:4]] == ["conv1", "relu1", "conv2", "relu2"]


def test_other_nets_have_their_cuts_counted():
    layers = layers_of(net_of(OWN), OWN)
    assert [layer.number for layer in layers] == list(range(1, 10))
    assert [layer.cut.names[0] for layer in layers] == [str(place) for place in range(9)]


PIECES = [
    ("alexnet", "conv1", [(32, 16, 16)]),
    ("alexnet", "relu3", [(32, 16, 16), (96, 8, 8), (192, 4, 4)]),
    ("alexnet", "conv4", [(32, 16, 16), (96, 8, 8), (192, 4, 4), (128, 4, 4)]),
    ("vgg16", "relu4", [(32, 32, 32), (32, 32, 32), (64, 16, 16), (64, 16, 16)]),
    ("vgg16", "pool1", [(32, 32, 32), (32, 32, 32), (32, 16, 16)]),
    (OWN, "5", [(8, 32, 32), (16, 8, 8)]),
    (OWN, "7", [(8, 32, 32), (16, 8, 8), (16, 1, 1)]),
    ("resnet10_slim", "layer2", [(16, 32, 32), (16, 16, 16), (32, 8, 8)]),
]


@pytest.mark.parametrize(("arch", "cut", "shapes"), PIECES)
def test_a_net_is_divided_after_each_relu_that_one_tensor_crosses(arch, cut, shapes):
    net = net_of(arch)
    front = sub_blocks(net, cut)
    assert front.shapes == ((3, 32, 32), *shapes)
    x = torch.randn(2, 3, 32, 32)
    maps = front.maps(x)
    assert [tuple(found.shape[1:]) for found in maps] == shapes
    assert all(float(found.min()) >= 0 for found in maps[:-1])
    assert torch.equal(maps[-1], whole_front(net, cut).maps(x)[-1])
    if arch != "resnet10_slim":  # whose blocks have a second one inside, where two tensors cross
        assert all(sum(isinstance(m, nn.ReLU) for m in piece.modules()) <= 1 for piece in front.pieces)


def test_the_papers_resnet_is_divided_at_its_blocks():
    front = sub_blocks(net_of("resnet18"), "layer2")
    assert front.shapes[1:] == ((64, 32, 32), (64, 16, 16), (64, 16, 16), (128, 8, 8), (128, 8, 8))


def test_a_net_without_a_relu_cannot_be_divided():
    with pytest.raises(AttackImpossibleError, match="divides a net at its ReLUs, and this one has none"):
        sub_blocks(net_of("vit_small"), "blocks.0")


NARROW = Bottleneck(channels=8, stride=2, bits=2)
HEADS = [
    ({"name": "resnet10_slim"}, [(16, 32, 32)]),  # the paper's h = 1: up to the ReLU, then the pooling that is sent
    ({"name": "alexnet", "head_end": "conv1"}, []),
    ({"name": "alexnet", "head_end": "relu3"}, [(32, 16, 16), (96, 8, 8)]),
    (
        {"name": "alexnet", "head_end": "relu3", "bottleneck": NARROW},
        [(32, 16, 16), (96, 8, 8), (192, 4, 4)],
    ),
    ({"name": "alexnet", "head_end": "pool1", "bottleneck": NARROW}, [(32, 16, 16), (32, 8, 8)]),
]


@pytest.mark.parametrize(("changes", "shapes"), HEADS)
def test_dina_distils_at_what_the_head_has_inside(changes, shapes):
    torch.manual_seed(1)
    arch = ArchSpec(**({"image_size": (32, 32), "num_classes": 10} | changes))
    head = build_net(arch).head.eval()
    inside = inner_blocks(head, arch)
    assert inside.shapes == ((3, 32, 32), *shapes)
    seen = []
    for module in head.modules():
        module.register_forward_hook(lambda module, given, returned: seen.append(returned))
    x = torch.randn(2, 3, 32, 32)
    head(x)
    assert all(any(torch.equal(found, other) for other in seen) for found in inside.maps(x))


def test_dina_says_of_a_head_without_a_relu_that_it_is_impossible():
    arch = ArchSpec(name="vit_small", image_size=(32, 32), num_classes=10)
    with pytest.raises(AttackImpossibleError, match="divides a net at its ReLUs, and this one has none"):
        inner_blocks(build_net(arch).head, arch)


def test_a_chain_of_cuts_is_the_net_and_must_be_in_order():
    net = net_of("alexnet")
    x = y = torch.randn(2, 3, 32, 32)
    for part in net.chain(["relu1", "conv2", "pool3"]):
        y = part(y)
    assert torch.equal(y, net.module(x))
    with pytest.raises(ConfigError, match="relu1 does not come after"):
        net.chain(["conv2", "relu1"])
    with pytest.raises(ConfigError, match="no part 'relu9'"):
        net.chain(["relu9"])


# --- the inverse ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("arch", "cut"), [("alexnet", "conv4"), (OWN, "7"), ("resnet10_slim", "layer2")])
def test_an_inverse_gives_images_and_dina_the_maps_between(kind, arch, cut):
    front = sub_blocks(net_of(arch), cut)
    inverse = build_inverse(kind, front.shapes, 8)
    features = torch.randn(2, *front.shapes[-1])
    stations = [found.detach() for found in inverse.stations(features)]
    wanted = front.shapes[:-1] if kind == "dina" else front.shapes[:1]
    assert [tuple(found.shape[1:]) for found in stations] == list(wanted)
    assert 0 <= float(stations[0].min()) <= float(stations[0].max()) <= 1
    assert inverse.train()(features).shape == (2, 3, 32, 32)


def test_an_inverse_of_a_map_that_does_not_divide_the_image_gives_images_all_the_same():
    assert build_inverse("eina", ((3, 30, 20), (4, 7, 5)), 8)(torch.randn(2, 4, 7, 5)).shape == (2, 3, 30, 20)


def test_coefficients_are_the_papers():
    assert coefficients(0) == (1,)
    assert coefficients(5, "c1") == (1, 3, 6, 12, 24, 48)
    assert coefficients(3, "c2") == (1, 1, 1, 1)
    with pytest.raises(ConfigError, match="choose c1 or c2"):
        coefficients(1, "c3")


def test_noise_is_uniform_and_fresh():
    zeros = torch.zeros(100, 100)
    first, second = (noised(zeros, 0.5, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert 0.49 < float(first.max()) <= 0.5
    assert -0.5 <= float(first.min()) < -0.49
    assert float(first.std()) == pytest.approx(0.5 / 3**0.5, rel=0.05)
    assert not torch.equal(first, second)
    assert noised(zeros, 0, torch.Generator()) is zeros


TRAINED = Effort(steps=60, width=16, ssim_weight=0.0)


def test_dina_reads_a_shallow_cut_and_learns_the_maps_between():
    front = sub_blocks(net_of(OWN, 16), "5")
    images, judged = blots(80, 1), blots(64, 2)
    brief, trained = (trained_inverse("dina", front, images, effort, 0.02, seed=3) for effort in (BRIEF, TRAINED))
    assert trained.steps == 60
    assert len(trained.held_losses) == 2
    assert all(now < 0.8 * before for now, before in zip(trained.held_losses, brief.held_losses, strict=True))
    features = front.maps(normalise(judged))[-1]
    floor = functional.mse_loss(pixels(images).mean(0).expand(64, -1, -1, -1), pixels(judged))
    assert functional.mse_loss(trained.reconstruct(features), pixels(judged)) < 0.8 * floor


@pytest.mark.parametrize("kind", ["ina", "eina"])
def test_the_plain_inverses_beat_the_mean_image_too(kind):
    images = blots(160, 1)
    trained = trained_inverse(kind, whole_front(net_of(OWN, 16), "5"), images, TRAINED, 0.02, seed=3)
    assert trained.held_losses[0] < 0.8 * float(pixels(images).var(0).mean())


@pytest.mark.parametrize(("scheme", "weights"), [("c1", (1, 3, 6)), ("c2", (1, 1, 1))])
def test_the_loss_is_equation_1(monkeypatch, scheme, weights):
    compared = []

    def instead_of_training(decoder, loss, held, effort, tick):
        decoder.eval()
        with torch.no_grad():
            compared.append((float(loss()), sum(w * term for w, term in zip(weights, held(), strict=True))))
        return 0

    monkeypatch.setattr(inversion, "train_until_flat", instead_of_training)
    same = blots(1, 1).repeat(20, 1, 1, 1)  # so that every batch has the loss of the images that are kept
    trained_inverse("dina", sub_blocks(net_of(OWN, 16), "6"), same, BRIEF, 0.0, seed=1, scheme=scheme)
    assert compared[0][0] == pytest.approx(compared[0][1], rel=1e-4)


def test_the_same_seed_gives_the_same_decoder():
    front, images = sub_blocks(net_of(OWN, 16), "4"), blots(64, 1)
    first, second, other = (trained_inverse("dina", front, images, BRIEF, 0.1, seed=seed) for seed in (1, 1, 2))
    assert first.held_losses == second.held_losses != other.held_losses


def test_unknown_kinds_are_named():
    with pytest.raises(ConfigError, match="attack fina: choose ina, eina, dina"):
        build_inverse("fina", ((3, 8, 8), (4, 8, 8)), 8)


# --- Algorithm 1 ---


@pytest.mark.parametrize(
    ("ssims", "drops", "expected"),
    [
        ([0.9, 0.6, 0.4, 0.2, 0.1], [9, 9, 1, 1, 1], (3, 3)),
        ([0.9, 0.6, 0.4, 0.2, 0.1], [9, 9, 9, 2.6, 2.4], (3, 4)),
        ([0.9, 0.2, 0.4, 0.2, 0.1], [0, 0, 0, 0, 0], (3, 3)),  # what fails once and succeeds deeper has not failed
        ([0.9, 0.8, 0.7, 0.6, 0.5], [0, 0, 0, 0, 0], (None, None)),  # read to the end
        ([0.2, 0.1, 0.1, 0.1, 0.1], [1, 1, 1, 1, 1], (0, 0)),  # never read: the paper's loop would run off
        ([0.2, 0.1, 0.1, 0.1, 0.1], [9, 9, 9, 9, 9], (0, None)),  # noise costs too much everywhere
        ([0.9, 0.6, 0.3, 0.29, 0.1], [9, 9, 9, 2.5, 9], (3, 3)),  # 0.3 is read, a drop of 2.5 accepted
        ([0.9, 0.6, 0.4, 0.2, 0.1], [-1, -1, -1, -0.5, 0], (3, 3)),  # noise may help
    ],
)
def test_algorithm_1_on_made_up_curves(ssims, drops, expected):
    found = crypto_clear_boundary(len(ssims), ssims.__getitem__, drops.__getitem__, 0.3, 2.5)
    assert (found.potential, found.boundary) == expected


def test_algorithm_1_asks_for_no_layer_that_it_does_not_need():
    attacked, tested = [], []
    ssims, drops = [0.9, 0.8, 0.7, 0.2, 0.1], [9, 9, 9, 9, 1]
    found = crypto_clear_boundary(
        5, lambda i: (attacked.append(i), ssims[i])[1], lambda i: (tested.append(i), drops[i])[1], 0.3, 2.5
    )
    assert found.boundary == 4
    assert (attacked, tested) == ([4, 3, 2], [3, 4])


# --- the search ---


@pytest.fixture(scope="module")
def plain(tiny_data, configs, tmp_path_factory):
    """A run of an own net without a defence, hardly trained."""
    out = tmp_path_factory.mktemp("plain") / "run"
    config = configs(data=tiny_data, defense="none", epochs_stage1=1)(arch=OWN, head_end="3")
    train(config, out)
    return out


@pytest.fixture
def options():
    return lambda **changes: BoundaryOptions(**({"effort": BRIEF, "layers": (3, 6), "ssim_threshold": 1.0} | changes))


@pytest.fixture
def made_up(monkeypatch):
    """``made_up({(attack, layer): SSIM})`` in place of attacks; returns the list of those that were run."""

    def of(table):
        ran = []

        def run(self, kind, layer):
            ran.append((kind, layer.number))
            value = table.get((kind, layer.number), table.get(kind, 0.1))
            if isinstance(value, BaseException):
                raise value
            return torch.full((4,), value), 7

        monkeypatch.setattr(boundary_study.Study, "_run", run)
        return ran

    return of


def test_the_whole_net_of_a_run_is_the_net_that_was_trained(plain):
    run = RunFolder.open(plain)
    x = torch.randn(4, 3, 16, 16)
    assert torch.allclose(plain_net(run).module(x), load_stage1(run)[0].logits(x), atol=1e-6)


def test_a_search_writes_figures_and_a_picture(plain, options, tmp_path):
    out = tmp_path / "boundary.json"
    boundary = find_boundary(plain, out, options(idpa="strongest", max_accuracy_drop_points=100.0))
    assert json.loads(out.read_text()) == json.loads(json.dumps(boundary.to_dict()))
    assert boundary.potential == boundary.boundary == 3
    shallow, deep = boundary.depths
    assert (shallow.layer, shallow.name, shallow.feature_shape, shallow.feature_bytes) == (3, "2", (8, 16, 16), 2048)
    assert deep.feature_bytes == 16 * 4 * 4
    assert shallow.head_flops == 2 * 8 * 16 * 16 * 27
    assert 0 < shallow.head_share < deep.head_share <= 1
    assert min(shallow.front_ms, deep.front_ms) > 0
    for depth in boundary.depths:
        assert depth.ssim.keys() == {"ina", "eina", "dina", "mla"}
        assert depth.highest_ssim == max(depth.ssim.values())
        assert 0 <= depth.accuracy <= 100
    assert boundary.subject["judged"] == 32
    assert boundary.subject["auxiliary"] == 64
    assert "3 *" in boundary.text()
    assert "Boundary: layer 3 (2)" in boundary.text()
    with Image.open(out.with_suffix(".png")) as picture:
        assert min(picture.size) > 400


def test_another_threshold_costs_no_attack(plain, options, made_up, tmp_path):
    ran = made_up({("dina", 3.0): 0.5, ("dina", 6.0): 0.2})
    out = tmp_path / "boundary.json"
    first = find_boundary(plain, out, options(ssim_threshold=0.3, max_accuracy_drop_points=100.0))
    second = find_boundary(plain, out, options(ssim_threshold=0.6, max_accuracy_drop_points=100.0))
    third = find_boundary(plain, out, options(ssim_threshold=0.1))
    assert (first.boundary, second.boundary, third.boundary) == (6, 3, None)
    assert "0.200 at layer 6, the last one looked at" in third.words
    assert "the first one looked at; the attack may be too weak" in second.words
    assert ran == [("dina", 6), ("dina", 3)]


@pytest.mark.parametrize("change", [{"noise_magnitude": 0.2}, {"seed": 1}, {"effort": Effort(steps=3)}])
def test_what_another_search_measured_is_not_taken(plain, options, made_up, tmp_path, change):
    ran = made_up({})
    find_boundary(plain, tmp_path / "boundary.json", options())
    find_boundary(plain, tmp_path / "boundary.json", options(**change))
    assert len(ran) == 4


def test_a_search_that_was_interrupted_goes_on(plain, options, made_up, tmp_path):
    out = tmp_path / "boundary.json"
    made_up({("dina", 3.0): KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        find_boundary(plain, out, options())
    assert not out.exists()
    ran = made_up({})
    assert find_boundary(plain, out, options()).depths[1].steps == {"dina": 7}
    assert ran == [("dina", 3)]
    for damaged in out.with_suffix(".parts").glob("5-*"):
        damaged.write_bytes(b"damaged")
    find_boundary(plain, out, options())
    assert ran == [("dina", 3), ("dina", 6)]


def test_only_what_the_algorithm_visits_is_attacked_if_so_asked(plain, options, made_up, tmp_path):
    ran = made_up({("eina", 6.0): 0.5})
    found = find_boundary(
        plain, tmp_path / "b.json", options(idpa="eina", ssim_threshold=0.3, layers=None, whole_curve=False)
    )
    assert ran == [("eina", 9), ("eina", 8), ("eina", 7), ("eina", 6)]
    assert found.potential == 7
    assert found.depths[0].highest_ssim is None
    assert found.depths[0].accuracy is None
    assert " -  " in found.text()


def test_noise_that_costs_too_much_everywhere_leaves_no_boundary(plain, options, made_up, tmp_path, monkeypatch):
    made_up({})
    monkeypatch.setattr(boundary_study.Study, "accuracy_drop", lambda self, place: 10.0)
    found = find_boundary(plain, tmp_path / "b.json", options())
    assert (found.potential, found.boundary) == (3, None)
    assert "costs more than 2.5 points of accuracy. All layers belong on the private side" in found.words


def test_the_largest_noise_is_the_last_before_one_that_costs_too_much(plain, options, made_up, tmp_path, monkeypatch):
    made_up({})
    monkeypatch.setattr(boundary_study.Study, "accuracy_drop", lambda self, place: 0.0)
    plain_accuracy = find_boundary(plain, tmp_path / "b.json", options()).accuracy
    curve = [(0.1, plain_accuracy), (0.2, plain_accuracy - 2.5), (0.3, plain_accuracy - 2.6), (0.5, plain_accuracy)]
    monkeypatch.setattr(boundary_study.Study, "noise_curve", lambda self, place: curve)
    found = find_boundary(plain, tmp_path / "b.json", options())
    assert found.largest_noise == 0.2
    assert "Noise of up to 0.2 there keeps the accuracy within 2.5 points" in found.text()
    monkeypatch.setattr(boundary_study.Study, "noise_curve", lambda self, place: curve[2:])
    assert find_boundary(plain, tmp_path / "b.json", options()).largest_noise is None


def test_noise_is_tried_from_a_tenth_of_the_features_spread_to_ten_times_it(plain, options, made_up, tmp_path):
    made_up({})
    found = find_boundary(plain, tmp_path / "b.json", options(max_accuracy_drop_points=100.0))
    magnitudes = [magnitude for magnitude, _ in found.noises]
    assert magnitudes == sorted(magnitudes)
    assert magnitudes[-1] > 50 * magnitudes[0]
    assert found.noises[0][1] == pytest.approx(found.accuracy, abs=5)
    assert found.largest_noise == magnitudes[-1]
    again = find_boundary(plain, tmp_path / "b.json", options(max_accuracy_drop_points=100.0))
    assert again.noises == found.noises


def test_the_strongest_attack_counts_and_an_impossible_one_is_named(plain, options, made_up, tmp_path):
    made_up({"dina": AttackImpossibleError("no ReLU"), "ina": 0.2, "eina": 0.6, "mla": 0.3})
    found = find_boundary(plain, tmp_path / "b.json", options(idpa="strongest", ssim_threshold=0.5))
    assert found.boundary is None
    assert found.depths[0].highest_ssim == pytest.approx(0.6)
    assert found.not_run == {"dina": "no ReLU"}
    assert "dina was not run: no ReLU" in found.text()
    with pytest.raises(AttackImpossibleError, match="no ReLU"):
        find_boundary(plain, tmp_path / "c.json", options(idpa="dina"))


def test_features_that_are_not_finite_do_not_pass_for_private(plain, options, made_up, tmp_path):
    made_up({"dina": float("nan")})
    with pytest.raises(DataError, match=r"layer 6 .* not finite; the net did not train"):
        find_boundary(plain, tmp_path / "b.json", options())


def test_a_picture_that_cannot_be_drawn_costs_a_line_in_the_log(plain, options, made_up, tmp_path, monkeypatch, caplog):
    made_up({})
    monkeypatch.setattr(boundary_picture, "blank_figure", lambda *size: None)
    find_boundary(plain, tmp_path / "b.json", options())
    assert "b.png could not be drawn" in caplog.text
    assert (tmp_path / "b.json").is_file()


def test_several_searches_are_drawn_side_by_side(plain, options, made_up, tmp_path, caplog):
    made_up({})
    found = {
        f"noise {noise}": find_boundary(plain, tmp_path / "b.json", options(noise_magnitude=noise)).to_dict()
        for noise in (0.0, 0.5)
    }
    boundary_picture.draw_side_by_side(found, tmp_path / "both.png")
    with Image.open(tmp_path / "both.png") as picture:
        assert min(picture.size) > 400
    boundary_picture.draw_side_by_side({"broken": {}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert "none.png could not be drawn" in caplog.text


def test_a_bottleneck_is_refused(plain, options, tmp_path):
    shutil.copytree(plain, tmp_path / "run")
    document = json.loads((tmp_path / "run" / "config.json").read_text())
    document["config"]["bottleneck"] = [8, 2, 2]
    (tmp_path / "run" / "config.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="has a bottleneck"):
        find_boundary(tmp_path / "run", tmp_path / "b.json", options())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"idpa": "magic"}, "--idpa magic: choose ina, eina, dina, mla, strongest"),
        ({"ssim_threshold": float("nan")}, "--ssim nan"),
        ({"max_accuracy_drop_points": -1.0}, "--max-drop -1"),
        ({"noise_magnitude": float("inf")}, "--noise inf"),
        ({"images": 3}, "--images 3: 32 are the least"),
        ({"seed": -1}, "--seed -1"),
        ({"scheme": "c3"}, "choose c1 or c2"),
        ({"effort": Effort(steps=0)}, "--steps 0"),
    ],
)
def test_impossible_options_are_refused(options, change, message):
    with pytest.raises(ConfigError, match=message):
        options(**change)


# --- the command line ---


def test_boundary_prints_what_it_writes(plain, tmp_path, capsys):
    out = tmp_path / "boundary.json"
    command = ["boundary", str(plain), "--out", str(out), "--layers", "6", "--steps", "1", "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "oundary: layer 6" in printed or "No boundary" in printed
    assert str(out.with_suffix(".png")) in printed


def test_the_command_line_names_what_is_wrong(plain, tiny_run, tmp_path, capsys, tiny_data):
    few = []
    for name in tiny_data.removeprefix("npz:").split(","):
        few.append(str(tmp_path / name.rsplit("/", 1)[1]))
        with np.load(name) as stored:
            np.savez(few[-1], x=stored["x"][:60], y=stored["y"][:60], label_names=stored["label_names"])
    for arguments, message in [
        ([str(tiny_run)], "was trained with --defense ensembler; a boundary is looked for in one plain net"),
        ([str(tmp_path)], "is not a run folder"),
        ([str(plain), "--layers", "2,2.5"], "2.5 is no layer of own_nets:sequential; valid: 1 (0), 2 (1), 3 (2)"),
        ([str(plain), "--layers", "conv2"], "--layers conv2: give numbers"),
        ([str(plain), "--idpa", "all"], "--idpa all: choose ina"),
        ([str(plain), "--out", "boundary.txt"], "ends in .json"),
        ([str(plain), "--data", "npz:" + ",".join(few)], "60 held-out images are too few to audit with; 96"),
    ]:
        assert main(["boundary", "--out", str(tmp_path / "b.json"), "--device", "cpu", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_ctrl_c_says_that_the_command_goes_on(plain, made_up, tmp_path, capsys):
    made_up({"dina": KeyboardInterrupt()})
    assert main(["boundary", str(plain), "--out", str(tmp_path / "b.json"), "--device", "cpu"]) == 130
    assert "finished layers are kept; the same command goes on" in capsys.readouterr().err


def test_progress_is_told_by_attack_and_layer(plain, options, tmp_path):
    told = []

    class Listening(Silent):
        def begin(self, label, total):
            told.append((label, total))

        def step(self, detail):
            told.append("step")

    find_boundary(plain, tmp_path / "b.json", options(layers=(6,)), reporter=Listening())
    assert told == [("dina at layer 6 (5)", 2), "step", "step"]
