"""Operators that are each sent channels of their own: training, bundles, a real client, and what each of them sees."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import brief_plan, open_export

from ensembler.cli import main
from ensembler.client import EdgeClient
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.export.pipeline import export
from ensembler.privacy.attacks import ATTACKS
from ensembler.privacy.attacks.base import AttackImpossibleError
from ensembler.privacy.decoder import pixels
from ensembler.privacy.identity import Identifier
from ensembler.privacy.scene import Access, make_scene
from ensembler.protocol.errors import BundleError, ConfigError
from ensembler.protocol.manifest import load_client, load_server, parse_client, to_json
from ensembler.protocol.messages import RESULT, Message, decode, encode
from ensembler.training import data
from ensembler.training.fixing import mixed_features
from ensembler.training.models import normalise
from ensembler.training.operators import Hearing, held, party_of, party_sizes
from ensembler.training.runs import RunFolder
from ensembler.training.stages import drawn_selector, load_bodies, load_stage1, stage2, train
from ensembler.training.stages import load_client as trained_client
from ensembler.training.wire import fake_quantise
from ensembler.transport.inprocess import InProcessTransport

pytestmark = pytest.mark.usefixtures("one_thread")

SMALLEST = {"num_nets": 3, "num_selected": 2, "parties": 2, "bottleneck": (4, 2, 4), "head_for": "all"}
# With as few images, without another device, and for an operator alone that has two nets.
IMPOSSIBLE = ("known-pairs-1000", "other-device", "shadow-colluding", "shadow-subsets")
OPEN = ("--min-sqnr-db", "0", "--max-accuracy-drop", "100")


@pytest.fixture(scope="module")
def settings(configs, tiny_data):
    return configs(data=tiny_data, epochs_stage1=1, epochs_stage3=1, learning_rate=0.05, **SMALLEST)


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    """Three nets of two operators: the first two hear channels 0 and 1, the third 2 and 3."""
    folder = tmp_path_factory.mktemp("divided") / "run"
    train(settings(), folder)
    return RunFolder.open(folder)


@pytest.fixture(scope="module")
def out(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "out"
    assert main(["export", str(run.path), "--out", str(folder), "--plaintext", *OPEN]) == 0
    return folder


@pytest.fixture(scope="module")
def running(out, serve):
    with serve(out / "server_0", "--plaintext") as (first, _), serve(out / "server_1", "--plaintext") as (second, _):
        yield [first, second]


# --- which net is whose ---


@pytest.mark.parametrize(("nets", "parties"), [(1, 1), (3, 2), (4, 2), (7, 3), (5, 5)])
def test_nets_are_divided_evenly_and_follow_one_another(nets, parties):
    sizes = party_sizes(nets, parties)
    assert sum(sizes) == nets
    assert len(sizes) == parties
    assert max(sizes) - min(sizes) <= 1
    owners = [party_of(position, sizes) for position in range(nets)]
    assert owners == sorted(owners)
    assert [owners.count(party) for party in range(parties)] == sizes


def test_a_body_hears_its_operators_channels_and_nothing_else(run):
    bodies = load_bodies(run)
    assert [body.channels for body in bodies] == [(0, 2), (0, 2), (2, 4)]
    features = torch.randn(2, *run.read_wire().spec.feature_shape)
    for body in bodies:
        first, end = body.channels
        silenced = torch.zeros_like(features)
        silenced[:, first:end] = features[:, first:end]
        assert torch.equal(body(features), body(silenced))
        assert not torch.equal(body(features), body(features - silenced))


def test_what_stands_for_features_to_come_has_each_operators_channels_from_its_own_heads(run, tiny_data):
    nets, codec = load_stage1(run), run.read_wire().spec.feature_codec
    images = torch.from_numpy(data.load(tiny_data).train_x[:8])

    @torch.inference_mode()
    def sent(item, some):
        return fake_quantise(item.perturbed(item.net.head(normalise(some))), codec)

    first = torch.cat([sent(nets[0], images[::2]), sent(nets[1], images[1::2])])
    expected = torch.cat([first[:, :2], sent(nets[2], images)[:, 2:]], dim=1)
    torch.testing.assert_close(mixed_features(nets, codec, images), expected, rtol=0, atol=1.01 * codec.scale)
    assert float((mixed_features(nets, codec, images) == expected).float().mean()) > 0.99


def test_the_order_is_shuffled_within_an_operators_nets_alone(settings, run, tmp_path):
    orders = {run.read_wire().order}
    for attempt in range(12):  # two orders are possible
        again = RunFolder(tmp_path / str(attempt))
        train(settings(train_limit=16, wire_bits=4, answer_bits=4), again.path, stage1_from=run.path)
        orders.add(again.read_wire().order)
    assert orders == {(0, 1, 2), (1, 0, 2)}


def test_every_operator_has_a_selected_net(settings):
    drawn = {stage2(settings()).selector for _ in range(100)}
    assert drawn == {(0, 2), (1, 2)}


def test_every_selector_in_which_each_operator_has_a_net_is_as_likely():
    sizes, times = [3, 2, 1], 4000
    drawn = Counter(drawn_selector(sizes, 4) for _ in range(times))
    sets = [
        found
        for found in itertools.combinations(range(6), 4)
        if {party_of(position, sizes) for position in found} == {0, 1, 2}
    ]
    assert set(drawn) == set(sets)
    expected = times / len(sets)
    # Chi-squared of that many sets, 6 deviations above its mean.
    surprise = sum((drawn[found] - expected) ** 2 / expected for found in sets)
    assert surprise < len(sets) + 6 * math.sqrt(2 * len(sets))


def test_many_operators_with_a_net_selected_each_are_drawn_at_once():
    selector = drawn_selector([2] * 32, 32)  # in one of 400 million sets of 32 everybody has one
    assert [position // 2 for position in selector] == list(range(32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parties": 0}, "--parties 0: choose 1 to 3"),
        ({"parties": 4}, "--parties 4: choose 1 to 3"),
        ({"bottleneck": None}, "divides the channels of a bottleneck: give --bottleneck"),
        ({"bottleneck": (5, 2, 4)}, "--parties 2: 5 channels cannot be divided evenly"),
        ({"num_selected": 1}, "P = 1 for 2 operators"),
        ({"defense": "single", "head_for": "selected"}, "--parties has no place in --defense single"),
    ],
)
def test_what_cannot_be_divided_is_refused(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_a_further_client_has_as_many_operators(settings, run, tmp_path):
    with pytest.raises(ConfigError, match="-N and --parties"):
        train(settings(parties=1), tmp_path / "other", stage1_from=run.path)


# --- bundles ---


def test_an_operators_bundle_takes_its_channels(run, out):
    manifest, whole = load_client(out / "client"), run.read_wire().spec
    servers = [load_server(out / f"server_{index}") for index in range(2)]
    assert [party.channels for party in manifest.parties] == [(0, 2), (2, 4)]
    assert [server.wire.feature_shape for server in servers] == [(2, *whole.feature_shape[1:])] * 2
    assert [server.wire.num_nets for server in servers] == [2, 1]
    assert manifest.wire.feature_shape == whole.feature_shape
    parity = json.loads((out / "parity.json").read_text())
    assert parity["accuracy_artifact"] >= 0


def test_a_client_is_answered_as_torch_answers(run, out, running, tiny_images):
    trained, bodies = trained_client(run), load_bodies(run)
    codec = trained.wire.feature_codec
    runtime = EdgeRuntime(out / "client")
    codes = runtime.encode(tiny_images[:8])
    with EdgeClient(out / "client", running, plaintext=True) as edge:
        found = np.stack([one.logits for one in edge.predict_batch(list(tiny_images[:8]))])
        info = edge.info()
    with torch.no_grad():
        features = torch.from_numpy(codec.decode(codes))
        answers = torch.stack([bodies[k](features) for k in trained.selector], 1)
        expected = trained.combine(answers).numpy()
    assert np.abs(found - expected).max() < 0.15 * np.abs(expected).max()
    assert info.payload_bytes_up == trained.wire.bytes_up  # together, not each


def test_an_operator_is_sent_its_channels_alone_under_the_same_id(out, tiny_images):
    seen = {}

    def handler(index):
        wire = load_server(out / f"server_{index}").wire

        def handle(frames):
            message = decode(frames)
            seen[index] = message
            tensor = np.zeros((len(message.tensor), wire.num_nets, wire.answer_width), np.uint8)
            answer = Message(
                operation=RESULT, request_id=message.request_id, bodies_id=message.bodies_id, tensor=tensor
            )
            return [encode(answer)]

        return handle

    transports = [InProcessTransport(handler(index)) for index in range(2)]
    with EdgeClient(out / "client", ["a", "b"], transport=transports) as edge:
        edge.predict(tiny_images[0])
    codes = EdgeRuntime(out / "client").encode(tiny_images[:1])
    for index in range(2):
        assert np.array_equal(seen[index].tensor, codes[:, 2 * index : 2 * index + 2])
    assert seen[0].request_id == seen[1].request_id


@pytest.mark.parametrize(
    ("second", "words"),
    [([1, 4], "are sent the same channels"), ([0, 2], "are sent the same channels"), (None, "of some operators only")],
)
def test_an_operator_that_would_hear_what_another_hears_is_refused(out, second, words):
    document = json.loads((out / "client" / "manifest.json").read_text())
    document["parties"][1]["channels"] = second
    if second is None:
        del document["parties"][1]["channels"]
    with pytest.raises(BundleError, match=words):
        parse_client(json.dumps(document).encode())


@pytest.mark.parametrize("channels", [[0], [0, 5], [2, 2], [-1, 2], ["0", "2"], {"0": 2}, True])
def test_channels_that_are_not_there_are_refused(out, channels):
    document = json.loads((out / "client" / "manifest.json").read_text())
    document["parties"][0]["channels"] = channels
    with pytest.raises(BundleError, match="channels"):
        parse_client(json.dumps(document).encode())


def test_the_manifest_survives_its_file(out):
    manifest = load_client(out / "client")
    assert parse_client(to_json(manifest)) == manifest


def test_another_number_of_operators_than_was_trained_is_refused(run, tmp_path, capsys):
    assert main(["export", str(run.path), "--out", str(tmp_path / "x"), "--parties", "3", *OPEN]) == 2
    assert "the run was trained for 2" in capsys.readouterr().err


def test_a_second_client_fits_the_operators(settings, run, out, tmp_path):
    second = tmp_path / "second"
    train(settings(), second, stage1_from=run.path)
    bundles = (out / "server_0", out / "server_1")
    export(second, tmp_path / "out", open_export(server_bundles=bundles))
    assert load_client(tmp_path / "out" / "client").parties == load_client(out / "client").parties


def test_a_program_of_bodies_takes_its_channels(run, tmp_path):
    export(run.path, tmp_path, open_export(server_format="torch"))
    assert load_server(tmp_path / "server_1").wire.feature_shape[0] == 2


# --- what they see ---


@pytest.fixture(scope="module")
def scenes(run, out, audit_images):
    """By the operators who share what they see."""
    options = {"data": audit_images, "observed": 128, "evaluated": 32}
    chosen = {"first": [0], "second": [1], "both": [0, 1], "all": None}
    return {name: make_scene(run.path, out / "client", coalition=them, **options) for name, them in chosen.items()}


def test_an_operator_sees_its_channels_and_its_nets(run, scenes):
    everything = scenes["all"]
    for name, index in (("first", 0), ("second", 1)):
        scene = scenes[name]
        part = slice(2 * index, 2 * index + 2)
        assert torch.equal(scene.arrived, everything.arrived[:, part])
        assert torch.equal(scene.everything.observed, everything.everything.observed[:, part])
        assert torch.equal(scene.everything.send(scene.evaluated), scene.arrived)
        assert scene.everything.client is None
        assert scene.everything.wire.bytes_up * 2 == everything.everything.wire.bytes_up
    nets = load_bodies(run)
    (mine,) = scenes["second"].everything.bodies
    assert held(mine) is not nets[2]
    assert torch.equal(mine(scenes["second"].arrived), nets[2](everything.arrived))
    selected = set(trained_client(run).selector)
    assert {*scenes["first"].selector} == selected & {0, 1}
    assert scenes["second"].selector == (0,)


def test_all_operators_together_see_what_one_would(scenes):
    both, everything = scenes["both"], scenes["all"]
    assert torch.equal(both.arrived, everything.arrived)
    for mine, its in zip(both.everything.bodies, everything.everything.bodies, strict=True):
        assert isinstance(mine, Hearing)
        assert torch.equal(mine(both.arrived), its(everything.arrived))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_works_with_a_part_of_the_channels(scenes, name):
    scene, attack = scenes["first"], ATTACKS[name]
    plan = replace(brief_plan(), num_nets=2)
    try:
        finding = attack.run(scene.view(attack.ACCESS), plan)
    except AttackImpossibleError:
        assert attack.ACCESS == Access.WHITE_BOX or name in IMPOSSIBLE
        return
    for reconstruct in finding.variants.values():
        assert reconstruct(scene.filmed(finding.film)[:3]).shape == (3, 3, 16, 16)


def test_who_judges_what_was_read_sees_the_codes_of_the_bottleneck_alone(run, out, audit_images):
    scene = make_scene(run.path, out / "client", data=audit_images, observed=128, evaluated=32)
    truth = pixels(scene.evaluated)
    found, _ = Identifier(scene).judge(truth)
    assert found.float().mean() > 0.9
    codec = scene.client.wire.feature_codec
    coarse = replace(codec, scale=float(np.float32(1e6 * codec.scale)))
    scene.client.wire = replace(scene.client.wire, feature_codec=coarse)  # which tells no two images apart
    found, _ = Identifier(scene).judge(truth)
    assert found.sum() <= 1


@pytest.mark.parametrize("coalition", [[], [2], [0, 0], [1, 0], [-1]])
def test_a_coalition_of_others_is_refused(run, out, audit_images, coalition):
    with pytest.raises(ConfigError, match="has 2 operators: name some of 1 to 2"):
        make_scene(run.path, out / "client", data=audit_images, coalition=coalition)


def test_the_command_audits_a_coalition(run, out, audit_images, tiny_budget, tmp_path, capsys):
    report = tmp_path / "report.html"
    given = ["--run", str(run.path), "--data", audit_images, "--budget", "quick", "--out", str(report)]
    assert main(["audit", str(out / "client"), *given, "--operators", "2", "--json"]) == 0
    document = json.loads(report.with_suffix(".json").read_text())
    assert document["subject"]["operators"] == "2 of 2 share what they see"
    assert document["sent"]["bytes"] * 2 == load_client(out / "client").wire.bytes_up
    assert "2 of 2 share" in report.read_text()
    capsys.readouterr()
    assert main(["audit", str(out / "client"), *given, "--operators", "one"]) == 2
    assert "give numbers from 1" in capsys.readouterr().err
