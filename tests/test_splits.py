"""Where nets can be cut: the parts are the whole, and what cannot be cut is refused with what can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ensembler.cli import main
from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.errors import ConfigError
from ensembler.training.architectures import ARCHITECTURES
from ensembler.training.config import TrainConfig
from ensembler.training.models import ArchSpec, Bottleneck, build_net, feature_shape, traced_net
from ensembler.training.splits import traced, widened

SIZE = (32, 32)
OWN = ("own_nets:sequential", "own_nets:skipping")
nets_table = pytest.mark.parametrize("name", [*ARCHITECTURES, *OWN])


@pytest.fixture(autouse=True)
def _own_nets(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def spec(name, **changes):
    return ArchSpec(**{"name": name, "image_size": SIZE, "num_classes": 3} | changes)


def whole(name):
    """The net before it is cut, in eval mode, with batch norms that are not the identity."""
    torch.manual_seed(0)
    net = traced_net(spec(name))
    for module in net.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    net.module.eval()
    return net


def images(count=2):
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


# --- the parts are the whole ---


@nets_table
@torch.no_grad()
def test_at_every_valid_cut_the_three_parts_compute_what_the_whole_does_bit_for_bit(name):
    net = whole(name)
    wanted = net.module(images())
    tail_start = net.tail_starts[-1]
    tried = 0
    for cut in net.cuts:
        try:
            head, body, tail = net.split(cut.names[0], tail_start)
        except ConfigError as error:
            assert "nothing is left for the server" in str(error)  # noqa: PT017 (a cut behind the tail's start)
            continue
        tried += 1
        features = head.eval()(images())
        assert features.shape[1:] == cut.shape
        assert tail.eval()(body.eval()(features)).tolist() == wanted.tolist()
    assert tried >= 3


@nets_table
def test_every_weight_is_in_exactly_one_part(name):
    net = whole(name)
    parts = net.split(net.cuts[len(net.cuts) // 3].names[0], net.tail_starts[-1])
    owners = [id(p) for part in parts for p in part.parameters()]
    assert len(set(owners)) == len(owners)
    assert set(owners) == {id(p) for p in net.module.parameters()}


@nets_table
def test_every_name_of_a_cut_means_the_same_place(name):
    net = whole(name)
    for cut in net.cuts[:6]:
        shapes = set()
        for alias in cut.names:
            shapes.add(tuple(net.split(alias, net.tail_starts[-1])[0].state_dict()))
        assert len(shapes) == 1


@nets_table
def test_work_and_weights_grow_from_cut_to_cut_and_never_exceed_the_nets(name):
    net = whole(name)
    for before, after in zip(net.cuts, net.cuts[1:], strict=False):
        assert before.macs <= after.macs
        assert before.parameters <= after.parameters
    assert 0 < net.cuts[0].share <= net.cuts[-1].share <= 1
    assert net.cuts[-1].parameters <= sum(t.numel() for t in net.module.state_dict().values()) + 1


def test_the_operations_of_a_convolution_are_counted_as_on_paper():
    (cut,) = [cut for cut in whole("resnet18").cuts if "stem.conv" in cut.names]
    assert cut.macs == 32 * 32 * 64 * 3 * 3 * 3
    assert cut.parameters == 64 * 3 * 3 * 3


@nets_table
@torch.no_grad()
def test_with_p_answers_the_tail_is_p_times_as_wide_and_takes_them_side_by_side(name):
    parts = build_net(spec(name, head_end=whole(name).cuts[1].names[0]), num_selected=3).eval()
    answers = parts.body(parts.head(images()))
    assert answers.ndim == 2
    assert parts.tail(torch.cat([answers] * 3, dim=1)).shape == (2, 3)


def test_a_tail_for_one_answer_keeps_its_weights():
    _, _, tail = whole("resnet10_slim").split("stem", "fc")
    before = tail.fc.weight
    assert widened(tail, 1).fc.weight is before


@torch.no_grad()
def test_no_part_writes_into_what_it_is_given():
    net = whole("own_nets:Overwriting")
    wanted = net.module(images())
    for cut in net.cuts:
        if cut.names[0] == "mean":
            continue
        head, body, tail = net.split(cut.names[0], "fc")
        features = head.eval()(images())
        before = features.clone()
        answers = body.eval()(features)
        assert torch.equal(features, before), cut.names
        assert tail.eval()(answers).tolist() == wanted.tolist()


def test_a_function_that_gives_one_net_again_and_again_is_refused():
    first = traced_net(spec("own_nets:shared"))
    with pytest.raises(ConfigError, match="returned the same net twice"):
        traced_net(spec("own_nets:shared"))
    assert first.cuts


def test_a_function_that_gives_another_net_than_before_is_tried_out_again(monkeypatch):
    import own_nets

    monkeypatch.setattr(own_nets, "changing", own_nets.Skipping, raising=False)
    assert traced_net(spec("own_nets:changing")).cuts
    monkeypatch.setattr(own_nets, "changing", own_nets.Overwriting)
    assert [cut.names[0] for cut in traced_net(spec("own_nets:changing")).cuts][:2] == ["first", "swish"]


def test_a_tail_that_uses_its_linear_layer_twice_is_refused():
    net = traced_net(spec("own_nets:Twice"))
    assert net.tail_starts == ["fc"]
    with pytest.raises(ConfigError, match="square is used more than once"):
        net.split("first", "square")


def test_a_buffer_that_is_not_stored_with_the_net_is_stored_with_its_part():
    _, body, _ = whole("own_nets:skipping").split("first", "fc")
    assert "gain" in body.state_dict()


def test_building_twice_from_one_seed_gives_the_same_weights_though_the_second_is_not_tried_out():
    built = []
    for _ in range(2):
        torch.manual_seed(5)
        built.append(build_net(spec("mobilenet_v2"), num_selected=2).state_dict())
    assert built[0].keys() == built[1].keys()
    assert all(torch.equal(built[0][key], built[1][key]) for key in built[0])


# --- refusals ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_end": "layer9"}, r"no part 'layer9' for --head-end; valid: stem\.conv, .*ensembler cuts"),
        ({"head_end": "layer1.0.conv1"}, r"cannot be cut after layer1\.0\.conv1: 2 values .* cross there; valid: stem"),
        ({"tail_start": "layer9"}, "no part 'layer9' for --tail-start; it can be fc"),
        ({"tail_start": "avgpool"}, r"cannot start its tail at avgpool: .* shape \(128, 2, 2\) crosses there; .* fc"),
        ({"tail_start": "flatten"}, r"shape \(128, 1, 1\) crosses there"),
        ({"head_end": "flatten"}, "nothing is left for the server"),
        ({"head_end": "fc"}, "nothing is left for the server"),
        ({"image_size": (4, 32)}, "8 to 1024"),
    ],
)
def test_a_cut_that_cannot_be_made_is_refused_with_those_that_can(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_net(spec("resnet10_slim", **changes))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Branching", "cannot be followed by torch.fx.*control flow"),
        ("Moody", r"different things in training and evaluation.*nn\.Dropout"),
        ("TwoInputs", "takes 2 arguments"),
        ("OneImage", r"answers a batch of 3 images with \(1, 3\)"),
        ("convolutional", r"with \(3, 3, 32, 32\), logits of shape \(3, 3\) are needed"),
        ("nothing", "returned str, not a torch nn.Module"),
        ("failing", "RuntimeError: no weights here"),
        ("missing", "has no attribute 'missing'"),
    ],
)
def test_an_own_net_that_cannot_be_used_is_refused_by_name(name, message):
    with pytest.raises(ConfigError, match=rf"--arch own_nets:{name}.*{message}"):
        traced_net(spec(f"own_nets:{name}"))


@pytest.mark.parametrize("name", ["no_such_module:net", "resnet999", ":net", "own_nets:"])
def test_an_unknown_architecture_is_refused(name):
    with pytest.raises(ConfigError, match=r"no_such_module|unknown architecture"):
        traced_net(spec(name))


def test_an_own_net_without_a_cut_is_told_which_there_are():
    with pytest.raises(ConfigError, match="needs --head-end, the last part of the head; valid: 0, 1, 2"):
        build_net(spec("own_nets:sequential"))


def test_weights_used_on_both_sides_forbid_the_cut():
    net = traced_net(spec("own_nets:Tied"))
    # After its second use everything is before the cut.
    assert [cut.names[0] for cut in net.cuts] == ["first", "second", "mean"]
    with pytest.raises(ConfigError, match=r"second\.bias is used on both sides; valid: first, second"):
        net.split("third", "fc")


def test_a_tail_whose_first_weights_are_no_linear_layer_is_refused():
    net = traced_net(spec("own_nets:NormalisedTail"))
    assert net.tail_starts == ["fc"]
    with pytest.raises(ConfigError, match=r"first layer with weights is not nn\.Linear"):
        net.split("first", "norm")


def test_images_the_net_does_not_take_are_refused():
    with pytest.raises(ConfigError, match="does not take images of 16x16 pixels"):
        traced(nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)), "the net", (16, 16), 3)


# --- the bottleneck ---


def test_a_bottleneck_leaves_the_asked_channels_at_a_fraction_of_the_size():
    squeezed = spec("resnet10_slim", head_end="layer2", bottleneck=Bottleneck(channels=8, stride=2, bits=2))
    assert feature_shape(squeezed) == (8, 4, 4)
    net = build_net(squeezed, 2)
    assert net.body(net.head(images())).shape == (2, 128)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_bottlenecks_codec_keeps_a_normal_variable_best_where_batch_norm_puts_it(bits):
    codec = Bottleneck(channels=1, stride=1, bits=bits).codec
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).numpy()
    middle = codec.scale / 2

    def error(scale):
        tried = AffineCodec(scale=scale, zero_point=codec.zero_point, bits=bits)
        shifted = x + scale / 2
        return float(((tried.decode(tried.encode(shifted)) - shifted) ** 2).mean())

    assert codec.low + codec.high == pytest.approx(2 * middle, rel=1e-6)
    assert all(error(codec.scale) < error(float(torch.tensor(codec.scale * f))) for f in (0.8, 1.25))


@pytest.mark.parametrize(
    ("bottleneck", "message"),
    [
        ((8, 2), "--bottleneck: give channels,stride,bits"),
        ((0, 2, 2), "--bottleneck 0,2,2: give channels"),
        ((8, 0, 2), "--bottleneck 8,0,2: give channels"),
        ((8, 2, 5), "--bottleneck 8,2,5: give channels"),
    ],
)
def test_an_impossible_bottleneck_is_refused(bottleneck, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(data="demo", bottleneck=bottleneck)


def test_an_encoder_halves_the_map_once_for_each_number_and_costs_the_body_nothing():
    plain = spec("resnet10_slim", bottleneck=Bottleneck(channels=8, stride=4, bits=1))
    encoded = spec("resnet10_slim", bottleneck=Bottleneck(channels=8, stride=1, bits=1, encoder=(20, 40)))
    assert feature_shape(encoded) == feature_shape(plain) == (8, 4, 4)
    nets = build_net(plain), build_net(encoded)
    shapes = [[tuple(parameter.shape) for parameter in net.body.parameters()] for net in nets]
    assert shapes[0] == shapes[1]
    channels = [tuple(p.shape[:2]) for p in nets[1].head.parameters() if p.dim() == 4]
    assert channels == [(16, 3), (20, 16), (20, 20), (40, 20), (40, 40), (8, 40)]


@pytest.mark.parametrize("encoder", [(0,), (5000,), (8,) * 7])
def test_an_impossible_encoder_is_refused(encoder):
    with pytest.raises(ConfigError, match=r"--encoder .*: give channels"):
        TrainConfig(data="demo", bottleneck=(8, 1, 2), encoder=encoder)


def test_an_encoder_without_a_bottleneck_is_refused():
    with pytest.raises(ConfigError, match="give --bottleneck too"):
        TrainConfig(data="demo", encoder=(8,))


def test_other_bits_beside_a_bottleneck_are_refused():
    with pytest.raises(ConfigError, match="third number is the wire's bits"):
        TrainConfig(data="demo", bottleneck=(8, 2, 2), wire_bits=4)


@pytest.mark.parametrize(("name", "head_end"), [("resnet10_slim", "layer2"), ("vit_small", "blocks.0")])
def test_features_that_the_stride_does_not_divide_are_refused(name, head_end):
    squeezed = Bottleneck(channels=8, stride=3, bits=2)
    with pytest.raises(ConfigError, match=r"features of shape \(.*\) cannot be cut by a stride of 3"):
        build_net(spec(name, head_end=head_end, bottleneck=squeezed))


# --- ensembler cuts ---


def test_the_command_lists_the_cuts_with_their_costs(capsys):
    assert main(["cuts", "resnet10_slim"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "head end"
    (stem,) = [line for line in lines if line.startswith("stem *")]
    assert stem.split() == ["stem", "*", "stem.pool", "16x16x16", "4096", "0.44", "10.1%", "497"]
    assert "tail start: fc" in lines


def test_the_command_lists_an_own_nets_cuts_for_scripts(capsys):
    assert main(["cuts", "own_nets:skipping", "--num-classes", "3", "--image-size", "24x32", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [cut["names"][0] for cut in document["cuts"]][:3] == ["first", "relu", "add"]
    assert document["cuts"][0]["feature_shape"] == [8, 12, 16]
    assert document["tail_starts"] == ["gelu", "fc"]


def test_without_a_name_the_command_lists_the_architectures(capsys):
    assert main(["cuts"]) == 0
    assert set(ARCHITECTURES) <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    "arguments", [["cuts", "resnet99"], ["cuts", "resnet18", "--image-size", "32"], ["cuts", "own_nets:Branching"]]
)
def test_what_the_command_cannot_list_is_an_error_of_the_input(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("ensembler: ")
