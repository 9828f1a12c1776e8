"""The audit: runs attacks on an exported device and says what a server could see, worst first.

``audit()`` builds the scene, runs the attacks of a budget with several seeds, judges every reconstruction on images
that no attack saw, checks that the attacks were strong enough to mean something, and writes the report with its JSON
beside it. What is done is kept in ``NAME.parts/`` until the report is written, so that a run that was killed goes on.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ensembler.edge_runtime.card import file_digests
from ensembler.edge_runtime.sealing import BundleSecret
from ensembler.privacy.attacks import ATTACKS
from ensembler.privacy.attacks.base import OWN_SSIM, Attack, AttackImpossibleError, DivergedError, Plan, nets_name
from ensembler.privacy.card import AUDIT, FLOOR, ORACLE
from ensembler.privacy.decoder import Effort, pixels
from ensembler.privacy.identity import Identifier
from ensembler.privacy.metrics import entropy_bits, mse, psnr_db, ssim
from ensembler.privacy.parts import Parts, write_whole
from ensembler.privacy.report import write_report
from ensembler.privacy.scene import Access, Scene, make_scene
from ensembler.privacy.selector import recovery
from ensembler.protocol.errors import ConfigError
from ensembler.protocol.manifest import Kdf, load_client
from ensembler.training.fit import Reporter, Silent
from ensembler.training.runs import RunFolder
from ensembler.training.wire import codes_of

REPORT_VERSION = 1
SHOWN = 8  # images in the grids
READABLE, RECOGNISABLE = 0.5, 0.3  # SSIM; 0.3 is C2PI's threshold of a failed attack
ORACLE_SLACK = 0.03  # of SSIM, by which another attack may beat the oracle before the oracle counts as badly trained
ORACLE_GAIN = 0.02  # of SSIM over the floor, below which the oracle shows nothing
NEGATIVE = -0.1  # of mean SSIM, below which an attack shows the originals' negatives, which a person reads as well
# By so much of SSIM a shadow's decoder may invert its own head worse than the oracle inverts the client's, as long as
# it reaches so much of what the oracle has over the floor.
OWN_SLACK, OWN_SHARE = 0.2, 0.5
FILM_SLACK = 0.01  # of SSIM, by which several frames may say less than one before their decoder counts as badly trained


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Which attacks run, and how hard.

    Attributes:
        attacks: names; all are mandatory.
        plan: how hard.
        seeds: how many times with other randomness.
    """

    attacks: tuple[str, ...]
    plan: Plan
    seeds: int


# How a report begins to say why an attack is not in it that nobody asked for.
NOT_ASKED = "not part of this audit"
MISALIGNED = "misaligned-decoder"
QUICK = (FLOOR, MISALIGNED, "known-pairs-100", ORACLE, "distribution-matching")
BUDGETS: dict[str, Budget] = {
    "quick": Budget(
        attacks=QUICK,
        plan=Plan(effort=Effort(steps=300, width=32), steps=800, restarts=4),
        seeds=1,
    ),
    "standard": Budget(
        attacks=tuple(ATTACKS),
        plan=Plan(effort=Effort(steps=1200, width=48), bound_length=2, steps=1000, restarts=6),
        seeds=2,
    ),
    "thorough": Budget(
        attacks=tuple(ATTACKS),
        plan=Plan(effort=Effort(steps=4000, width=64), steps=2000, restarts=8),
        seeds=3,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one attack with one seed reached; arrays hold one value for each judged image, see ``Judge``."""

    name: str
    seed: int
    ssim: npt.NDArray[np.float32]
    psnr_db: npt.NDArray[np.float32]
    mse: npt.NDArray[np.float32]
    reidentified: npt.NDArray[np.bool_]
    same_class: npt.NDArray[np.bool_]
    shown: npt.NDArray[np.uint8]
    seconds: float
    seen: dict[str, Any]
    gates: dict[str, bool]
    chosen: bool
    frames: int


def audit(
    run: Path,
    bundle: Path,
    out: Path,
    *,
    budget: str = "standard",
    attacks: Sequence[str] | None = None,
    data: str | None = None,
    auxiliary: str = "disjoint",
    other_device: Path | None = None,
    coalition: Sequence[int] | None = None,
    seeds: int | None = None,
    device: torch.device | None = None,
    command: str = "",
    reporter: Reporter | None = None,
    secret: Callable[[Kdf], BundleSecret | None] = lambda _: None,
    shown_as: str = "",
) -> dict[str, Any]:
    """Attacks an exported device and writes the report.

    Args:
        run: the run that it was exported from.
        bundle: its client bundle.
        out: the report, ``.html``; the same name with ``.json`` is written beside it.
        budget: a name of ``BUDGETS``.
        attacks: names in place of the budget's; the floor and the oracle always run.
        data: whose held-out images are used; None takes the run's.
        auxiliary: see ``scene.make_scene``.
        other_device: see ``scene.make_scene``.
        coalition: see ``scene.make_scene``.
        seeds: how many, in place of the budget's.
        device: where to compute.
        command: for the report.
        reporter: told of the progress.
        secret: opens encrypted bundles, see ``EdgeRuntime``.
        shown_as: what the report calls the bundle, where its path would say nothing.

    Returns:
        What the JSON holds.

    Raises:
        ConfigError: an unknown name, or a place that cannot be written.
        DataError: see ``make_scene``.
        BundleError: see ``make_scene``.
    """
    reporter = reporter or Silent()
    chosen, names, count = chosen_attacks(out, budget=budget, attacks=attacks, seeds=seeds)
    started = time.monotonic()
    scene = make_scene(
        run,
        bundle,
        data=data,
        auxiliary=auxiliary,
        other_device=other_device,
        coalition=coalition,
        device=device,
        secret=secret,
    )
    subject = _subject(run, bundle, shown_as)
    images = {
        "data": data or RunFolder.open(run).config.data,
        "auxiliary": len(scene.everything.auxiliary),
        "auxiliary_source": auxiliary,
        "observed": len(scene.everything.observed) if scene.everything.observed is not None else 0,
        "evaluated": len(scene.evaluated),
    }
    if coalition is not None:
        everybody = len(load_client(bundle).parties)
        subject["operators"] = f"{', '.join(str(each + 1) for each in coalition)} of {everybody} share what they see"
        subject["all_operators"] = len(coalition) == everybody
    if other_device is not None:
        subject["other_device"] = file_digests(other_device, load_client(other_device))
    # Not where it lies: a run is exported anew, into another folder, whenever the audit goes on.
    content = {name: value for name, value in subject.items() if name not in ("run", "bundle")}
    effort = {"budget": budget, "plan": repr(chosen.plan.identity), "version": metadata.version("ensembler-edge")}
    parts = _Parts(out.with_suffix(".parts"), {"subject": content, "images": images, **effort})
    judge = Judge(scene)
    scores: list[Score] = []
    not_run: dict[str, str] = {}
    strayed: list[dict[str, Any]] = []
    for seed in range(count):
        for name in names:
            if name in not_run or (seed and name == FLOOR):
                continue
            stored = parts.read(name, seed)
            if stored is None:
                try:
                    stored = _score(ATTACKS[name], scene, judge, chosen.plan, seed, reporter)
                except DivergedError as error:
                    if name in (FLOOR, ORACLE):
                        raise  # without a bound nothing else means anything
                    strayed.append(_gate(name, f"{name}, seed {seed}: it ends in numbers", False, str(error)))
                    continue
                except AttackImpossibleError as error:
                    not_run[name] = str(error)
                    continue
                parts.write(stored)
            scores.append(stored)
    ended = {score.name for score in scores}
    not_run |= {gate["about"]: gate["words"] for gate in strayed if gate["about"] not in ended}
    rows = [_row(ATTACKS[name], [s for s in scores if s.name == name]) for name in names if name in ended]
    gates = _gates(rows, scores) + [gate for gate in strayed if gate["about"] in ended]
    document = {
        "version": REPORT_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "seconds": round(time.monotonic() - started, 1),
        "versions": {"ensembler": metadata.version("ensembler-edge"), "torch": str(torch.__version__)},
        "command": command,
        "budget": budget,
        "seeds": list(range(count)),
        "subject": subject,
        "images": images,
        "attacks": sorted(rows, key=lambda row: -row["ssim"]["mean"]),
        "not_run": [{"name": name, "why": why} for name, why in not_run.items()]
        + [{"name": name, "why": f"{NOT_ASKED} ({budget})"} for name in ATTACKS if name not in names],
        "selector": _selector(scene),
        "sent": _sent(scene),
        "gates": gates,
        "verdict": _verdict(rows, gates, "" if subject.get("all_operators", True) else subject["operators"]),
    }
    shown = (scene.evaluated[:SHOWN].permute(0, 2, 3, 1).cpu().numpy()).astype(np.uint8)
    write_report(document, shown, {s.name: s.shown for s in scores if s.seed == 0}, out)
    # Who has the server's nets can rank them as well, and see which selection has the figures that stand here.
    write_whole(out.with_suffix(".json"), json.dumps(document, indent=1, ensure_ascii=False) + "\n", mode=0o600)
    parts.remove()
    return document


def chosen_attacks(
    out: Path, *, budget: str, attacks: Sequence[str] | None, seeds: int | None
) -> tuple[Budget, list[str], int]:
    """Returns what ``audit`` runs: the budget, the names of its attacks, the number of seeds; arguments as there.

    Raises:
        ConfigError: an unknown name, an impossible number, or a report that is no HTML or has no place.
    """
    if budget not in BUDGETS:
        raise ConfigError(f"--budget {budget}: choose {', '.join(BUDGETS)}")
    if out.suffix != ".html":
        raise ConfigError(f"--out {out}: give a name that ends in .html; the JSON comes beside it")
    _check_place(out)
    chosen = BUDGETS[budget]
    count = chosen.seeds if seeds is None else seeds
    if count < 1:
        raise ConfigError(f"--seeds {count}: at least one")
    return chosen, _ordered(chosen.attacks if attacks is None else (FLOOR, ORACLE, *attacks)), count


def _check_place(out: Path) -> None:
    """Refuses a report's place before the hours that it takes to have something to write there."""
    # lexists: a link that leads nowhere is there, and nothing can be made below it.
    folder = next(folder for folder in out.parents if os.path.lexists(folder))
    try:
        if not folder.is_dir():
            reason = f"{folder} is not a folder"
        elif not os.access(folder, os.W_OK | os.X_OK):
            reason = f"{folder} is not yours to write"
        elif taken := [str(path) for path in (out, out.with_suffix(".json")) if path.is_dir()]:
            reason = f"{taken[0]} is a folder"
        else:
            return
    except OSError as error:
        reason = str(error.strerror)
    raise ConfigError(f"--out {out}: cannot be written, {reason}; give a file in a folder of yours")


def _ordered(names: Sequence[str]) -> list[str]:
    unknown = [name for name in names if name not in ATTACKS]
    if unknown:
        raise ConfigError(f"--attack {unknown[0]}: choose {', '.join(ATTACKS)}")
    return [name for name in ATTACKS if name in names]


class Judge:
    """Compares reconstructions with the images that no attack saw."""

    def __init__(self, scene: Scene) -> None:
        self._truth = pixels(scene.evaluated)
        self._identifier = Identifier(scene)

    @torch.no_grad()
    def measure(self, images: Tensor) -> dict[str, npt.NDArray[Any]]:
        """Returns the arrays of a ``Score`` for reconstructions of the first judged images."""
        images = images.clamp(0, 1)
        truth = self._truth[: len(images)]
        reidentified, same_class = self._identifier.judge(images)
        measured = {
            "ssim": ssim(images, truth),
            "psnr_db": psnr_db(images, truth),
            "mse": mse(images, truth),
            "reidentified": reidentified,
            "same_class": same_class,
            "shown": (255 * images[:SHOWN]).round().permute(0, 2, 3, 1).to(torch.uint8),
        }
        return {name: values.cpu().numpy() for name, values in measured.items()}


def _score(attack: Attack, scene: Scene, judge: Judge, plan: Plan, seed: int, reporter: Reporter) -> Score:
    """Runs one attack on its view of the scene, and judges what it brings back."""
    began = time.monotonic()
    nets = len(scene.everything.bodies or ())
    steps = replace(plan, num_nets=nets, seed=seed, tick=reporter.step)
    reporter.begin(f"{attack.NAME}, seed {seed}", attack.ticks(steps))
    finding = attack.run(scene.view(attack.ACCESS), steps)
    arrived = scene.filmed(finding.film)[: finding.images]
    results = {name: judge.measure(reconstruct(arrived)) for name, reconstruct in finding.variants.items()}
    results = {name: result for name, result in results.items() if np.isfinite(result["ssim"]).all()}
    if not results:
        raise DivergedError(f"{attack.NAME} did not converge, what it paints is no number; try other --seeds")
    means = {name: round(float(result["ssim"].mean()), 4) for name, result in results.items()}
    best = max(means, key=means.__getitem__)
    # Each measure's figure is of the variant that is best by it.
    clearest = max(results.values(), key=lambda result: float(result["psnr_db"].mean()))
    seen = dict(finding.seen)
    if len(results) > 1:  # without the names: which net did best may say which is selected
        seen["ssim_of_variants"] = sorted(means.values(), reverse=True)
        seen["best_by_psnr"] = {what: round(float(clearest[what].mean()), 4) for what in ("ssim", "psnr_db")}
        if (selected := nets_name(scene.selector)) in means:
            seen["ssim_of_true_set"] = means[selected]
    reporter.end(f"SSIM {means[best]:.3f}, {clearest['psnr_db'].mean():.1f} dB")
    return Score(
        name=attack.NAME,
        seed=seed,
        **{**results[best], **{measure: clearest[measure] for measure in ("psnr_db", "mse")}},
        seconds=time.monotonic() - began,
        seen=seen,
        gates=dict(finding.gates),
        chosen=len(results) > 1,
        frames=finding.film.frames if finding.film else 1,
    )


def _row(attack: Attack, scores: Sequence[Score]) -> dict[str, Any]:
    similarity = [float(score.ssim.mean()) for score in scores]
    ratio = [float(score.psnr_db.mean()) for score in scores]
    deciles = np.quantile(np.concatenate([score.ssim for score in scores]), np.linspace(0, 1, 11))
    return {
        "name": attack.NAME,
        "access": int(attack.ACCESS),
        "access_words": attack.ACCESS.words,
        "source": attack.SOURCE,
        "words": attack.WORDS,
        "control": attack.ACCESS == Access.NONE,
        "ssim": _spread(similarity) | {"deciles": [round(float(value), 4) for value in deciles]},
        "psnr_db": _spread(ratio),
        "mse": round(float(np.mean([score.mse.mean() for score in scores])), 6),
        "reidentified": _spread([float(score.reidentified.mean()) for score in scores]),
        "same_class": _spread([float(score.same_class.mean()) for score in scores]),
        "seconds": round(sum(score.seconds for score in scores), 1),
        "seen": {str(score.seed): score.seen for score in scores},
        "chosen_with_ground_truth": any(score.chosen for score in scores),
        "frames": max(score.frames for score in scores),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": round(float(np.mean(values)), 4),
        "lowest": round(min(values), 4),
        "highest": round(max(values), 4),
    }


def _gate(about: str, name: str, passed: bool, words: str) -> dict[str, Any]:
    return {"about": about, "name": name, "passed": passed, "words": words}


def _gates(rows: Sequence[Mapping[str, Any]], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Returns whether the attacks were strong enough for a low score to mean something.

    A check is about the whole audit, or about one attack: if that one went wrong, only its own figure is in doubt.
    """
    mean = {row["name"]: row["ssim"]["mean"] for row in rows}
    of_one_image = [row for row in rows if row["frames"] == 1]  # a film of the scene may well say more
    bound = max(row["ssim"]["mean"] for row in of_one_image if row["access"] >= Access.DEVICE)
    strongest = max((row["name"] for row in of_one_image if row["name"] != ORACLE), key=mean.__getitem__)

    gates = [
        _gate(
            AUDIT,
            "the oracle beats the floor",
            mean[ORACLE] >= mean[FLOOR] + ORACLE_GAIN,
            f"SSIM {mean[ORACLE]:.3f} against {mean[FLOOR]:.3f} of the mean image",
        ),
        _gate(
            AUDIT,
            "no attack beats the oracle",
            mean[strongest] <= mean[ORACLE] + ORACLE_SLACK,
            f"{strongest}, the strongest other attack, reaches {mean[strongest]:.3f}, and the oracle "
            f"{mean[ORACLE]:.3f}",
        ),
    ]
    gates += [
        _gate(
            row["name"],
            "several frames say no less than one",
            row["ssim"]["mean"] >= mean[ORACLE] - FILM_SLACK,
            f"{row['name']} reaches {row['ssim']['mean']:.3f}, and the oracle with one frame {mean[ORACLE]:.3f}",
        )
        for row in rows
        if row["frames"] > 1
    ]
    for score in scores:
        name = f"{score.name}, seed {score.seed}"
        gates += [_gate(score.name, name, passed, words) for words, passed in score.gates.items()]
        if own := score.seen.get(OWN_SSIM):
            least = max(bound - OWN_SLACK, mean[FLOOR] + OWN_SHARE * (bound - mean[FLOOR]))
            words = f"SSIM {min(own):.3f}, and the best attack with the client's own features {bound:.3f}"
            inverted = min(own) >= least
            gates.append(_gate(score.name, f"{name}: its decoder inverts its own head", inverted, words))
        if score.name not in (FLOOR, MISALIGNED) and (value := float(score.ssim.mean())) < NEGATIVE:
            words = f"SSIM {value:.3f}: turned round they may be readable, so this low score proves nothing"
            gates.append(_gate(score.name, f"{name}: what it shows are no negatives", False, words))
    return gates


def _verdict(rows: Sequence[Mapping[str, Any]], gates: Sequence[Mapping[str, Any]], some: str = "") -> dict[str, Any]:
    """Returns the word and the sentence; ``some`` says which operators see what was attacked, if not all."""
    attacks = [row for row in rows if not row["control"]]
    worst = max(attacks, key=lambda row: row["ssim"]["mean"])
    value = worst["ssim"]["mean"]
    failed = [gate["name"] for gate in gates if gate["about"] == AUDIT and not gate["passed"]]
    if value >= READABLE:
        word, what = "readable", "The images that this device sends can be read."
    elif value >= RECOGNISABLE:
        word, what = "recognisable", "The images that this device sends can be recognised in part."
    elif failed:
        word, what = "inconclusive", f"The attacks failed a sanity check ({failed[0]}): a low score proves nothing."
    else:
        word, what = "obscured", "No attack tried here recognises the images; stronger ones may."
    server = _server_alone([row for row in attacks if row["access"] == Access.QUERY_FREE], gates)
    sentence = f"{what} The strongest attack, {worst['name']}, reaches SSIM {value:.2f}.{server}"
    if some:
        sentence += f" That is with a part of what the device sends: operators {some}."
    return {"word": word, "sentence": sentence, "ssim": value, "attack": worst["name"]}


def _server_alone(rows: Sequence[Mapping[str, Any]], gates: Sequence[Mapping[str, Any]]) -> str:
    """Returns the sentence about attacks that need no device, empty if there was none."""
    if not rows:
        return ""
    best = max(rows, key=lambda row: row["ssim"]["mean"])
    value = best["ssim"]["mean"]
    doubted = sorted({gate["about"] for gate in gates if not gate["passed"]} & {row["name"] for row in rows})
    if doubted and value < READABLE:
        return (
            f" What a server alone reaches is inconclusive: {best['name']} reaches {value:.2f}, and "
            f"{', '.join(doubted)} failed a sanity check."
        )
    return f" A server alone reaches {value:.2f} ({best['name']})."


def _selector(scene: Scene) -> dict[str, Any]:
    """Returns how well the server's own nets tell which are selected; empty where there is nothing to select."""
    nets = len(scene.everything.bodies or ())
    if not 0 < len(scene.selector) < nets:
        return {}
    return dict(recovery(scene.view(Access.QUERY_FREE), scene.selector))


def _sent(scene: Scene) -> dict[str, float]:
    """Returns the bytes sent of an image, and how many of them can say anything: a bound that no attack can pass."""
    wire = scene.everything.wire
    features = torch.cat([scene.arrived, *([] if scene.everything.observed is None else [scene.everything.observed])])
    bits = entropy_bits(codes_of(features, wire.feature_codec), wire.feature_codec.code_max + 1)
    return {"bytes": wire.bytes_up, "bytes_of_entropy_at_most": round(bits / 8, 2), "images_counted": len(features)}


def _subject(run_path: Path, bundle: Path, shown_as: str) -> dict[str, Any]:
    run, manifest = RunFolder.open(run_path), load_client(bundle)
    config = run.config
    return {
        "run": str(run_path),
        "bundle": shown_as or str(bundle),
        "bodies_id": manifest.wire.bodies_id,
        "digests": file_digests(bundle, manifest),
        "arch": config.arch,
        "head_end": config.head_end or "the architecture's own",
        "image_size": list(run.arch.image_size),
        "feature_shape": list(manifest.wire.feature_shape),
        "wire_bits": manifest.wire.feature_codec.bits,
        "bytes_up": manifest.wire.bytes_up,
        "num_nets": config.trained_nets,
        "num_selected": config.used_nets,
        "defense": config.defense,
        "noise": config.noise,
        "noise_std": manifest.noise_std,
        "noise_mode": manifest.noise_mode,
        "dropout": manifest.dropout,
    }


class _Parts:
    """What is done so far, one part for each attack and seed, of exactly this audit."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._parts = Parts(folder, identity)

    def read(self, name: str, seed: int) -> Score | None:
        """Returns a stored score; one that is damaged or of another audit is none."""
        stored = self._parts.read(f"{name}-{seed}")
        if stored is None:
            return None
        fields: dict[str, Any] = {**stored[0], **stored[1]}
        try:
            return Score(**fields)
        except TypeError:  # written by another version
            return None

    def write(self, score: Score) -> None:
        """Stores a score, whole or not at all."""
        values = asdict(score)
        arrays = {key: values.pop(key) for key in ("ssim", "psnr_db", "mse", "reidentified", "same_class", "shown")}
        self._parts.write(f"{score.name}-{score.seed}", values, arrays)

    def remove(self) -> None:
        """Removes them: the report is written."""
        self._parts.remove()
