"""The audit's report as one HTML page: verdict, pictures, charts, tables, and what they do and do not mean.

One file that fetches nothing and runs nothing: styles inline, pictures as data, charts as SVG. It holds images of the
owner, so it is written for the owner alone. Every text of the document is escaped, for a path may be hostile. Charts
state lengths in percent and texts in pixels, so that they fit a phone and their letters do not shrink with them.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ensembler.edge_runtime.card import VERDICTS
from ensembler.privacy.card import AUDIT, FLOOR, ORACLE
from ensembler.protocol.errors import DataError

Pixels = npt.NDArray[np.uint8]
Attack = Mapping[str, Any]

EDGE = 5.0  # percent of a chart's width at both ends, where half of the first and of the last number stand

LIMITS = (
    "An audit is a lower bound on what leaks. Attacks that were not tried, or that nobody has published yet, may be "
    "stronger than the ones on this page. A low figure says that these attacks failed. It does not say that the images "
    "are safe."
)
ACCESS = {
    0: "It has images of the same kind, and nothing of this system. What it scores is what anybody scores without "
    "reading a single feature, so it is what the other attacks are to be compared with.",
    1: "This is the server's operator. It computes as agreed and keeps what it gets: its own nets, the architecture "
    "and the features of every image that a device sends. It cannot send images of its own through a device.",
    2: "This is an operator who also owns a device of another client of the same server. It sees which features come "
    "of its own images there, and hopes that they say something of this client's.",
    3: "This is an operator who also owns, rents or has borrowed one device. It sends its own images through that "
    "device and sees which features come of them.",
    4: "This is a thief, or a program on the device. It has the weights and the noise that the device computes with, "
    "and with them it can also read features that the server kept from earlier days.",
}
MEASURES = (
    "<p><strong>SSIM</strong> compares the structure of two pictures, neighbourhood by neighbourhood: 1 is the same "
    "picture, about 0 is nothing in common, and below 0 light and dark tend to be swapped.</p>"
    "<p><strong>PSNR</strong> states the error of the pixels in decibels (dB): the higher, the closer to the original, "
    "and 6 dB more is half the error.</p>"
    "<p><strong>Found again</strong> is the share of reconstructions that a net names: the client's own, which no "
    "attacker controls, finds the image they were made from among all the judged ones. "
    "<strong>Same class</strong> is the share in which that net sees what it sees in the original.</p>"
)

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #525a63; --page: #fff; --card: #f3f5f7; --rule: #c9ced4;
  --bar: #4f8ad0; --box: #a9c7ea; --control: #6b737c; --bad: #b3261e; --bad-card: #fdeae8; --warn: #8a5300;
  --warn-card: #fff2dc; --calm: #2463ad; --calm-card: #e8f1fb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaed; --soft: #aab2bb; --page: #14171a; --card: #1f2428;
  --rule: #464d55; --bar: #3d7cc0; --box: #2d527c; --control: #98a1ab; --bad: #ff9a90; --bad-card: #43201d;
  --warn: #ffc46b; --warn-card: #3d2d12; --calm: #8fc0fa; --calm-card: #1b2f47; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--rule); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 0; }
p, ul { max-width: 44rem; margin: .5rem 0; } ul { padding-left: 1.2rem; }
.soft { color: var(--soft); }
.verdict { border: 1px solid; border-left-width: .6rem; border-radius: .4rem; padding: .8rem 1rem; }
.verdict p { color: var(--ink); } .verdict .word { font-size: 1.35rem; font-weight: 700; margin: 0; color: inherit; }
.readable, .failed { color: var(--bad); } .verdict.readable { background: var(--bad-card); }
.recognisable { color: var(--warn); } .verdict.recognisable { background: var(--warn-card); }
.obscured, .passed { color: var(--calm); } .verdict.obscured { background: var(--calm-card); }
.inconclusive { color: var(--soft); background: var(--card); }
.scroll { overflow-x: auto; margin: .8rem 0; } .scroll:focus-visible { outline: 2px solid var(--bar); }
.row { margin-bottom: .7rem; } .row > div { position: sticky; left: 0; width: min(100%, 20rem); }
.row img { display: block; width: 100%; height: auto; image-rendering: pixelated; }
.bar { margin: .7rem 0 0; } .bar > div { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; }
.bar > div span:last-child { margin-left: auto; text-wrap: balance; }
svg { display: block; width: 100%; height: 24px; }
svg text { font-size: 13px; fill: var(--soft); text-anchor: middle; }
.mean { fill: var(--bar); } .control .mean { fill: none; stroke: var(--control); stroke-width: 2; }
.whole { fill: var(--box); } .control .whole { fill: var(--rule); }
line { stroke: var(--ink); stroke-width: 2; } .zero, .tick { stroke: var(--soft); stroke-width: 1; }
.dotted { stroke-dasharray: 2 3; } .dashed { stroke-dasharray: 7 4; } .dot { fill: var(--page); stroke: var(--ink);
  stroke-width: 2; }
.key { list-style: none; padding: 0; } .key li { display: flex; gap: .6rem; }
.key svg { flex: none; width: 34px; height: 24px; }
table { border-collapse: collapse; font-size: .94rem; width: 100%; overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: .45rem .8rem .45rem 0; border-bottom: 1px solid var(--rule); }
.wide { min-width: 12rem; } .name { min-width: 8rem; overflow-wrap: anywhere; } .figure { white-space: nowrap; }
.facts th { width: 11rem; font-weight: 400; color: var(--soft); } .facts td { overflow-wrap: anywhere; }
pre { white-space: pre-wrap; background: var(--card); padding: .6rem; border-radius: .3rem; font-size: .88rem; }
summary { cursor: pointer; padding: .4rem 0; }
@media (min-width: 44rem) { .row { display: flex; align-items: center; gap: 1rem; }
  .row > div { flex: 0 0 12rem; background: var(--page); } .row img { flex: 1 1 0; } }
@media (max-width: 30rem) { .facts th, .facts td { display: block; width: auto; }
  .facts th { border: 0; padding: .4rem 0 0; } .facts td { padding-top: 0; } }
"""


def write_report(
    document: dict[str, Any], originals: Pixels, reconstructions: Mapping[str, Pixels], path: Path
) -> None:
    """Writes the page, whole or not at all; it is readable by its owner alone, for it shows the images.

    Args:
        document: the audit's result, as in its JSON.
        originals: ``(k, H, W, 3)`` uint8, the images that the page shows.
        reconstructions: what each attack of the document made of them, by the attack's name, shaped like ``originals``.
        path: of the page.

    Raises:
        DataError: the file cannot be written.
    """
    attacks = _ordered(document["attacks"])
    parts = [
        _head(document),
        _verdict(document),
        _pictures(attacks, originals, reconstructions),
        _chart(attacks, len(document["seeds"])),
        _table(attacks),
        _spread(attacks, document["images"]["evaluated"]),
        _selector(document["selector"]),
        _gates(document["gates"]),
        _explained(attacks),
        _not_run(document["not_run"]),
        _configuration(document, attacks),
        "</body>\n</html>\n",
    ]
    # A path with bytes that are no UTF-8 arrives as lone surrogates: show them, rather than lose the report.
    _replace(path, "\n".join(parts).encode("utf-8", "backslashreplace"))


def _replace(path: Path, content: bytes) -> None:
    """Puts ``content`` at ``path`` in one step."""
    temporary: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=".report-", suffix=".tmp", dir=path.parent)  # mode 0600
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path} cannot be written: {reason}; give a file in a folder that has room for it") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _ordered(attacks: Iterable[Attack]) -> list[Attack]:
    """Returns the attacks, the one that reveals most first and the controls after all others."""
    return sorted(attacks, key=lambda attack: (bool(attack["control"]), -attack["ssim"]["mean"], attack["name"]))


def _text(value: object) -> str:
    return html.escape(str(value))


def _number(value: float, digits: int = 2) -> str:
    return f"{value:z.{digits}f}"  # z: no "-0.00"


def _over_seeds(figures: Mapping[str, Any], digits: int = 2) -> str:
    """Returns a mean, and the lowest and highest seed if they differ."""
    mean, lowest, highest = (_number(figures[key], digits) for key in ("mean", "lowest", "highest"))
    return mean if figures["lowest"] == figures["highest"] else f"{mean} ({lowest} to {highest})"


def _share(figures: Mapping[str, Any]) -> str:
    return f"{100 * figures['mean']:.0f}%"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _label(attack: Attack) -> str:
    return f"<strong>{_text(attack['name'])}</strong>" + (" (control)" if attack["control"] else "")


def _section(title: str, *parts: str) -> str:
    return "\n".join((f"<section>\n<h2>{title}</h2>", *parts, "</section>"))


def _scrolling(name: str, content: str) -> str:
    """Returns what may be wider than the screen in a box of its own, which the keyboard can reach and scroll."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(name)}">{content}</div>'


def _head(document: Mapping[str, Any]) -> str:
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # should a text slip through, it stays a text
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Privacy audit of {_text(document['subject']['run'])}</title>\n<style>{STYLE}</style>\n"
        "</head>\n<body>\n<h1>Privacy audit: what a server can see of the images</h1>"
    )


def _verdict(document: Mapping[str, Any]) -> str:
    verdict, seeds = document["verdict"], document["seeds"]
    style = verdict["word"] if verdict["word"] in VERDICTS else "inconclusive"
    lines = [
        f'<section class="verdict {style}" aria-label="Verdict">',
        f'<p class="word">Verdict: {_text(verdict["word"])}</p>\n<p>{_text(verdict["sentence"])}</p>',
    ]
    if verdict["attack"] is not None and verdict["ssim"] is not None:
        lines.append(f"<p>Decided by {_text(verdict['attack'])}, with a mean SSIM of {_number(verdict['ssim'])}.</p>")
    if doubt := _doubt(document["gates"]):
        lines.append(f"<p>{doubt}</p>")
    lines.append("</section>")
    drawn = f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'} ({_text(', '.join(map(str, seeds)))})"
    lines.append(f'<p class="soft">{_text(document["date"])} · budget: {_text(document["budget"])} · {drawn}</p>')
    return "\n".join(lines)


def _doubt(gates: Sequence[Mapping[str, Any]]) -> str:
    """Returns what failed checks mean for the figures; empty if none failed."""
    about = {gate["about"] for gate in gates if not gate["passed"]}
    if AUDIT in about:
        return (
            "A sanity check of the whole audit failed: the figures on this page are inconclusive. They may be too low, "
            "and they are never a proof of safety."
        )
    if about:
        return f"{_text(', '.join(sorted(about)))} failed a sanity check: low figures of theirs are inconclusive."
    return ""


def _pictures(attacks: Sequence[Attack], originals: Pixels, reconstructions: Mapping[str, Pixels]) -> str:
    rows = [_row("<strong>What the device saw</strong>", originals, "the originals")]
    for attack in attacks:
        found = f"{_share(attack['reidentified'])} found again"
        label = f"{_label(attack)}<br>mean SSIM {_number(attack['ssim']['mean'])}, {found}"
        rows.append(_row(label, reconstructions[attack["name"]], f"the same images as {attack['name']} rebuilt them"))
    return _section(
        "What a server sees",
        "<p>The first row are images of the audit. Each row below is what one attack made of what the device sent for "
        "them. The attack that reveals most comes first, controls come last.</p>",
        # All rows scroll together once an image would be narrower than 40 pixels, so that columns stay comparable.
        _scrolling(
            "Originals and reconstructions", f'<div style="min-width:{40 * len(originals)}px">{"".join(rows)}</div>'
        ),
    )


def _row(label: str, images: Pixels, alt: str) -> str:
    """Returns one labelled strip."""
    count = len(images)
    picture = f'<img src="{_strip(images)}" alt="{count} images: {_text(alt)}" style="max-width:{120 * count}px">'
    return f'<div class="row"><div>{label}</div>{picture}</div>\n'


def _strip(images: Pixels) -> str:
    """Returns ``(k, H, W, 3)`` side by side, with transparent gaps, as the address of a PNG."""
    count, height, width, _ = images.shape
    gap = max(1, width // 16)
    strip = np.zeros((height, count * (width + gap) - gap, 4), np.uint8)
    for index, image in enumerate(images):
        left = index * (width + gap)
        strip[:, left : left + width] = np.dstack((image, np.full((height, width), 255, np.uint8)))
    packed = io.BytesIO()
    Image.fromarray(strip).save(packed, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode("ascii")


def _at(value: float, low: float) -> float:
    """Returns where ``value`` stands on a scale from ``low`` to 1, in percent of the chart's width."""
    share = (min(max(value, low), 1.0) - low) / (1.0 - low)
    return EDGE + (100 - 2 * EDGE) * share


def _lower_end(values: Iterable[float]) -> float:
    """Returns where a scale has to begin: at 0, or at the fifth below the smallest value."""
    return min(0.0, math.floor(5 * min(values, default=0.0)) / 5)


def _line(x: float, style: str, top: int = 0, bottom: int = 24) -> str:
    return f'<line class="{style}" x1="{x:.2f}%" x2="{x:.2f}%" y1="{top}" y2="{bottom}"/>'


def _span(left: float, right: float, y: int = 12) -> str:
    return f'<line x1="{left:.2f}%" x2="{right:.2f}%" y1="{y}" y2="{y}"/>'


def _block(one: float, other: float, style: str, top: int, height: int) -> str:
    width = abs(other - one)
    return f'<rect class="{style}" x="{min(one, other):.2f}%" y="{top}" width="{width:.2f}%" height="{height}"/>'


def _axis(low: float) -> str:
    step = 0.2 if low > -0.5 else 0.5
    ticks = [step * index for index in range(math.ceil(low / step - 1e-9), round(1 / step) + 1)]
    marks = [
        f'{_line(_at(tick, low), "tick", 0, 5)}<text x="{_at(tick, low):.2f}%" y="19">{_number(tick, 1)}</text>'
        for tick in ticks
    ]
    return f'<svg aria-hidden="true">{"".join(marks)}</svg><p class="soft">SSIM</p>'


def _bar(attack: Attack, low: float, figure: str, words: str, shapes: Sequence[str]) -> str:
    """Returns one attack's line of a chart: its name and figures as text, the drawing below them."""
    style = "bar control" if attack["control"] else "bar"
    drawing = _line(_at(0.0, low), "zero") + "".join(shapes)
    described = f"{_text(attack['name'])}: {_text(words)}"
    return (
        f'<div class="{style}"><div><span>{_label(attack)}</span> <span>{figure}</span></div>'
        f'<svg role="img" aria-label="{described}">{drawing}</svg></div>'
    )


def _key(*entries: tuple[str, str]) -> str:
    """Returns what the marks of a chart mean: pairs of a drawing and words."""
    lines = "".join(f'<li><svg aria-hidden="true">{drawing}</svg>{words}</li>' for drawing, words in entries)
    return f'<ul class="key">{lines}</ul>'


def _chart(attacks: Sequence[Attack], seeds: int) -> str:
    low = _lower_end(attack["ssim"]["lowest"] for attack in attacks)
    means = {attack["name"]: attack["ssim"]["mean"] for attack in attacks}
    entries, marks = [], []
    for name, style, words in (
        (FLOOR, "dotted", "the floor, reached with no feature at all"),
        (ORACLE, "dashed", "the oracle, which had pairs of image and features to learn from"),
    ):
        if name in means:
            marks.append(_line(_at(means[name], low), style))
            entries.append((_line(50, style, 0, 20), f"{style} line: {name}, {words} ({_number(means[name])})"))
    if seeds > 1:
        entries.append((_whisker(15, 85, 10), f"whisker: from the lowest to the highest of {seeds} seeds"))
    bars = []
    for attack in attacks:
        ssim = attack["ssim"]
        shapes = [_block(_at(0.0, low), _at(ssim["mean"], low), "mean", 5, 14), *marks]
        if ssim["lowest"] != ssim["highest"]:
            shapes.append(_whisker(_at(ssim["lowest"], low), _at(ssim["highest"], low)))
        bars.append(_bar(attack, low, _over_seeds(ssim), f"mean SSIM {_over_seeds(ssim)}", shapes))
    note = "" if seeds > 1 else " There was one seed, so the spread over seeds is not known."
    return _section(
        "How close each attack came",
        f"<p>Mean SSIM: the longer the bar, the more of the image comes back. 1 is the image itself.{note}</p>",
        *bars,
        _axis(low),
        _key(*entries),
    )


def _whisker(left: float, right: float, y: int = 12) -> str:
    ends = _line(left, "end", y - 4, y + 4) + _line(right, "end", y - 4, y + 4)
    return _span(left, right, y) + ends


def _table(attacks: Sequence[Attack]) -> str:
    titles = (
        "Attack",
        "What it does",
        "What it has",
        "SSIM",
        "PSNR, dB",
        "Found again",
        "Same class",
        "Time",
        "Source",
    )
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    rows = []
    for attack in attacks:
        words = _text(attack["words"])
        figures = (_over_seeds(attack["ssim"]), _over_seeds(attack["psnr_db"], 1))
        ssim, psnr = (figure.replace(" (", "<br>(") for figure in figures)
        if attack["chosen_with_ground_truth"]:
            words += ' <strong class="recognisable">Chosen with ground truth: no real attacker could.</strong>'
        rows.append(
            f'<tr><th scope="row" class="name">{_label(attack)}</th><td class="wide">{words}</td>'
            f'<td class="wide">{_text(attack["access_words"])}</td>'
            f'<td class="figure">{ssim}</td><td class="figure">{psnr}</td>'
            f'<td class="figure">{_share(attack["reidentified"])}</td>'
            f'<td class="figure">{_share(attack["same_class"])}</td>'
            f'<td class="figure">{_duration(attack["seconds"])}</td>'
            f'<td class="name">{_text(attack["source"])}</td></tr>'
        )
    return _section(
        "The attacks",
        "<p>Means over the images, in brackets the lowest to the highest seed. On a narrow screen the table scrolls "
        "sideways.</p>",
        _scrolling("Attacks", f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"),
    )


def _spread(attacks: Sequence[Attack], images: object) -> str:
    low = _lower_end(value for attack in attacks for value in attack["ssim"]["deciles"])
    bars = []
    for attack in attacks:
        deciles = attack["ssim"]["deciles"]
        worst, tenth, median, ninth, best = (deciles[index] for index in (0, 1, 5, 9, 10))
        x = [_at(value, low) for value in (worst, tenth, median, ninth, best)]
        shapes = (
            _span(x[0], x[4]),
            _block(x[1], x[3], "whole", 5, 14),
            _line(x[2], "median", 5, 19),
            f'<circle class="dot" cx="{x[4]:.2f}%" cy="12" r="4"/>',
        )
        figure = f"median {_number(median)}, best tenth from {_number(ninth)}, best {_number(best)}"
        words = f"SSIM from {_number(worst)} to {_number(best)}, median {_number(median)}"
        bars.append(_bar(attack, low, figure, words, shapes))
    return _section(
        "Image by image",
        f"<p>A mean can hide images that come back much better than the others. This is the SSIM over the "
        f"{_text(images)} images on which the attacks were judged.</p>",
        *bars,
        _axis(low),
        _key(
            (_span(0, 100, 10), "line: from the image that came out worst to the best one"),
            (_block(5, 95, "whole", 3, 14), "box: the middle eight tenths of the images"),
            (_line(50, "median", 3, 17), "stroke in the box: the median"),
            ('<circle class="dot" cx="50%" cy="10" r="4"/>', "ring: the best image"),
        ),
    )


def _selector(ways: Mapping[str, Mapping[str, Any]]) -> str:
    if not ways:
        return ""
    rows = "".join(
        f"<tr><th scope='row'>{_text(name)}</th><td>{_number(float(way['auc']))}</td>"
        f"<td>{'yes' if way['first'] else 'no'}</td></tr>"
        for name, way in ways.items()
    )
    return _section(
        "Can the server tell which nets count?",
        "<p>A server can rank its nets by how they fit what arrives. 0.5 is chance, and 0 gives away as much as 1. "
        "One client has few nets, so one figure means little; the attacks on images above need no such knowledge. "
        "<strong>Keep this table from whoever runs the server</strong>: who has the nets can rank them as well, and "
        "see which selection has these figures.</p>",
        _scrolling(
            "Ranking the nets",
            "<table><thead><tr><th scope='col'>Ranked by</th><th scope='col'>AUC</th>"
            f"<th scope='col'>First one is selected</th></tr></thead><tbody>{rows}</tbody></table>",
        ),
    )


def _gates(gates: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for gate in gates:
        word, sign = ("passed", "✓") if gate["passed"] else ("failed", "✗")
        state = f'<strong class="{word}"><span aria-hidden="true">{sign}</span> {word}</strong>'
        lines.append(f"<li>{state} · {_text(gate['name'])}: {_text(gate['words'])}</li>")
    if doubt := _doubt(gates):
        end = f"<p><strong>{doubt}</strong></p>"
    elif gates:
        end = "<p>All checks passed: the attacks worked as they should where the answer is known.</p>"
    else:
        end = "<p>No check was made, so nothing shows that the attacks worked as they should.</p>"
    return _section("Sanity checks", f"<ul>{''.join(lines)}</ul>" if lines else "", end)


def _explained(attacks: Sequence[Attack]) -> str:
    parts = []
    for level in sorted({attack["access"] for attack in attacks}):
        names = ", ".join(_text(attack["name"]) for attack in attacks if attack["access"] == level)
        words = next(str(attack["access_words"]) for attack in attacks if attack["access"] == level)
        title = _text(words[:1].upper() + words[1:])
        parts.append(f'<h3>{title}</h3><p>{ACCESS.get(level, "")} <span class="soft">Here: {names}.</span></p>')
    return _section("Who could do this", *parts, "<h3>The measures</h3>", MEASURES)


def _not_run(not_run: Sequence[Mapping[str, Any]]) -> str:
    lines = "".join(f"<li><strong>{_text(left['name'])}</strong>: {_text(left['why'])}</li>" for left in not_run)
    listed = f"<ul>{lines}</ul>" if lines else "<p>Every attack that was asked for was run.</p>"
    return _section("What was not tried", listed, f"<p>{LIMITS}</p>")


def _configuration(document: Mapping[str, Any], attacks: Sequence[Attack]) -> str:
    subject = dict(document["subject"])
    digests = subject.pop("digests")
    audit = {key: document[key] for key in ("date", "machine", "seconds", "budget", "seeds", "version")}
    tables = (
        ("The audit", audit),
        ("What was audited", subject),
        ("Its files (SHA-256)", digests),
        ("Images", document["images"]),
        ("What is sent of one image", document["sent"]),
        ("What the attacks report of themselves", {attack["name"]: attack["seen"] for attack in attacks}),
    )
    return _section(
        "Configuration",
        "<details><summary>Versions, options, digests: what it takes to repeat this audit</summary>",
        f"<h3>Command</h3><pre>{_text(document['command'])}</pre>",
        *(f"<h3>{title}</h3>{_facts(facts)}" for title, facts in tables),
        "</details>",
    )


def _facts(facts: Mapping[str, Any]) -> str:
    rows = []
    for name, value in facts.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        rows.append(f'<tr><th scope="row">{_text(str(name).replace("_", " "))}</th><td>{_text(shown)}</td></tr>')
    return f'<table class="facts"><tbody>{"".join(rows)}</tbody></table>'
