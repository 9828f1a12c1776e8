"""The three stages, the wire between the first and the second, and the run folder that they leave behind."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import random
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn import functional

from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.errors import ConfigError, DataError
from ensembler.training import data as data_sets
from ensembler.training import stages
from ensembler.training.config import TrainConfig
from ensembler.training.fit import Silent, Tensors, accuracy, augment, batches, derived_seed, pick_device
from ensembler.training.fixing import fewest_answer_bits, fewest_bits, fix_wire, mixed_features
from ensembler.training.hiding import Adversary, Hiding, distance_correlation, information_bits
from ensembler.training.impartial import Impartial
from ensembler.training.losses import classification_loss, max_cosine, max_linear_overlap, stage3_loss
from ensembler.training.models import ArchSpec, build_net, feature_shape, normalise
from ensembler.training.perturbation import LEARNED_TENSORS, Perturbation
from ensembler.training.runs import ClientSecret, RunFolder, bodies_digest, module_tensors, restore
from ensembler.training.shredder import learn
from ensembler.training.stage1 import load_stage1, stage1
from ensembler.training.stages import Client, load_bodies, load_client, stage2, stage3, train
from ensembler.training.wire import codec_for, fake_quantise, fake_quantise_answers

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 16
N, P = 3, 2
STD = 0.1


def save_pair(folder, train_count=64, test_count=32, size=SIZE):
    """Stores random images in two classes that a net can tell apart, and returns their ``--data``."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train_count), ("test", test_count)):
        y = np.arange(count) % 2
        x = rng.integers(0, 128, (count, 3, size, size), dtype=np.uint8)
        x[y == 1, 0] += 100
        np.savez(folder / f"{part}.npz", x=x, y=y)
    return f"npz:{folder / 'train.npz'},{folder / 'test.npz'}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def settings(configs, pair):
    """Returns a function that builds the smallest config, with changes."""
    return configs(
        data=pair,
        num_nets=N,
        num_selected=P,
        noise_std=STD,
        epochs_stage1=1,
        epochs_stage3=1,
        learning_rate=0.01,
    )


@pytest.fixture(scope="module")
def run_path(settings, tmp_path_factory):
    """The folder of one finished run, which tests must leave as it is."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(settings(client_seed=11), out)
    return out


@pytest.fixture(scope="module")
def run(run_path):
    return RunFolder.open(run_path)


@pytest.fixture
def copied(run_path, tmp_path):
    """A copy of the run that a test may damage."""
    shutil.copytree(run_path, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def tensors(pair):
    return Tensors.of(data_sets.load(pair), torch.device("cpu"))


def state(module):
    """Returns a module's whole state, buffers too, as comparable bytes."""
    return {name: value.contiguous().numpy().tobytes() for name, value in module.state_dict().items()}


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def metrics(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


# --- stage 1 ---


def test_stage1_noise_is_one_tensor_of_the_features_shape_per_net(run):
    nets = load_stage1(run)
    assert len(nets) == N
    shape = feature_shape(run.arch)
    for item in nets:
        assert item.noise.shape == shape
        assert float(item.noise.std()) == pytest.approx(STD, rel=0.1)
        assert abs(float(item.noise.mean())) < STD / 5
    for i, item in enumerate(nets):
        for other in nets[i + 1 :]:
            correlation = torch.corrcoef(torch.stack([item.noise.flatten(), other.noise.flatten()]))[0, 1]
            assert abs(float(correlation)) < 0.2


@pytest.mark.parametrize("std", [0.0, 0.05, 2.0])
def test_the_noise_has_the_asked_standard_deviation(std):
    noise = Perturbation(std=std).start((64, 32, 32), seed=1)
    assert noise.shape == (64, 32, 32)
    assert float(noise.std()) == pytest.approx(std, rel=0.01)
    assert float(noise.mean()) == pytest.approx(0, abs=0.02 * std)


def test_stage1_nets_are_trained_apart(run):
    heads = [item.net.head.stem.conv.weight.flatten() for item in load_stage1(run)]
    for i, head in enumerate(heads):
        for other in heads[i + 1 :]:
            assert abs(float(functional.cosine_similarity(head, other, dim=0))) < 0.5


def test_the_same_seed_gives_the_same_stage1_bit_for_bit(run, settings, tmp_path):
    again = RunFolder(tmp_path / "again")
    train(settings(client_seed=12), again.path)  # another client, with another selector
    for i in range(N):
        first, second = (folder.load_tensors(run.stage1_file(i)) for folder in (run, again))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_another_stage1(run, settings, tensors, tmp_path):
    other = RunFolder.create(tmp_path / "other", settings(seed=1), run.arch, run.labels)
    nets = stage1(other, settings(seed=1, num_nets=P), run.arch, tensors, Silent())
    assert not torch.equal(nets[0].noise, load_stage1(run)[0].noise)


def test_training_learns_what_can_be_learned(settings, tmp_path):
    summary = train(settings(epochs_stage1=4, epochs_stage3=4, learning_rate=0.05, client_seed=1), tmp_path / "run")
    assert summary["accuracy_wire"] >= 90
    assert summary["accuracy_float"] >= 90


# --- between stages 1 and 2 ---


def test_the_wire_is_fixed_from_stage1_nets_and_images_alone():
    assert list(inspect.signature(fix_wire).parameters) == [
        *("nets", "images", "wire_bits", "answer_bits", "bottleneck", "sizes")
    ]


def test_the_wire_states_what_travels(run):
    wire = run.read_wire()
    assert wire.spec.feature_shape == feature_shape(run.arch)
    assert wire.spec.num_nets == N
    assert wire.spec.answer_width == 128
    assert sorted(wire.order) == list(range(N))


def test_the_order_of_the_bodies_is_drawn_each_time_and_everything_follows_it(run, tensors):
    nets = load_stage1(run)
    drawn = {}
    for _ in range(20):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        wire = fix_wire(nets, tensors.train_x[:8])
        drawn.setdefault(wire.order, wire.spec)
        assert drawn[wire.order] == wire.spec
    assert len(drawn) > 1  # by chance one of 6 orders twenty times: once in 10^14 runs
    assert len({spec.bodies_id for spec in drawn.values()}) == len(drawn)
    assert len({spec.feature_codec for spec in drawn.values()}) == 1
    by_net = {
        tuple(codec for _, codec in sorted(zip(order, spec.answer_codecs, strict=True), key=lambda p: p[0]))
        for order, spec in drawn.items()
    }
    assert len(by_net) == 1


def test_the_wires_range_holds_nearly_all_features_and_answers(run, tensors):
    nets, wire = load_stage1(run), run.read_wire()
    x = normalise(tensors.train_x)
    codec = wire.spec.feature_codec
    for item in nets:
        sent = item.net.head(x) + item.noise
        clipped = (sent < codec.low - codec.scale) | (sent > codec.high + codec.scale)
        assert float(clipped.float().mean()) < 1e-3
    features = mixed_features(nets, codec, tensors.train_x)
    assert features.shape == (len(x), *wire.spec.feature_shape)
    for body, answer_codec in zip(load_bodies(run), wire.spec.answer_codecs, strict=True):
        assert answer_codec.low <= 0
        clipped = body(features) > answer_codec.high + answer_codec.scale
        assert 0 < float(clipped.float().mean()) < 5e-3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_codec_of_few_bits_clips_where_the_squared_error_is_least(bits):
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).relu()

    def error(codec):
        return float((fake_quantise(values, codec) - values).square().mean())

    codec = codec_for(values, 1e-4, bits)
    assert codec.bits == bits
    whole = AffineCodec.from_range(0.0, float(values.max()), bits)
    assert error(codec) < 0.9 * error(whole)
    for factor in (0.9, 1.1):
        assert error(codec) < error(AffineCodec.from_range(0.0, factor * codec.high, bits))


def test_auto_takes_the_fewest_bits_that_cost_the_stage_1_nets_little(run, tensors):
    nets = load_stage1(run)
    assert fewest_bits(nets, tensors.train_x, tensors.train_y, max_drop_points=100.0) == 1
    assert fewest_bits(nets, tensors.train_x, tensors.train_y, max_drop_points=-100.0) == 8


def test_auto_takes_4_bits_for_answers_that_cost_the_stage_1_nets_little(run, tensors):
    nets = load_stage1(run)
    assert fewest_answer_bits(nets, tensors.train_x, tensors.train_y, max_drop_points=100.0) == 4
    assert fewest_answer_bits(nets, tensors.train_x, tensors.train_y, max_drop_points=-100.0) == 8


def test_a_further_client_with_automatic_bits_takes_those_of_its_server(run, settings, tmp_path):
    automatic = {"wire_bits": "auto", "answer_bits": "auto", "max_wire_drop_points": 100.0}
    train(settings(**automatic), tmp_path / "first")
    first = RunFolder.open(tmp_path / "first").read_wire()
    assert (first.spec.feature_codec.bits, first.spec.answer_bits) == (1, 4)
    for source, wire in ((tmp_path / "first", first), (run.path, run.read_wire())):
        further = tmp_path / f"of {source.name}"
        train(settings(**automatic), further, stage1_from=source)
        assert RunFolder.open(further).read_wire() == wire


def test_a_client_with_other_bits_gets_a_wire_of_its_own_and_one_with_the_same_keeps_it(run, settings, tmp_path):
    wires = {}
    for bits in (8, 4):
        train(settings(wire_bits=bits), tmp_path / str(bits), stage1_from=run.path)
        wires[bits] = RunFolder.open(tmp_path / str(bits)).read_wire()
    assert wires[8] == run.read_wire()
    assert wires[4].spec.feature_codec.bits == 4
    assert wires[4].spec.bodies_id != wires[8].spec.bodies_id


def test_a_codec_ignores_single_outliers_and_refuses_what_is_not_finite():
    values = torch.linspace(-1, 1, 100_001)
    values[0], values[-1] = -1e6, 1e6
    codec = codec_for(values, 1e-4)
    assert codec.low == pytest.approx(-1, abs=0.02)
    assert codec.high == pytest.approx(1, abs=0.02)
    for bad in (math.nan, math.inf):
        values[7] = bad
        with pytest.raises(ConfigError, match="lower the learning rate"):
            codec_for(values, 1e-4)
    with pytest.raises(ConfigError):
        codec_for(torch.zeros(10), 1e-4)


def test_a_further_client_needs_a_finished_stage_1_and_no_finished_client(copied, settings, tmp_path):
    for name in ("summary.json", RunFolder.CLIENT_FILE):
        (copied / name).unlink()
    train(settings(), tmp_path / "further", stage1_from=copied)
    assert RunFolder.open(tmp_path / "further").read_wire() == RunFolder.open_stage1(copied).read_wire()
    (copied / "wire.json").unlink()
    with pytest.raises(DataError, match="stage 1 was not finished; ensembler train --resume"):
        train(settings(), tmp_path / "another", stage1_from=copied)
    assert not (tmp_path / "another").exists()


def test_nothing_of_the_wire_depends_on_the_selector(run, settings, tmp_path):
    secrets_drawn = {run.read_secret().selector}
    for k in range(2):
        other = RunFolder(tmp_path / f"client {k}")
        summary = train(settings(num_selected=1 + k), other.path, stage1_from=run.path)
        assert summary["num_selected"] == 1 + k
        assert (other.path / "wire.json").read_bytes() == (run.path / "wire.json").read_bytes()
        assert other.read_wire().spec.bodies_id == run.read_wire().spec.bodies_id
        for i in range(N):
            name = run.stage1_file(i)
            assert (other.path / name).read_bytes() == (run.path / name).read_bytes()
            assert mode(other.path / name) == 0o600
        assert mode(other.path / "wire.json") == 0o600
        assert state(load_client(other).head) != state(load_client(run).head)
        secrets_drawn.add(other.read_secret().selector)
    assert len(secrets_drawn) > 1  # of 1 and of 2 positions


# --- stage 2 ---


def test_the_selector_is_p_distinct_positions_and_every_position_occurs(settings):
    config = settings(num_nets=10, num_selected=5, client_seed=7)
    drawn = []
    for _ in range(200):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        drawn.append(stage2(config).selector)
    for selector in drawn:
        assert len(set(selector)) == 5
        assert set(selector) <= set(range(10))
        assert list(selector) == sorted(selector)
    assert {position for selector in drawn for position in selector} == set(range(10))
    # 252 selectors, 200 draws: by chance alone about 138 differ. A seed that counted would leave one.
    assert len(set(drawn)) > 50
    occurrences = np.bincount(np.concatenate(drawn), minlength=10)
    assert occurrences.min() > 50  # 100 expected, standard deviation 7


def test_all_nets_may_be_selected(settings):
    assert stage2(settings(num_selected=N)).selector == tuple(range(N))


def test_the_client_seed_is_the_given_one_or_drawn(settings):
    assert stage2(settings(client_seed=5)).seed == 5
    assert len({stage2(settings()).seed for _ in range(20)}) == 20


# --- stage 3 ---


def test_bodies_are_bit_identical_before_and_after_stage_3(settings, tensors, run, tmp_path):
    config = settings(epochs_stage3=2)
    folder = RunFolder.create(tmp_path / "run", config, run.arch, run.labels)
    nets = stage1(folder, config, run.arch, tensors, Silent())
    wire = fix_wire(nets, tensors.train_x)
    before = [copy.deepcopy(state(item.net)) for item in nets]
    client = stage3(folder, config, run.arch, tensors, nets, wire, stage2(config), Silent())
    assert [state(item.net) for item in nets] == before
    assert [state(item.net) for item in load_stage1(folder)] == before
    assert all(not p.requires_grad for item in nets for p in item.net.parameters())
    bodies = [nets[i].net.body for i in wire.order]
    assert bodies_digest(bodies, wire.spec.feature_codec, wire.spec.answer_codecs) == wire.spec.bodies_id
    trained = {name.split(".")[0] for name, _ in client.named_parameters()}
    assert trained == {"head", "tail"}


def test_the_stored_bodies_are_those_of_the_bodies_id(run):
    spec = run.read_wire().spec
    assert bodies_digest(load_bodies(run), spec.feature_codec, spec.answer_codecs) == spec.bodies_id


def test_stage_3_starts_from_a_head_of_its_own(run, settings, tmp_path):
    # Steps too small to move anything leave the head as it was initialised; equal seeds must not make equal heads.
    config = settings(learning_rate=1e-12, weight_decay=0.0, seed=0, client_seed=0)
    other = RunFolder(tmp_path / "run")
    train(config, other.path, stage1_from=run.path)
    started = load_client(other)
    for item in load_stage1(run):
        for mine, theirs in ((started.head, item.net.head), (started.tail, item.net.tail)):
            a, b = next(mine.parameters()).flatten(), next(theirs.parameters()).flatten()
            assert not torch.equal(a[: len(b)], b)
            assert abs(float(functional.cosine_similarity(a[: len(b)], b, dim=0))) < 0.5
        correlation = functional.cosine_similarity(started.noise.flatten(), item.noise.flatten(), dim=0)
        assert abs(float(correlation)) < 0.2


def test_the_clients_noise_is_fixed_by_its_seed_and_has_the_asked_deviation(run):
    client = load_client(run)
    assert client.noise.shape == feature_shape(run.arch)
    assert float(client.noise.std()) == pytest.approx(STD, rel=0.1)


def test_reg_over_all_looks_at_more_heads_than_reg_over_selected(run, settings, tmp_path):
    overlaps = {}
    for over in ("all", "selected"):
        # The same client seed and steps of no size: the same head meets the same images.
        config = settings(
            reg_over=over, num_selected=1, client_seed=3, learning_rate=1e-12, weight_decay=0.0, batch_size=64
        )
        other = RunFolder(tmp_path / over)
        train(config, other.path, stage1_from=run.path)
        overlaps[over] = next(line["overlap"] for line in metrics(other) if line.get("stage") == 3)
    assert overlaps["all"] >= overlaps["selected"] - 1e-6


def _head_for(over, selector, settings, folder, run, monkeypatch):
    """Trains a client with a selector that the test chooses; returns it."""
    monkeypatch.setattr(stages, "stage2", lambda config: ClientSecret(selector=selector, seed=3))
    other = RunFolder(folder)
    train(settings(head_for=over, batch_size=64), other.path, stage1_from=run.path)
    return load_client(other)


def test_a_head_for_all_nets_does_not_depend_on_the_selector_and_its_tail_does(run, settings, tmp_path, monkeypatch):
    clients = {
        (over, selector): _head_for(over, selector, settings, tmp_path / f"{over}{selector[1]}", run, monkeypatch)
        for over in ("all", "selected")
        for selector in ((0, 1), (0, 2))
    }
    heads = {key: module_tensors("head", client.head) for key, client in clients.items()}

    def same(over):
        first, second = heads[over, (0, 1)], heads[over, (0, 2)]
        return all(torch.equal(first[name], second[name]) for name in first)

    assert same("all")
    assert not same("selected")
    tails = [clients["all", selector].tail.fc.weight for selector in ((0, 1), (0, 2))]
    assert not torch.equal(*tails)


@pytest.mark.parametrize(("images", "asked"), [(7, 3), (6, 3), (5, 2), (3, 1), (1, 1)])
def test_an_impartial_head_asks_one_net_for_each_image_and_none_for_a_single_one_of_several(images, asked):
    torch.manual_seed(0)
    impartial = Impartial(ArchSpec(name="resnet10_slim", image_size=(SIZE, SIZE), num_classes=2), 3)
    features, seen = torch.arange(images).float()[:, None].expand(images, 128), []

    def ask(part, net):
        seen.append((net, part[:, 0].tolist()))
        return part

    logits = impartial.logits(features, ask)
    assert len({net for net, _ in seen}) == len(seen) == asked
    assert [image for _, part in seen for image in part] == list(range(images))
    assert images == 1 or min(len(part) for _, part in seen) > 1
    for net, part in seen:
        rows = [int(image) for image in part]
        torch.testing.assert_close(logits[rows], impartial.tails[net](features[rows]))


def test_over_the_batches_an_impartial_head_asks_every_net_as_often():
    torch.manual_seed(0)
    impartial = Impartial(ArchSpec(name="resnet10_slim", image_size=(SIZE, SIZE), num_classes=2), 5)
    counts = torch.zeros(5)

    def ask(part, net):
        counts[net] += len(part)
        return part

    for _ in range(400):
        impartial.logits(torch.zeros(4, 128), ask)  # fewer than two images for each
    assert float((counts / counts.mean() - 1).abs().max()) < 0.25


def test_combine_scales_by_one_over_p_concatenates_and_applies_the_tail(run):
    client = load_client(run)
    answers = torch.randn(4, P, 128)
    joined = torch.cat([answers[:, 0] / P, answers[:, 1] / P], dim=1)
    expected = joined @ client.tail.fc.weight.T + client.tail.fc.bias
    torch.testing.assert_close(client.combine(answers), expected)


def test_finish_sends_noised_codes_through_the_selected_bodies(run, tensors):
    client, bodies, wire = load_client(run), load_bodies(run), run.read_wire().spec
    x = normalise(tensors.test_x[:5])
    features = client.head(x)
    sent = wire.feature_codec.decode(wire.feature_codec.encode((features + client.noise).numpy()))
    answers = []
    for k in client.selector:
        codec = wire.answer_codecs[k]
        answers.append(torch.from_numpy(codec.decode(codec.encode(bodies[k](torch.from_numpy(sent)).numpy()))))
    selected = [bodies[k] for k in client.selector]
    torch.testing.assert_close(client.finish(features, selected), client.combine(torch.stack(answers, 1)))
    without = client.combine(torch.stack([body(features + client.noise) for body in selected], 1))
    torch.testing.assert_close(client.finish(features, selected, through_wire=False), without)
    assert not torch.equal(client.finish(features, selected), without)


def test_a_loaded_client_is_as_accurate_as_training_said(run, tensors):
    client, bodies = load_client(run), load_bodies(run)
    selected = [bodies[k] for k in client.selector]
    summary = run.read_json("summary.json")
    measured = accuracy(lambda x: client.finish(client.head(x), selected), tensors.test_x, tensors.test_y)
    assert measured == pytest.approx(summary["accuracy_wire"], abs=100 / 32)  # one image: another memory layout rounds
    assert summary["num_nets"] == N
    assert summary["test_images"] == 32
    assert -1 <= summary["max_cosine"] <= 1
    assert 0 <= summary["max_linear"] <= 1
    assert 0 <= summary["max_linear_between_stage1_heads"] <= 1


def answer(client, bodies, x):
    return client.finish(client.head(x), [bodies[k] for k in client.selector], through_wire=False)


def test_fixed_noise_gives_one_answer_and_fresh_noise_another_each_time(run, settings, tensors, tmp_path):
    fresh = RunFolder(tmp_path / "fresh")
    train(settings(noise_mode="fresh"), fresh.path, stage1_from=run.path)
    x = normalise(tensors.test_x[:1]).repeat(2, 1, 1, 1)
    client, bodies = load_client(fresh), load_bodies(fresh)
    first, second = answer(client, bodies, x), answer(client, bodies, x)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])  # the same image twice in one batch
    assert not client.noise.any()
    noise = client.perturbed(torch.zeros(8, *client.noise.shape))
    assert float(noise.std()) == pytest.approx(STD, rel=0.05)

    client, bodies = load_client(run), load_bodies(run)
    torch.testing.assert_close(answer(client, bodies, x), answer(client, bodies, x), rtol=0, atol=0)


# --- losses ---


@pytest.mark.parametrize(("spread", "noise_std"), [(1.0, 1.0), (3.0, 0.5), (0.1, 0.5)])
def test_the_information_is_what_a_gaussian_channel_passes_beyond_the_class(spread, noise_std):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(3, (6000,), generator=generator)
    centres = 5 * torch.randn(
        3, 2, 4, 4, generator=generator
    )  # where the classes lie tells nothing more than the class
    features = centres[targets] + spread * torch.randn(6000, 2, 4, 4, generator=generator)
    expected = 0.5 * math.log2(1 + (spread / noise_std) ** 2)
    assert float(information_bits(features, targets, noise_std)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("classes", [2, 10, 100, 300])
def test_the_information_does_not_fade_with_the_number_of_classes(classes):
    generator = torch.Generator().manual_seed(0)
    bits = [
        float(information_bits(torch.randn(128, 64, generator=generator), targets, 0.5))
        for targets in torch.randint(classes, (20, 128), generator=generator)
    ]
    assert sum(bits) / len(bits) == pytest.approx(0.5 * math.log2(1 + 1 / 0.5**2), rel=0.05)


def test_features_that_are_the_class_alone_have_no_information():
    targets = torch.tensor([0, 1, 1, 2])
    features = torch.tensor([1.0, -2.0, 7.0])[targets, None].requires_grad_()
    bits = information_bits(features, targets, 0.5)
    assert float(bits.detach()) == pytest.approx(0, abs=1e-6)
    bits.backward()
    assert torch.isfinite(features.grad).all()


def test_distance_correlation_is_one_for_the_same_thing_turned_and_scaled_and_little_for_strangers():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 3, 2, 2, generator=generator)
    turn, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    turned = 3 * x.flatten(1) @ turn + 7
    assert float(distance_correlation(x, turned)) == pytest.approx(1, abs=1e-3)
    stranger = torch.randn(256, 4, generator=generator)
    mixed = x.flatten(1)[:, :4] + 2 * stranger
    independent, little = (float(distance_correlation(x, z)) for z in (stranger, mixed))
    assert 0 <= independent < 0.1
    assert independent < little < 0.9
    same = torch.ones(8, 3, requires_grad=True)
    nothing = distance_correlation(torch.randn(8, 5, generator=generator), same)
    nothing.backward()
    assert float(nothing.detach()) == pytest.approx(0, abs=1e-3)
    assert torch.isfinite(same.grad).all()


@pytest.mark.parametrize(("shape", "size"), [((8, 4, 4), (32, 32)), ((3, 16, 16), (16, 16)), ((5, 3, 5), (21, 33))])
def test_the_decoder_in_the_loop_paints_images_of_their_size(shape, size):
    assert Adversary(shape, size)(torch.randn(2, *shape)).shape == (2, 3, *size)


def test_the_decoder_in_the_loop_descends_where_the_head_ascends(settings, run):
    config = settings(decoder_weight=2.0)
    hiding = Hiding(config, run.arch, torch.device("cpu"))
    x = torch.randn(4, 3, 16, 16)
    features = torch.randn(4, *feature_shape(run.arch), requires_grad=True)
    hiding.loss(x, features, torch.zeros(4, dtype=torch.int64)).backward()
    plain = features.detach().clone().requires_grad_()
    loss = 2.0 * functional.mse_loss(hiding.decoder(plain), x)
    (upward,) = torch.autograd.grad(loss, plain)
    torch.testing.assert_close(features.grad, -upward, rtol=1e-3, atol=1e-7)
    expected = torch.autograd.grad(2.0 * functional.mse_loss(hiding.decoder(plain), x), hiding.parameters()[0])[0]
    torch.testing.assert_close(hiding.parameters()[0].grad, expected, rtol=1e-3, atol=1e-6)


def test_a_decoder_in_the_loop_needs_a_map():
    with pytest.raises(ConfigError, match="--decoder-weight needs features"):
        Adversary((65, 128), (32, 32))


@pytest.mark.parametrize("option", ["nopeek_weight", "decoder_weight"])
def test_a_published_loss_changes_what_is_trained_and_nothing_that_is_not_asked_for(option, run, settings, tmp_path):
    train(settings(client_seed=4, num_selected=N), tmp_path / "without", stage1_from=run.path)
    train(settings(client_seed=4, num_selected=N, **{option: 1.0}), tmp_path / "with", stage1_from=run.path)
    heads = [state(load_client(RunFolder.open(tmp_path / name)).head) for name in ("without", "with")]
    assert heads[0] != heads[1]
    assert not any("decoder" in name for name in RunFolder(tmp_path / "with").load_tensors(RunFolder.CLIENT_FILE))


def test_a_weighed_information_loss_leaves_features_that_tell_less(settings, tmp_path):
    bits = {}
    for weight in (0.0, 3.0):
        folder = tmp_path / str(weight)
        train(settings(bottleneck=(4, 4, 2), information_weight=weight, epochs_stage1=2, epochs_stage3=4), folder)
        head, data = load_client(RunFolder.open(folder)).head, data_sets.load(settings().data)
        x, y = torch.from_numpy(data.train_x[:96]), torch.from_numpy(data.train_y[:96])
        bits[weight] = float(information_bits(head(normalise(x)), y, 0.5))
    assert bits[3.0] < 0.8 * bits[0.0]


def test_a_teachers_answers_are_learned_beside_the_labels():
    generator = torch.Generator().manual_seed(0)
    logits, taught = torch.randn(2, 6, 3, generator=generator)
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    labels_alone = float(functional.cross_entropy(logits, targets))
    assert float(classification_loss(logits, targets, taught, 0.0)) == pytest.approx(labels_alone)
    assert float(classification_loss(logits, targets, logits, 1.0)) == pytest.approx(0, abs=1e-6)
    # No distance is smaller than that from the teacher itself, and it grows on the way to another answer.
    away = [float(classification_loss(logits + t * (taught - logits), targets, taught, 1.0)) for t in (1, 0.5, 0)]
    assert away[0] == pytest.approx(0, abs=1e-6)
    assert 0 < away[1] < away[2]


def test_a_teacher_is_heard_in_both_stages(settings, tmp_path):
    train(settings(defense="none"), tmp_path / "teacher")
    trained = {}
    for name, teacher in (("alone", None), ("taught", str(tmp_path / "teacher"))):
        train(settings(teacher=teacher, client_seed=3), tmp_path / name)
        folder = RunFolder.open(tmp_path / name)
        trained[name] = load_stage1(folder)[0].net.tail, folder.config.teacher
    assert state(trained["alone"][0]) != state(trained["taught"][0])
    assert trained["taught"][1] == str(tmp_path / "teacher")
    # The same stage 1 for both, so that the client alone can differ.
    heads = []
    for name, teacher in (("a", None), ("b", str(tmp_path / "teacher"))):
        train(settings(teacher=teacher, client_seed=3, num_selected=N), tmp_path / name, stage1_from=tmp_path / "alone")
        heads.append(state(load_client(RunFolder.open(tmp_path / name)).head))
    assert heads[0] != heads[1]


def test_an_impossible_teacher_is_refused_before_anything_is_written(run, settings, tmp_path):
    with pytest.raises(ConfigError, match="--defense ensembler; train one with none"):
        train(settings(teacher=str(run.path)), tmp_path / "out")
    with pytest.raises(DataError, match="not a run folder"):
        train(settings(teacher=str(tmp_path / "nobody")), tmp_path / "out")
    with pytest.raises(ConfigError, match="--teacher-weight"):
        settings(teacher_weight=1.5)
    assert not (tmp_path / "out").exists()


def test_bfloat16_trains_the_same_net_a_little_otherwise(run, settings, tensors, tmp_path):
    narrow = settings(precision="bfloat16", num_nets=P)
    nets = stage1(RunFolder.create(tmp_path / "run", narrow, run.arch, run.labels), narrow, run.arch, tensors, Silent())
    mine, theirs = (item.net.head.stem.conv.weight for item in (nets[0], load_stage1(run)[0]))
    assert mine.dtype == torch.float32
    assert not torch.equal(mine, theirs)
    assert float(functional.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0)) > 0.9


def test_before_few_codes_stage_1_meets_the_noise_of_the_client(settings):
    fresh = {"noise_mode": "fresh", "noise_std": 0.5}
    assert not settings(**fresh).stage1_perturbation.fresh
    assert settings(**fresh, bottleneck=(4, 4, 2)).stage1_perturbation == settings(**fresh).perturbation


def test_max_cosine_is_the_mean_over_images_of_the_largest_cosine_over_heads():
    generator = torch.Generator().manual_seed(0)
    mine = torch.randn(5, 4, 3, 3, generator=generator)
    others = [torch.randn(5, 4, 3, 3, generator=generator) for _ in range(6)]
    per_image = []
    for b in range(5):
        a = mine[b].double().numpy().ravel()
        cosines = []
        for other in others:
            c = other[b].double().numpy().ravel()
            cosines.append(a @ c / (np.linalg.norm(a) * np.linalg.norm(c)))
        per_image.append(max(cosines))
    assert float(max_cosine(mine, others)) == pytest.approx(np.mean(per_image), abs=1e-6)


def test_max_cosine_of_an_equal_head_is_one_and_of_its_opposite_minus_one():
    mine = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    other = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    assert float(max_cosine(mine, [other, mine])) == pytest.approx(1, abs=1e-6)
    assert float(max_cosine(mine, [-mine])) == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 1e3])
def test_max_cosine_does_not_depend_on_scale(scale):
    mine = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    others = [torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    expected = pytest.approx(float(max_cosine(mine, others)), abs=1e-6)
    assert float(max_cosine(scale * mine, others)) == expected
    assert float(max_cosine(mine, [others[0], scale * others[1]])) == expected


def test_max_cosine_of_dead_features_is_zero_and_has_a_gradient():
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    cosine = max_cosine(dead, [torch.ones(2, 3, 4, 4)])
    assert float(cosine.detach()) == 0
    cosine.backward()
    assert torch.isfinite(dead.grad).all()


SHAPES = [(64, 5, 4, 4), (64, 16, 5), (512, 5)]  # maps, tokens, vectors


@pytest.mark.parametrize("shape", SHAPES)
def test_the_linear_overlap_is_what_least_squares_explains_of_the_head_it_explains_best(shape):
    generator = torch.Generator().manual_seed(0)
    mine = torch.randn(shape, generator=generator)
    shared = 0.6 * mine + 0.8 * torch.randn(shape, generator=generator)
    others = [torch.randn(shape, generator=generator), shared]
    by_place = [each.movedim(1, -1) if each.dim() == 4 else each for each in (mine, *others)]
    x, *targets = (each.reshape(-1, 5).double().numpy() for each in by_place)
    x = x - x.mean(0)
    explained = []
    for target in targets:
        y = target - target.mean(0)
        _, residual, *_ = np.linalg.lstsq(x, y, rcond=None)
        explained.append(1 - residual.sum() / (y**2).sum())
    assert float(max_linear_overlap(mine, others)) == pytest.approx(max(explained), abs=2e-3)
    assert max(explained) == pytest.approx(0.36, abs=0.05)


def test_no_order_sign_or_mix_of_channels_lowers_the_linear_overlap_as_it_does_the_cosine():
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(32, 6, 4, 4, generator=generator)
    mix, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    for mine in (other.flip(1), -other, torch.einsum("oc,bchw->bohw", mix, other)):
        assert float(max_linear_overlap(mine, [other])) > 0.99
        assert float(max_cosine(mine, [other])) < 0.7
    strange = torch.randn(32, 6, 4, 4, generator=generator)
    assert float(max_linear_overlap(strange, [other])) < 0.1


def test_the_linear_overlap_can_be_descended_and_dead_features_share_nothing():
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(32, 6, 4, 4, generator=generator)
    mine = (other + 0.5 * torch.randn(other.shape, generator=generator)).requires_grad_()
    before = max_linear_overlap(mine, [other])
    before.backward()
    after = max_linear_overlap((mine - 1000 * mine.grad).detach(), [other])
    assert float(after) < 0.9 * float(before.detach())
    dead = torch.zeros(4, 3, 2, 2, requires_grad=True)
    nothing = max_linear_overlap(dead, [torch.randn(4, 3, 2, 2, generator=generator)])
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert torch.isfinite(dead.grad).all()


def test_a_client_that_is_told_to_differ_by_a_linear_map_does(run, settings, tmp_path):
    found = {}
    for weight in (0.0, 10.0):
        config = settings(reg_kind="linear", reg_weight=weight, client_seed=3, epochs_stage3=3)
        found[weight] = train(config, tmp_path / str(weight), stage1_from=run.path)["max_linear"]
    assert found[10.0] < found[0.0]


@pytest.mark.parametrize("weight", [0.0, 0.1, 3.0])
def test_stage3_loss_is_cross_entropy_plus_lambda_times_the_cosine(weight):
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    cross_entropy = -np.mean([float(logits[i].log_softmax(0)[t]) for i, t in enumerate(targets)])
    loss = stage3_loss(classification_loss(logits, targets), torch.tensor(0.25), weight)
    assert float(loss) == pytest.approx(cross_entropy + weight * 0.25, abs=1e-6)


# --- the fake quantiser ---

finite = st.floats(-(2.0**20), 2.0**20, width=32)


@st.composite
def codecs(draw):
    low, high = sorted((draw(finite), draw(finite)))
    return AffineCodec.from_range(low, high if max(high, 0) - min(low, 0) > 1e-3 else low + 1)


@given(codecs(), hnp.arrays(np.float32, hnp.array_shapes(max_dims=4, max_side=4), elements=finite))
def test_fake_quantising_is_encoding_and_decoding_bit_for_bit(codec, values):
    arrived = fake_quantise(torch.from_numpy(values), codec).numpy()
    assert arrived.dtype == np.float32
    assert arrived.shape == values.shape
    assert arrived.tobytes() == codec.decode(codec.encode(values)).tobytes()


@pytest.mark.parametrize("zero_point", [0, 37, 255])
def test_fake_quantising_is_the_codec_at_every_code_and_halfway_between(zero_point):
    codec = AffineCodec(scale=float(np.float32(0.0123)), zero_point=zero_point)
    steps = np.arange(-600, 600, dtype=np.float32) / 2
    for values in (steps * np.float32(codec.scale), np.nextafter(steps * np.float32(codec.scale), np.float32(9))):
        arrived = fake_quantise(torch.from_numpy(values), codec).numpy()
        assert arrived.tobytes() == codec.decode(codec.encode(values)).tobytes()


@given(codecs(), hnp.arrays(np.float32, 20, elements=finite))
def test_the_gradient_is_one_inside_the_range_and_zero_outside(codec, values):
    margin = codec.scale / 4
    x = torch.from_numpy(values).requires_grad_()
    fake_quantise(x, codec).sum().backward()
    inside = (values > codec.low + margin) & (values < codec.high - margin)
    outside = (values < codec.low - margin) | (values > codec.high + margin)
    assert (x.grad.numpy()[inside] == 1).all()
    assert (x.grad.numpy()[outside] == 0).all()


def test_answers_are_quantised_with_the_codec_of_their_net():
    codecs = (AffineCodec.from_range(0, 1), AffineCodec.from_range(-1, 5))
    answers = torch.randn(4, 2, 7, generator=torch.Generator().manual_seed(0))
    arrived = fake_quantise_answers(answers, codecs)
    assert arrived.shape == answers.shape
    for i, codec in enumerate(codecs):
        torch.testing.assert_close(arrived[:, i], fake_quantise(answers[:, i], codec), rtol=0, atol=0)


# --- baselines ---


@pytest.mark.parametrize(("defense", "std"), [("none", 0.0), ("single", STD)])
def test_a_baseline_is_one_net_cut_in_three(settings, tensors, tmp_path, defense, std):
    folder = RunFolder(tmp_path / defense)
    summary = train(settings(defense=defense), folder.path)
    assert (summary["num_nets"], summary["num_selected"]) == (1, 1)
    (item,) = load_stage1(folder)
    client, (body,) = load_client(folder), load_bodies(folder)
    assert client.selector == (0,)
    assert torch.equal(client.noise, item.noise)
    assert float(client.noise.std()) == pytest.approx(std, rel=0.1)
    x = normalise(tensors.test_x)
    whole = item.net.tail(item.net.body(item.net.head(x) + item.noise))
    torch.testing.assert_close(client.finish(client.head(x), [body], through_wire=False), whole)


def test_a_joint_baseline_is_n_nets_behind_one_head_and_all_of_them_count(settings, tensors, tmp_path):
    folder = RunFolder(tmp_path / "run")
    summary = train(settings(defense="joint"), folder.path)
    assert (summary["num_nets"], summary["num_selected"]) == (N, N)
    nets = load_stage1(folder)
    heads = [state(item.net.head) for item in nets]
    assert all(head == heads[0] for head in heads)
    assert len({state(item.net.body)["layer1.0.conv1.weight"] for item in nets}) == N
    client, bodies = load_client(folder), load_bodies(folder)
    assert client.selector == tuple(range(N))
    x = normalise(tensors.test_x)
    mean = torch.stack([item.logits(x) for item in nets]).mean(0)
    torch.testing.assert_close(client.finish(client.head(x), bodies, through_wire=False), mean)


def test_nets_that_train_together_need_a_tail_of_one_layer(settings, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config = settings(defense="joint", arch="own_nets:sequential", head_end="2", tail_start="8")
    with pytest.raises(ConfigError, match="--defense joint needs a tail of one linear layer"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- what a client does to its features ---


def test_stage_1_of_ensembler_does_not_depend_on_what_its_client_will_do(run, settings, tmp_path):
    other = RunFolder(tmp_path / "run")
    train(settings(noise="uniform", noise_mode="fresh", dropout=0.5), other.path)
    for i in range(N):
        first, second = (folder.load_tensors(run.stage1_file(i)) for folder in (run, other))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("fresh", [False, True])
def test_uniform_noise_keeps_within_its_magnitude_and_has_the_asked_deviation(fresh):
    kind = Perturbation(noise="uniform", std=STD, fresh=fresh)
    fixed = kind.start((16, 32, 32), seed=1)
    assert bool(fixed.any()) != fresh
    noise = kind.draw(fixed, 4).noise
    assert noise.shape == ((4, 16, 32, 32) if fresh else (16, 32, 32))
    assert float(noise.abs().max()) <= STD * math.sqrt(3)
    assert float(noise.std()) == pytest.approx(STD, rel=0.02)


def test_dropout_sends_other_features_as_zero_with_every_image_and_leaves_the_rest():
    features = torch.rand(8, 16, 16, 16) + 1
    kind = Perturbation(dropout=0.3)
    fixed = kind.start(features.shape[1:], seed=1)
    sent, again = (kind.draw(fixed, 8).applied(features) for _ in range(2))
    assert torch.equal(sent[sent != 0], features[sent != 0])
    assert float((sent == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(sent[0] == 0, sent[1] == 0)
    assert not torch.equal(sent == 0, again == 0)


def test_a_client_drops_at_inference_too(settings, tensors, tmp_path):
    folder = RunFolder(tmp_path / "run")
    train(settings(defense="single", noise_std=0.0, dropout=0.5), folder.path)
    client, bodies = load_client(folder), load_bodies(folder)
    x = normalise(tensors.test_x[:1]).repeat(2, 1, 1, 1)
    assert not client.training
    assert not torch.equal(*answer(client, bodies, x))
    assert float((client.perturbed(torch.ones(4, *client.noise.shape)) == 0).float().mean()) == pytest.approx(
        0.5, abs=0.1
    )


@pytest.mark.parametrize("mode", ["fixed", "fresh"])
def test_learned_noise_changes_nothing_of_the_net_and_is_not_what_it_began_as(settings, tmp_path, mode):
    bare, noisy = RunFolder(tmp_path / "bare"), RunFolder(tmp_path / "noisy")
    config = settings(defense="single", noise="learned", noise_mode=mode, noise_std=0.5, epochs_stage3=3)
    config = dataclasses.replace(config, learning_rate=0.1)
    train(dataclasses.replace(config, noise="gaussian", noise_mode="fixed", noise_std=0.0), bare.path)
    train(config, noisy.path)
    (plain,), (item,) = load_stage1(bare), load_stage1(noisy)
    assert state(plain.net) == state(item.net)
    noise = load_client(noisy).noise
    assert torch.equal(noise, item.noise)
    tensors_of = noise if mode == "fresh" else noise[None]
    assert tensors_of.shape == (LEARNED_TENSORS if mode == "fresh" else 1, *feature_shape(noisy.arch))
    # It kept its magnitude, for which it is rewarded, and found a direction of its own.
    assert all(float(each.std()) == pytest.approx(0.5, rel=0.1) for each in tensors_of)
    began = config.perturbation.start(feature_shape(noisy.arch), derived_seed(derived_seed(0, 1, 0, 3), 0))
    assert float((noise - began).abs().mean()) > 0.01
    lines = [line for line in metrics(noisy) if line.get("stage") == "noise"]
    assert [line["epoch"] for line in lines] == [1, 2, 3]


def test_noise_below_the_asked_deviation_grows_until_it_is_reached(settings, tensors, run, tmp_path):
    # Logits that do not depend on the noise leave the reward alone.
    config = settings(noise="learned", epochs_stage3=5, learning_rate=0.1, weight_decay=0.0)
    folder = RunFolder.create(tmp_path / "run", config, run.arch, run.labels)
    shape = (4, 8, 8)
    kind = Perturbation(noise="learned", std=STD)
    seed = next(seed for seed in range(99) if float(kind.start(shape, derived_seed(seed, 0)).std()) < 0.95 * STD)

    def unmoved(x, noise):
        return torch.zeros(len(x), 2) + 0 * noise.sum()

    learned = learn(folder, config, kind, shape, unmoved, tensors, seed=seed, reporter=Silent())
    assert STD <= float(learned.std()) < 1.2 * STD


def test_a_client_of_ensembler_learns_noise_through_the_wire(run, settings, tensors, tmp_path):
    folder = RunFolder(tmp_path / "run")
    train(settings(noise="learned"), folder.path, stage1_from=run.path)
    assert folder.read_wire().spec == run.read_wire().spec
    client = load_client(folder)
    assert client.noise.shape == run.read_wire().spec.feature_shape
    assert float(client.noise.std()) == pytest.approx(STD, rel=0.2)
    assert not list(folder.path.rglob("*checkpoint*"))


def test_a_run_from_before_there_were_kinds_of_noise_keeps_its_meaning(settings):
    stored = settings().to_dict()
    for name in ("noise", "dropout"):
        del stored[name]
    config = TrainConfig.from_dict(stored)
    assert config == settings()
    assert config.perturbation == config.stage1_perturbation == Perturbation(std=STD)


# --- the run folder ---


def test_the_run_folder_is_its_owners_alone(run_path):
    assert mode(run_path) == 0o700
    assert mode(run_path / "client") == 0o700
    for name in (RunFolder.SECRET_FILE, RunFolder.CLIENT_FILE, "stage1/net_00.safetensors", "wire.json"):
        assert mode(run_path / name) == 0o600
    assert not list(run_path.rglob("*.tmp"))


def test_a_secrets_repr_shows_neither_selector_nor_seed():
    secret = ClientSecret(selector=(3, 14, 15), seed=926535)
    for shown in (repr(secret), str(secret), f"{secret}", repr([secret])):
        assert "ClientSecret(P=3)" in shown
        assert not any(number in shown for number in ("14", "15", "926535"))


def test_only_the_secret_file_and_the_client_know_the_selector(run):
    stored = {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.suffix in (".json", ".jsonl")}
    open_files = {"config.json", "wire.json", "metrics.jsonl", "confusion.json", "summary.json"}
    assert stored == open_files | {"client/secret.json"}
    for name in stored - {"client/secret.json"}:
        assert "selector" not in (run.path / name).read_text()


def test_a_run_is_read_as_it_was_told(run, settings):
    assert run.config == settings(client_seed=11)
    assert run.labels == ("0", "1")
    assert run.arch == ArchSpec(name="resnet10_slim", image_size=(SIZE, SIZE), num_classes=2)


def test_every_epoch_of_every_stage_is_in_the_metrics(run):
    lines = metrics(run)
    assert [line["net"] for line in lines if line.get("stage") == 1 and "epoch" in line] == list(range(N))
    (last,) = [line for line in lines if line.get("stage") == 3]
    assert math.isfinite(last["loss"])
    assert -1 <= last["overlap"] <= 1


def test_what_is_no_run_folder_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match=r"is not a run folder; ensembler train --out .* makes one"):
            RunFolder.open(path)
    for name, said in (("note", "config.json is missing"), ("out/client/manifest.json", "bundles lie in it")):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).touch()
        with pytest.raises(DataError, match=f"is not a run folder; {said}; give the "):
            RunFolder.open((tmp_path / "folder" / name).parents[name.count("/") and 1])
    with pytest.raises(DataError, match="is not a run folder; it is a file; give the folder"):
        RunFolder.open(tmp_path / "folder" / "note")
    (tmp_path / "above" / "run").mkdir(parents=True)
    (tmp_path / "above" / "run" / "config.json").touch()
    with pytest.raises(DataError, match=r"is not a run folder; runs lie in it: give .*above/run"):
        RunFolder.open(tmp_path / "above")
    (tmp_path / "manifest.json").touch()
    with pytest.raises(DataError, match="is not a run folder; it is a bundle; give the run that it was exported from"):
        RunFolder.open(tmp_path)


def test_an_unfinished_run_is_refused(copied):
    (copied / "summary.json").unlink()
    with pytest.raises(DataError, match="not finished"):
        RunFolder.open(copied)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"version": 3}', '{"version": 2}', "[" * 100_000, "\udcff"]
)
def test_a_damaged_config_is_refused(copied, content):
    (copied / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError):
        RunFolder.open(copied)


def test_a_config_of_another_version_of_the_options_is_refused(copied):
    document = json.loads((copied / "config.json").read_text())
    document["config"]["momentum"] = 0.9
    (copied / "config.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"config\.json.*momentum"):
        RunFolder.open(copied)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "text"])
@pytest.mark.parametrize(
    ("name", "load"), [("stage1/net_01.safetensors", load_stage1), (RunFolder.CLIENT_FILE, load_client)]
)
def test_damaged_tensors_are_refused_by_file_name(copied, name, load, damage):
    path = copied / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut short": content[: len(content) // 2], "text": b"x" * 100}[damage])
    with pytest.raises(DataError, match=name):
        load(RunFolder.open(copied))


def test_tensors_of_another_architecture_are_refused(run):
    tensors = run.load_tensors(run.stage1_file(0))
    other = build_net(dataclasses.replace(run.arch, name="resnet18"))
    with pytest.raises(DataError, match="stored head does not fit"):
        restore(other.head, "head", tensors)


def test_a_missing_secret_is_refused(copied):
    (copied / RunFolder.SECRET_FILE).unlink()
    with pytest.raises(DataError, match="secret"):
        load_client(RunFolder.open(copied))


# --- bodies_id ---


@pytest.fixture
def bodies():
    torch.manual_seed(0)
    spec = ArchSpec(name="resnet10_slim", image_size=(SIZE, SIZE), num_classes=2)
    return [build_net(spec).body.eval() for _ in range(2)]


CODEC, OTHER = AffineCodec.from_range(0, 1), AffineCodec.from_range(0, 2)


def test_bodies_id_changes_with_weights_buffers_order_and_codecs(bodies):
    ids = [
        bodies_digest(bodies, CODEC, [CODEC, CODEC]),
        bodies_digest(bodies[::-1], CODEC, [CODEC, CODEC]),
        bodies_digest(bodies[:1], CODEC, [CODEC]),
        bodies_digest(bodies, OTHER, [CODEC, CODEC]),
        bodies_digest(bodies, CODEC, [OTHER, CODEC]),
        bodies_digest(bodies, CODEC, [CODEC, OTHER]),
        bodies_digest(bodies, AffineCodec(scale=CODEC.scale, zero_point=1), [CODEC, CODEC]),
    ]
    with torch.no_grad():
        weight = bodies[1].get_submodule("layer1.0").conv1.weight
        weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(9.0))
    ids.append(bodies_digest(bodies, CODEC, [CODEC, CODEC]))
    bodies[0].get_submodule("layer1.0").bn1.running_mean[0] += 1e-3
    ids.append(bodies_digest(bodies, CODEC, [CODEC, CODEC]))
    assert len(set(ids)) == len(ids)
    assert all(len(bodies_id) == 64 and set(bodies_id) <= set("0123456789abcdef") for bodies_id in ids)


def test_bodies_id_does_not_change_with_memory_layout_or_mode(bodies):
    expected = bodies_digest(bodies, CODEC, [CODEC, CODEC])
    moved = [copy.deepcopy(body).to(memory_format=torch.channels_last).train().requires_grad_(False) for body in bodies]
    assert bodies_digest(moved, CODEC, [CODEC, CODEC]) == expected


# --- refusals ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_nets": 2, "num_selected": 3}, "P = 3 of N = 2"),
        ({"num_selected": 0}, "P = 0 of N = 3"),
        ({"num_nets": 0}, "N = 0"),
        ({"num_nets": 1025}, "N = 1025"),
        ({"wire_bits": 5}, "--wire-bits 5: choose 8, 4, 3, 2, 1 or auto"),
        ({"answer_bits": 2}, "--answer-bits 2: choose 8, 4 or auto"),
        ({"max_wire_drop_points": -1.0}, "max_wire_drop_points"),
        ({"reg_kind": "angle"}, "--reg-kind angle: choose cosine or linear"),
        ({"reg_over": "al"}, "--reg-over al: choose all or selected"),
        ({"head_for": "none"}, "--head-for none: choose all or selected"),
        ({"head_for": "all", "reg_over": "selected"}, "--head-for all and --reg-over selected"),
        ({"head_for": "all", "noise": "learned"}, "--head-for all and --noise learned"),
        ({"head_for": "all", "defense": "joint"}, "--head-for all has no place in --defense joint"),
        ({"defense": "ensemble"}, "--defense ensemble: choose"),
        ({"noise_mode": "frozen"}, "--noise-mode frozen: choose"),
        ({"noise": "laplace"}, "--noise laplace: choose gaussian, uniform or learned"),
        ({"noise": "learned", "noise_std": 0.0}, "--noise learned needs a --noise-std above 0"),
        ({"dropout": 1.0}, "--dropout 1.0: choose"),
        ({"dropout": math.nan}, "--dropout nan: choose"),
        ({"defense": "none", "dropout": 0.3}, "--dropout have no place in --defense none"),
        ({"defense": "none", "noise": "learned"}, "have no place in --defense none"),
        ({"defense": "none", "noise_mode": "fresh"}, "have no place in --defense none"),
        ({"noise_std": -0.1}, "noise_std"),
        ({"noise_std": math.nan}, "noise_std"),
        ({"reg_weight": math.inf}, "reg_weight"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"epochs_stage1": 0}, "epochs_stage1"),
        ({"epochs_stage3": -1}, "epochs_stage3"),
        ({"batch_size": 1}, "batch_size"),
        ({"train_limit": 15}, "train_limit"),
        ({"seed": -1}, "seed = -1"),
        ({"client_seed": -1}, "client_seed = -1"),
    ],
)
def test_an_impossible_option_is_refused_by_name(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


@pytest.mark.parametrize("values", [{}, {"data": "demo", "typo": 1}, {"data": "demo", "num_nets": "ten"}])
def test_a_stored_config_that_does_not_fit_is_refused(values):
    with pytest.raises(ConfigError, match=r"config\.json"):
        TrainConfig.from_dict(values)


def test_a_config_survives_its_file(settings):
    config = settings(client_seed=2**62, train_limit=32, reg_over="selected")
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arch": "resnet99"},
            "unknown architecture 'resnet99'; known: alexnet, mobilenet_v2, resnet10_half, resnet10_slim",
        ),
        ({"device": "tpu"}, "--device tpu: choose"),
    ],
)
def test_an_impossible_run_is_refused_before_anything_is_written(settings, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(settings(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none(settings, tmp_path):
    with pytest.raises(ConfigError, match="--device cpu"):
        train(settings(device="cuda"), tmp_path / "run")
    assert pick_device("auto") == torch.device("cpu")


def test_images_that_are_too_small_are_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match="images of 7x7 pixels"):
        train(settings(data=save_pair(tmp_path, 16, 4, size=7)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["a folder with a file", "a file"])
def test_an_out_that_holds_something_is_refused_and_kept(settings, tmp_path, what):
    out = tmp_path / "out"
    if what == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="--out"):
        train(settings(), out)
    assert [p.read_text() for p in (tmp_path / "out", tmp_path / "out" / "thesis.tex") if p.is_file()] == ["mine"]


def test_an_empty_folder_may_be_given(settings, run, tmp_path):
    (tmp_path / "out").mkdir(mode=0o755)
    RunFolder.create(tmp_path / "out", settings(), run.arch, run.labels)
    assert mode(tmp_path / "out") == 0o700


def test_a_diverging_training_is_refused_with_advice(settings, tmp_path):
    with pytest.raises(ConfigError, match="lower"):
        train(settings(learning_rate=1e20), tmp_path / "run")


@pytest.mark.parametrize(
    "changes", [{"num_nets": 4}, {"arch": "resnet18"}, {"stem_pool": False}, {"defense": "single"}]
)
def test_stage1_of_another_kind_of_run_is_refused(run, settings, tmp_path, changes):
    with pytest.raises(ConfigError, match="--stage1"):
        train(settings(**changes), tmp_path / "run", stage1_from=run.path)
    assert not (tmp_path / "run").exists()


def test_stage1_of_an_incomplete_run_is_refused_by_file_name(settings, copied, tmp_path):
    (copied / "stage1" / "net_02.safetensors").unlink()
    with pytest.raises(DataError, match=r"copy/stage1/net_02\.safetensors cannot be read"):
        train(settings(), tmp_path / "run", stage1_from=copied)


# --- data on its way into the nets ---


def test_augmenting_only_shifts_and_mirrors():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 16, 20), dtype=torch.uint8, generator=generator)
    before = images.clone()
    moved = augment(images, generator)
    assert moved.shape == images.shape
    assert moved.dtype == torch.uint8
    assert torch.equal(images, before)
    padded = functional.pad(images, [4] * 4, value=128)
    moves = set()
    for image, result in zip(padded, moved, strict=True):
        found = [
            (dy, dx, mirrored)
            for dy in range(9)
            for dx in range(9)
            for mirrored in (False, True)
            if torch.equal(image[:, dy : dy + 16, dx : dx + 20].flip([2] if mirrored else []), result)
        ]
        assert len(found) == 1
        moves.add(found[0])
    assert len(moves) > 6
    assert len({mirrored for _, _, mirrored in moves}) == 2


def test_an_epoch_shows_every_image_once_and_leaves_a_last_batch_of_one_out(tensors):
    for count, expected in ((64, [16] * 4), (35, [16, 16, 3]), (33, [16, 16])):
        data = Tensors(tensors.train_x[:count], torch.arange(count), tensors.test_x, tensors.test_y)
        drawn = list(batches(data, 16, torch.Generator().manual_seed(0)))
        assert [len(x) for x, _ in drawn] == expected
        shown = torch.cat([y for _, y in drawn])
        assert len(shown.unique()) == len(shown) == sum(expected)
        assert not torch.equal(shown, shown.sort().values)


def test_train_limit_takes_the_first_images(pair):
    dataset = data_sets.load(pair)
    limited = Tensors.of(dataset, torch.device("cpu"), train_limit=20)
    np.testing.assert_array_equal(limited.train_x.numpy(), dataset.train_x[:20])
    assert len(limited.train_y) == 20
    assert len(limited.test_x) == 32


def test_pixels_become_exact_8_bit_codes():
    pixels = torch.arange(256, dtype=torch.uint8)
    codec = AffineCodec(scale=1 / 64, zero_point=128)
    np.testing.assert_array_equal(normalise(pixels).numpy(), codec.decode(pixels.numpy()))


# --- the paper's settings ---


@pytest.mark.parametrize(
    ("size", "stem_pool", "expected"),
    [(32, True, (64, 16, 16)), (32, False, (64, 32, 32)), (64, False, (64, 64, 64))],
    ids=["CIFAR-10", "CIFAR-100", "faces"],
)
def test_resnet18_sends_features_of_the_papers_shape(size, stem_pool, expected):
    spec = ArchSpec(name="resnet18", image_size=(size, size), num_classes=10, stem_pool=stem_pool)
    assert feature_shape(spec) == expected


def test_resnet18_is_cut_after_its_first_and_before_its_last_layer():
    net = build_net(ArchSpec(name="resnet18", image_size=(32, 32), num_classes=10), num_selected=4)
    assert sum(p.numel() for p in net.head.parameters()) == 64 * 3 * 9 + 2 * 64
    assert sum(p.numel() for p in net.body.parameters()) == 11_166_976
    assert net.tail.fc.weight.shape == (10, 4 * 512)
    with torch.no_grad():
        assert net.body.eval()(torch.zeros(2, 64, 16, 16)).shape == (2, 512)


def test_a_client_of_its_own_parts_registers_no_body(run):
    wire = run.read_wire().spec
    net = build_net(run.arch, P)
    client = Client(net, torch.zeros(wire.feature_shape), wire, (0, 1), Perturbation())
    assert {name.split(".")[0] for name in client.state_dict()} == {"head", "tail", "noise"}
