"""An Ensembler behind the boundary of crypto-clear inference: what the server still knows of the answer, what it costs.

    python benchmarks/crypto_ensemble.py RUN [--images 10]

RUN is an Ensembler without noise of its own (``ensembler train --noise-std 0``). The server has the head's weights and
all N bodies, and sees what they say of each image; selector and tail are the device's. How often the server names the
device's answer is measured with knowledge that it may have or not: the stage-1 tails (if it trained them), labelled
images of the task (a linear probe, on half of the held-out images), the same number of images without labels (clusters,
the best naming of which is granted). The other half of the held-out images is judged. The cost is that of real
predictions, to compare with ``benchmarks/crypto.py`` at the same layer.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import product
import results
import torch
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

from ensembler import EdgeClient
from ensembler.cli.demo import server_process
from ensembler.training import data as data_sets
from ensembler.training.fit import EVALUATION_BATCH
from ensembler.training.models import normalise
from ensembler.training.runs import RunFolder
from ensembler.training.stage1 import load_stage1
from ensembler.training.stages import load_bodies, load_client

LONG_MS = 600_000
NOISE = 0.1
PROBE_STEPS, PROBE_RATE, PROBE_DECAY = 2000, 0.01, 1e-3
STARTS = 10  # of the clustering


@torch.inference_mode()
def seen(run: RunFolder, images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Returns what all N bodies say of the noised boundary, ``(M, N, F)``, and the device's logits ``(M, K)``."""
    client, bodies = load_client(run), load_bodies(run)
    generator = torch.Generator().manual_seed(0)
    answers = []
    for start in range(0, len(images), EVALUATION_BATCH):
        features = client.head(normalise(torch.from_numpy(images[start : start + EVALUATION_BATCH])))
        noised = features + NOISE * (2 * torch.rand(features.shape, generator=generator) - 1)
        answers.append(torch.stack([body(noised) for body in bodies], dim=1))
    every = torch.cat(answers)
    return every, client.combine(every[:, list(client.selector)])


def probed(known: Tensor, labels: Tensor, judged: Tensor) -> Tensor:
    """Returns the classes that a linear map of the answers names, trained on labelled ones."""
    mean, spread = known.mean(0), known.std(0) + 1e-6
    torch.manual_seed(0)
    probe = nn.Linear(known.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=PROBE_RATE, weight_decay=PROBE_DECAY)
    for _ in range(PROBE_STEPS):
        chosen = torch.randint(len(known), (256,))
        loss = functional.cross_entropy(probe((known[chosen] - mean) / spread), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        return probe((judged - mean) / spread).argmax(1)


@torch.inference_mode()
def by_stage1(run: RunFolder, answers: Tensor) -> Tensor:
    """Returns the classes that the stage-1 tails name together."""
    nets, order = load_stage1(run), run.read_wire().order
    tails = [nets[place].net.tail for place in order]
    return torch.stack([tail(answers[:, i]).softmax(1) for i, tail in enumerate(tails)]).mean(0).argmax(1)


def clustered(known: Tensor, judged: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Returns the classes by clusters of the answers, with the naming that fits ``truth`` best."""
    together = torch.cat([known, judged]).double().numpy()
    together = (together - together.mean(0)) / (together.std(0) + 1e-6)
    _, _, components = np.linalg.svd(together, full_matrices=False)
    reduced = together @ components[: 4 * classes].T
    best, least = np.zeros(len(judged), np.int64), np.inf
    for seed in range(STARTS):
        centres, which = kmeans2(reduced, classes, minit="++", rng=seed)
        error = float(((reduced - centres[which]) ** 2).sum())
        if error < least:
            best, least = which[len(known) :], error
    table = np.zeros((classes, classes), int)
    np.add.at(table, (best, truth.numpy()), 1)
    _, named = linear_sum_assignment(-table)
    return torch.from_numpy(named[best])


def costs(run: Path, images: np.ndarray, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """Returns medians of real predictions."""
    product.checked(
        "export", str(run), "--out", str(folder), "--protocol", "c2pi", "--max-accuracy-drop", "5", *options
    )
    with (
        server_process(folder / "server") as endpoint,
        EdgeClient(folder / "client", endpoint, timeout_ms=LONG_MS) as edge,
    ):
        answers = [edge.predict(image) for image in images][1:]
    return {
        "seconds": statistics.median(answer.timings.total for answer in answers) / 1000,
        "server_ms": statistics.median(answer.timings.server for answer in answers),
        "tail_ms": statistics.median(answer.timings.tail for answer in answers),
        "bytes": statistics.median(answer.bytes_up + answer.bytes_down for answer in answers),
        "labels": [answer.label for answer in answers],
    }


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=10)
    options = parser.parse_args()
    run = RunFolder.open(options.run)
    data = data_sets.load(run.config.data)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(data.test_x))
    answers, logits = seen(run, data.test_x[order])
    labels, named = torch.from_numpy(data.test_y[order]).long(), logits.argmax(1)
    half, flat = len(labels) // 2, answers.flatten(1)
    judged, classes = named[half:], len(run.labels)
    ways = {
        "labelled": (probed(flat[:half], labels[:half], flat[half:]), f"a linear probe, {half} labelled images"),
        "stage1": (by_stage1(run, answers[half:]), "the mean of all stage-1 tails"),
        "unlabelled": (
            clustered(flat[:half], flat[half:], judged, classes),
            f"{classes} clusters of {len(flat)} images without labels, the best naming granted",
        ),
    }
    config = run.config
    words = f"{config.arch}, N = {config.num_nets}, P = {config.num_selected}, {len(judged)} images, noise {NOISE:g}"
    figures = [
        results.figure(
            "hidden_answer_accuracy",
            round(100 * float((judged == labels[half:]).float().mean()), 2),
            "%",
            "",
            f"the device's own; {words}",
        )
    ]
    for way, (guessed, how) in ways.items():
        share = round(float((guessed == judged).float().mean()), 4)
        note = f"how often the server names the device's answer, by {how}; {words}"
        figures.append(results.figure(f"hidden_answer_named_{way}", share, "of 1", "", note))
    chance = round(float(torch.bincount(judged, minlength=classes).max()) / len(judged), 4)
    figures.append(results.figure("hidden_answer_named_blind", chance, "of 1", "", f"always the commonest; {words}"))
    images = np.ascontiguousarray(data.test_x[: options.images].transpose(0, 2, 3, 1))
    with tempfile.TemporaryDirectory() as folder:
        cost = costs(options.run, images, Path(folder), ["--noise", f"{NOISE:g}"])
    agree = float(
        np.mean([cost["labels"][i - 1] == run.labels[int(c)] for i, c in _answers(run, data, options.images)])
    )
    note = f"both ways, {len(images) - 1} images; {words}"
    figures += [
        results.figure("hidden_answer_seconds", round(cost["seconds"], 3), "s", "", note),
        results.figure("hidden_answer_megabytes", round(cost["bytes"] / 1e6, 3), "MB", "", note),
        results.figure("hidden_answer_server_clear_ms", round(cost["server_ms"], 3), "ms", "", f"all N nets; {note}"),
        results.figure("hidden_answer_device_tail_ms", round(cost["tail_ms"], 3), "ms", "", note),
        results.figure("hidden_answer_argmax_agreement", agree, "of 1", "", f"with torch, without noise there; {note}"),
    ]
    command = shlex.join(["python", "benchmarks/crypto_ensemble.py", "RUN", "--images", str(options.images)])
    results.record("crypto", figures, command=command, seed=config.seed)


@torch.inference_mode()
def _answers(run: RunFolder, data: data_sets.Dataset, count: int) -> list[tuple[int, int]]:
    """Returns (place, class) as torch names it, for the images after the first."""
    client, bodies = load_client(run), load_bodies(run)
    features = client.head(normalise(torch.from_numpy(data.test_x[:count])))
    logits = client.finish(features, [bodies[i] for i in client.selector], through_wire=False)
    return [(place, int(one)) for place, one in enumerate(logits.argmax(1)) if place]


if __name__ == "__main__":
    main()
