"""Presets: what they set, for which nets, and that given options go before theirs."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ensembler.cli import main
from ensembler.protocol.errors import ConfigError
from ensembler.training.config import TrainConfig
from ensembler.training.models import ArchSpec, build_net, feature_shape
from ensembler.training.presets import BALANCED, PRESETS, STRONG, WIDTHS, head_share, preset_options
from ensembler.training.runs import RunFolder


def spec(name="resnet10_slim", side=32, **options):
    return ArchSpec(name=name, image_size=(side, side), num_classes=10, **options)


def squeezed(arch, name="strong", **changes):
    """The net as a preset makes it, with changes to its options."""
    options = preset_options(name, arch) | changes
    return dataclasses.replace(arch, bottleneck=TrainConfig(data="demo", **options).squeezed)


NETS = [
    spec(),
    spec(side=64),
    spec("resnet10_half"),
    spec("vgg16"),
    spec("alexnet"),
    spec("mobilenet_v2"),
    spec(side=16),
]


@pytest.mark.parametrize(("name", "allowed"), [("strong", STRONG), ("balanced", BALANCED)])
@pytest.mark.parametrize("arch", NETS, ids=lambda arch: f"{arch.name}-{arch.image_size[0]}")
def test_what_is_sent_is_small_and_the_head_as_wide_as_its_share_of_the_work_allows(arch, name, allowed):
    made = squeezed(arch, name)
    assert feature_shape(made) == (allowed.channels, 4, 4)
    assert made.bottleneck.bits == 2
    assert head_share(made) <= allowed.head_share
    encoder = tuple(channels + WIDTHS.step * 2**level for level, channels in enumerate(made.bottleneck.encoder))
    assert head_share(squeezed(arch, name, encoder=encoder)) > allowed.head_share


def test_strong_sends_64_bytes_and_balanced_half_as_much_again():
    assert [each.channels * 4 * 4 * 2 // 8 for each in (STRONG, BALANCED)] == [64, 96]


def test_the_share_of_a_head_is_its_part_of_the_undefended_nets_work():
    # conv 3->16 at 32x32; of layer1: two convolutions 16->16 at 16x16; and so on, all but the classifier.
    head = 3 * 9 * 16 * 32 * 32
    body = 2 * 16 * 9 * 16 * 16 * 16
    for narrow, wide, side in ((16, 32, 8), (32, 64, 4), (64, 128, 2)):
        body += (narrow * wide * 9 + wide * wide * 9 + narrow * wide) * side * side
    assert head_share(spec()) == pytest.approx(head / (head + body))


def test_obfuscate_is_the_papers_client():
    assert TrainConfig(data="demo", **preset_options("obfuscate", spec())) == TrainConfig(data="demo")


@pytest.mark.parametrize(
    ("name", "arch", "message"),
    [
        ("stronger", spec(), "--preset stronger: choose obfuscate, balanced, strong"),
        ("strong", spec("vit_small"), "cannot be halved down to 4x4 cells"),
        ("strong", spec(side=24), "cannot be halved down to 4x4 cells"),
        ("strong", spec(head_end="layer4"), "cannot be halved down to 4x4 cells"),
        ("strong", spec(head_end="layer1"), "no encoder after this cut fits into 25% of the net's work"),
    ],
)
def test_what_has_no_preset_is_refused(name, arch, message):
    with pytest.raises(ConfigError, match=message):
        preset_options(name, arch)


def test_every_preset_trains_a_net_that_can_be_built():
    for name in PRESETS:
        config = TrainConfig(data="demo", arch="resnet10_slim", **preset_options(name, spec()))
        build_net(config.arch_spec((32, 32), 10), config.num_selected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--noise", "learned", "--noise-std", "1"], "learned with the selected nets alone; choose other --noise"),
        (["--noise-mode", "fresh"], "--noise-mode does nothing here: --preset strong has --noise-std 0"),
        (["--noise", "uniform"], "give --noise-std, too"),
        (["--reg-kind", "linear"], "give --reg-weight, too"),
    ],
)
def test_an_option_that_a_preset_makes_idle_or_that_undoes_it_is_refused(options, message, tiny_data, tmp_path, capsys):
    common = ["train", "--data", tiny_data, "--arch", "resnet10_slim", "--preset", "strong", "--dry-run"]
    assert main([*common, "--out", str(tmp_path / "r"), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--defense", "single"], ["--defense", "joint"]])
def test_a_preset_goes_with_a_defence_in_which_a_part_of_it_has_no_place(options, tiny_data, tmp_path, capsys):
    command = [
        "train",
        "--data",
        tiny_data,
        "--arch",
        "resnet10_slim",
        "--preset",
        "strong",
        "--out",
        str(tmp_path / "r"),
    ]
    assert main([*command, *options, "--dry-run"]) == 0
    assert main([*command, *options, "--head-for", "all", "--dry-run"]) == 2
    assert "--head-for all" in capsys.readouterr().err


def test_given_options_go_before_the_presets(tiny_data, tmp_path, capsys):
    out = tmp_path / "run"
    common = ["train", "--data", tiny_data, "--arch", "resnet10_slim", "-N", "2", "-P", "1", "--epochs", "1"]
    common += ["--train-limit", "16", "--batch-size", "8", "--preset", "strong"]
    assert main([*common, "--information-weight", "0.5", "--out", str(out)]) == 0
    config = RunFolder.open(out).config
    assert config.bottleneck == (16, 1, 2)
    assert config.encoder
    assert (config.information_weight, config.reg_weight) == (0.5, 0)
    assert main([*common, "--encoder", "8", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["stages"]["stage3"]["time_s"] > 0
    assert main([*common[:-1], "none", "--out", str(tmp_path / "other")]) == 2
    assert "choose obfuscate, balanced, strong" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_what_goes_with_a_bottleneck_goes_with_a_preset_that_has_one(tiny_data, tmp_path, capsys):
    common = ["train", "--data", tiny_data, "--arch", "resnet10_slim", "--dry-run", "--out", str(tmp_path / "run")]
    assert main([*common, "--preset", "strong", "--parties", "2"]) == 0
    assert main([*common, "--preset", "obfuscate", "--parties", "2"]) == 2
    assert "give --bottleneck too" in capsys.readouterr().err
