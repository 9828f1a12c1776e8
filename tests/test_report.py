"""The audit's page: what it says, in which order, and that nothing in it reaches out or gets through."""

from __future__ import annotations

import base64
import copy
import html
import io
import json
import re
import shutil
import stat
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ensembler.privacy import report
from ensembler.protocol.errors import DataError

COUNT, SIDE = 8, 32
HOSTILE = "<script>alert('x')</script>\"><img onerror=y>"
ACCESS_WORDS = {
    0: "images of the same kind, nothing of this system",
    1: "a server: its nets, the architecture, what devices send; it cannot send its own images",
    2: "a server that owns a device of another client: pairs of image and features from it",
    3: "a server that also owns a device: pairs of image and features",
    4: "the device's weights and noise, as after a theft",
}


def attack(name, mean, access=1, control=False, spread=0.0, **more):
    deciles = [round(mean + step, 4) for step in np.linspace(-0.15, 0.1, 11)]
    return {
        "name": name,
        "access": access,
        "access_words": ACCESS_WORDS[access],
        "source": "control" if control else "ours; related: FORA, PCAT, SDAR",
        "words": f"what {name} does, in one sentence of about this length",
        "control": control,
        "ssim": {"mean": mean, "lowest": mean - spread, "highest": mean + spread, "deciles": deciles},
        "psnr_db": {"mean": 23.14, "lowest": 23.14 - 10 * spread, "highest": 23.14 + 10 * spread},
        "mse": 0.005,
        "reidentified": {"mean": 0.914, "lowest": 0.914 - spread, "highest": 0.914 + spread},
        "same_class": {"mean": 0.532, "lowest": 0.532 - spread, "highest": 0.532 + spread},
        "seconds": 170.1,
        "seen": {"steps": 1200, "stages": [{"loss": 0.1}]},
        "chosen_with_ground_truth": False,
        **more,
    }


@pytest.fixture
def document():
    return {
        "version": 1,
        "date": "2026-11-22T09:00:00Z",
        "machine": "2 cores, no GPU",
        "seconds": 212.3,
        "command": "ensembler audit runs/first --bundle out/client --budget quick --seeds 0,1,2",
        "budget": "quick",
        "seeds": [0, 1, 2],
        "subject": {
            "run": "runs/first",
            "bundle": "out/client",
            "bodies_id": "9f" * 16,
            "digests": {"head.onnx": "ab" * 32, "tail.onnx": "cd" * 32},
            "arch": "resnet10_slim",
            "head_end": "stem",
            "image_size": [SIDE, SIDE],
            "feature_shape": [16, 16, 16],
            "wire_bits": 8,
            "bytes_up": 4096,
            "num_nets": 4,
            "num_selected": 2,
            "defense": "ensembler",
            "noise_std": 0.1,
            "noise_mode": "fixed",
        },
        "images": {
            "data": "cifar10:/data/cifar-10-python.tar.gz",
            "auxiliary": 5500,
            "auxiliary_source": "disjoint",
            "observed": 2000,
            "evaluated": 500,
        },
        "attacks": [
            attack("mean-image", 0.12, access=0, control=True),
            attack("shadow-selector", 0.31, spread=0.04, chosen_with_ground_truth=True),
            attack("distribution-matching", 0.83, spread=0.01),
            attack("misaligned-decoder", 0.15, access=0, control=True, spread=0.02),
            attack("oracle-decoder", 0.86, access=3, spread=0.005),
            attack("known-pairs-64", 0.62, access=3, spread=0.02),
        ],
        "not_run": [{"name": "averaging", "why": "the noise is fixed, so there is nothing to average"}],
        "selector": {"batch norm": {"auc": 0.75, "first": True}},
        "sent": {"bytes": 4096, "bytes_of_entropy_at_most": 3071.25, "images_counted": 2500},
        "gates": [
            {"about": "audit", "name": "no-noise", "passed": True, "words": "without noise the oracle reaches 0.95"},
            {
                "about": "distribution-matching",
                "name": "floor",
                "passed": True,
                "words": "the best attack is 0.71 above the mean image",
            },
        ],
        "verdict": {
            "word": "readable",
            "sentence": "The server's operator can read the images.",
            "ssim": 0.83,
            "attack": "distribution-matching",
        },
    }


def pictures():
    """Returns smooth coloured images, (COUNT, SIDE, SIDE, 3)."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    waves = [np.stack([np.sin(9 * x + k), np.cos(7 * y - k), np.sin(6 * (x + y) + 2 * k)], -1) for k in range(COUNT)]
    return (127 + 127 * np.array(waves)).astype(np.uint8)


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes a document's page and returns its text."""

    def written(document, path=tmp_path / "audit.html"):
        images, rng = pictures(), np.random.Generator(np.random.PCG64(0))
        rebuilt = {}
        for one in document["attacks"]:
            share = max(one["ssim"]["mean"], 0.0)
            noise = rng.integers(0, 256, images.shape)
            rebuilt[one["name"]] = (share * images + (1 - share) * noise).astype(np.uint8)
        report.write_report(document, images, rebuilt, path)
        return path.read_text(encoding="utf-8")

    return written


def section(page, title):
    """Returns the part of a page under one heading."""
    return re.search(rf"<h2>{re.escape(title)}</h2>(.*?)</section>", page, re.S).group(1)


WORST_FIRST = [
    "oracle-decoder",
    "distribution-matching",
    "known-pairs-64",
    "shadow-selector",
    "misaligned-decoder",
    "mean-image",
]
LISTS = ["What a server sees", "How close each attack came", "The attacks", "Image by image"]


@pytest.mark.parametrize("title", LISTS)
def test_every_list_begins_with_the_attack_that_reveals_most_and_ends_with_the_controls(document, write, title):
    part = section(write(document), title)
    assert re.findall(r"<strong>([a-z0-9-]+)</strong>", part) == WORST_FIRST
    assert part.count("(control)") == 2


def test_a_control_stands_last_even_when_it_scores_most(document, write):
    document["attacks"][0]["ssim"]["mean"] = 0.99
    names = re.findall(r"<strong>([a-z0-9-]+)</strong>", section(write(document), "The attacks"))
    assert names[-2:] == ["mean-image", "misaligned-decoder"]


def test_the_sections_stand_in_the_order_in_which_they_are_needed(document, write):
    assert re.findall(r"<h2>(.*?)</h2>", write(document)) == [
        *LISTS,
        "Can the server tell which nets count?",
        "Sanity checks",
        "Who could do this",
        "What was not tried",
        "Configuration",
    ]


def test_the_verdict_is_said_in_words_before_anything_else(document, write):
    top = write(document).partition("<h2>")[0]
    for words in (
        "Verdict: readable",
        "can read the images",
        "distribution-matching",
        "0.83",
        "budget: quick",
        "3 seeds",
    ):
        assert words in top


class Markup(HTMLParser):
    """What a browser takes for tags and attributes."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]


def hostile(value):
    """Returns a document with every text replaced; words that choose a branch included."""
    if isinstance(value, dict):
        return {HOSTILE + key if key == "head.onnx" else key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE + value if isinstance(value, str) else value


def test_no_text_of_the_document_becomes_markup(document, write):
    document["subject"]["labels"] = ["cat"]
    markup, page = Markup(), write(hostile(document))
    markup.feed(page)
    assert "script" not in markup.tags
    assert markup.tags.count("img") == 1 + len(document["attacks"])
    assert not [name for name in markup.attributes if name.startswith("on")]
    assert html.escape(HOSTILE) + "runs/first" in page
    assert html.escape(HOSTILE) + "head.onnx" in page
    assert re.findall(r'<section class="verdict (\w+)"', page) == ["inconclusive"]


def test_the_page_fetches_nothing_and_runs_nothing(document, write):
    page = write(document)
    assert not re.search(r"https?://", page)
    assert not re.search(r"<(script|link|iframe|object|embed|base)\b|@import|url\(", page, re.I)
    sources = re.findall(r'\bsrc="(.{15})', page)
    assert sources == ["data:image/png;"] * (1 + len(document["attacks"]))
    assert "default-src 'none'" in page


def test_charts_and_pictures_have_a_text_for_who_does_not_see_them(document, write):
    page = write(document)
    assert 'alt="8 images: the same images as oracle-decoder rebuilt them"' in page
    assert 'aria-label="distribution-matching: mean SSIM 0.83 (0.82 to 0.84)"' in page
    for drawing in re.findall(r"<svg[^>]*>", page):
        assert "aria-label" in drawing or 'aria-hidden="true"' in drawing


def places(drawing):
    """Returns every horizontal place and length of a drawing, in percent."""
    return [float(value) for value in re.findall(r'(?:x|x1|x2|cx|width)="(-?[\d.]+)%"', drawing)]


@pytest.mark.parametrize("mean", [-0.08, -0.93])
def test_a_negative_ssim_is_a_bar_to_the_left_of_zero(document, write, mean):
    document["attacks"].append(attack("inverted", mean, spread=0.03))
    part = section(write(document), "How close each attack came")
    drawing = re.search(r'aria-label="inverted:.*?</svg>', part).group(0)
    zero = float(re.search(r'class="zero" x1="([\d.]+)%', drawing).group(1))
    left, width = map(float, re.search(r'class="mean" x="([\d.]+)%" y="5" width="([\d.]+)%', drawing).groups())
    assert width > 0
    assert left + width == pytest.approx(zero, abs=0.02)
    assert all(0 <= place <= 100 for place in places(part))
    assert f"{mean:.2f} (" in part


def test_no_place_of_a_chart_lies_outside_it(document, write):
    document["attacks"].append(attack("extreme", 0.2))
    document["attacks"][-1]["ssim"]["deciles"] = list(np.linspace(-1.0, 1.0, 11))
    assert all(0 <= place <= 100 for place in places(write(document)))


def test_a_value_that_rounds_to_zero_has_no_sign(document, write):
    document["attacks"].append(attack("nothing", -0.001))
    assert "-0.00" not in write(document)


def test_with_one_seed_there_is_no_spread_and_the_page_says_so(document, write):
    document["seeds"] = [0]
    for one in document["attacks"]:
        one["ssim"]["lowest"] = one["ssim"]["highest"] = one["ssim"]["mean"]
    page = write(document)
    assert "1 seed (0)" in page
    part = section(page, "How close each attack came")
    assert "spread over seeds is not known" in part
    assert "whisker" not in part


def test_floor_and_oracle_are_lines_only_if_they_were_run(document, write):
    part = section(write(document), "How close each attack came")
    assert "dashed line: oracle-decoder" in part
    assert "dotted line: mean-image" in part
    document["attacks"] = [one for one in document["attacks"] if one["name"] not in ("oracle-decoder", "mean-image")]
    part = section(write(document), "How close each attack came")
    assert "dashed" not in part
    assert "dotted" not in part


def test_what_was_chosen_with_ground_truth_is_marked_in_words(document, write):
    rows = section(write(document), "The attacks").split("<tr>")
    assert [("shadow-selector" in row) for row in rows if "Chosen with ground truth" in row] == [True]


def test_how_often_a_net_recognises_the_images_stands_beside_how_alike_they_are(document, write):
    page = write(document)
    assert page.count("91% found again") == len(document["attacks"])
    assert page.count('<td class="figure">53%</td>') == len(document["attacks"])


def test_the_best_images_of_an_attack_are_told_apart_from_its_mean(document, write):
    document["attacks"][1]["ssim"]["deciles"] = [0.1, 0.2, 0.2, 0.25, 0.28, 0.3, 0.3, 0.35, 0.4, 0.62, 0.91]
    assert "median 0.30, best tenth from 0.62, best 0.91" in section(write(document), "Image by image")


def test_a_failed_check_makes_the_figures_inconclusive_in_words_at_the_top_too(document, write):
    whole = write(document)
    assert "sanity check of the whole audit" not in whole
    assert section(whole, "Sanity checks").count("passed</strong>") == 2
    document["gates"][0]["passed"] = False
    page = write(document)
    assert "A sanity check of the whole audit failed" in page.partition("<h2>")[0]
    part = section(page, "Sanity checks")
    assert "failed</strong> · no-noise" in part
    assert "inconclusive" in part
    assert "never a proof of safety" in part


def test_a_failed_check_of_one_attack_puts_its_figure_alone_in_doubt(document, write):
    document["gates"][1]["passed"] = False
    page = write(document)
    for part in (page.partition("<h2>")[0], section(page, "Sanity checks")):
        assert "distribution-matching failed a sanity check: low figures of theirs are inconclusive" in part
        assert "whole audit" not in part


@pytest.mark.parametrize("key", ["gates", "not_run", "attacks"])
def test_an_empty_list_leaves_a_sentence_and_no_empty_markup(document, write, key):
    document[key] = []
    page = write(document)
    assert not re.search(r"<ul></ul>|<li></li>", page)
    assert "lower bound" in section(page, "What was not tried")


def test_only_the_access_levels_that_occur_are_explained(document, write):
    part = section(write(document), "Who could do this")
    assert "operator who also owns" in part
    assert "thief" not in part
    document["attacks"].append(attack("white-box", 0.9, access=4))
    assert "thief" in section(write(document), "Who could do this")


def test_a_verdict_without_an_attack_names_none(document, write):
    document["verdict"] |= {"word": "inconclusive", "ssim": None, "attack": None}
    assert "Decided by" not in write(document)


def test_the_configuration_holds_every_digest_and_what_attacks_report(document, write):
    part = html.unescape(section(write(document), "Configuration"))
    for words in ("ab" * 32, "9f" * 16, document["command"], "2 cores, no GPU", json.dumps({"loss": 0.1})):
        assert words in part


def test_the_document_is_left_as_it_was(document, write):
    before = copy.deepcopy(document)
    write(document)
    assert document == before


def test_each_strip_shows_the_images_side_by_side_unchanged(tmp_path, document, write):
    first = re.search(r'src="data:image/png;base64,([^"]+)"', write(document)).group(1)
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(first))))
    assert strip.shape == (SIDE, COUNT * (SIDE + 2) - 2, 4)
    for index, image in enumerate(pictures()):
        left = index * (SIDE + 2)
        assert np.array_equal(strip[:, left : left + SIDE, :3], image)


def test_the_page_shows_images_so_only_its_owner_may_read_it(tmp_path, document, write):
    write(document)
    assert stat.S_IMODE((tmp_path / "audit.html").stat().st_mode) == 0o600


def test_a_page_that_cannot_be_written_is_a_data_error_that_names_it(tmp_path, document, write):
    with pytest.raises(DataError, match=r"missing/audit\.html cannot be written: No such file"):
        write(document, tmp_path / "missing" / "audit.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(DataError, match=r"folder\.html cannot be written: Is a directory"):
        write(document, tmp_path / "folder.html")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.html"]


@pytest.mark.parametrize("broken", ["png", "disk"])
def test_a_failure_leaves_the_former_page_and_nothing_else(tmp_path, document, write, monkeypatch, broken):
    before = write(document)

    def fail(*_, **__):
        raise OSError(28, "No space left on device") if broken == "disk" else ValueError("no such encoder")

    with monkeypatch.context() as patch:
        patch.setattr(*((report.os, "fsync") if broken == "disk" else (report.Image.Image, "save")), fail)
        with pytest.raises(DataError if broken == "disk" else ValueError, match=r"No space left|no such encoder"):
            write(document)
    assert (tmp_path / "audit.html").read_text(encoding="utf-8") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["audit.html"]


def test_a_path_that_is_no_unicode_is_shown_and_costs_no_report(document, write):
    document["subject"]["run"] = "runs/\udcff"
    assert r"runs/\udcff" in write(document)


# Chromium lays no window out narrower than 500 pixels, so the page is shown in a frame of the width that is meant.
FRAME = """<!DOCTYPE html><body style="margin:0"><iframe style="border:0;width:{width}px;height:{height}px"
srcdoc="{page}"></iframe><output></output><script>onload = () => {{
const root = document.querySelector("iframe").contentDocument.documentElement;
document.querySelector("output").textContent = root.clientWidth + " of " + root.scrollWidth; }}</script>"""


@pytest.mark.parametrize(("width", "height"), [(360, 800), (1280, 900)])
def test_a_browser_shows_the_page_and_nothing_sticks_out(tmp_path, document, write, width, height):
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs chromium or google-chrome")
    document["attacks"][1]["name"] = "an-attack-with-a-name-that-no-line-of-a-phone-can-hold-" + 20 * "x"
    frame, shot = tmp_path / "frame.html", tmp_path / "shot.png"
    frame.write_text(FRAME.format(width=width, height=height, page=html.escape(write(document))), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},{height}", f"--screenshot={shot}"]
    done = subprocess.run([*command, "--dump-dom", frame.as_uri()], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"<output>{width} of {width}</output>" in done.stdout
    picture = Image.open(shot)
    assert picture.size == (width, height)
    assert len(picture.convert("RGB").getcolors(width * height)) > 50
