"""Whether two stage-1 nets train faster together (a process and a thread each) than one after the other on two threads.

    python benchmarks/stage1_together.py

For the slim net on 32x32 images. Both ways run in turn, so that a busy machine meets them alike; records the median
ratio ``stage1_together_ratio``: above 1 together is faster.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from typing import Any

import results

STEPS, BATCH, ROUNDS = 40, 128, 9


def _train(threads: int, nets: int, begin: Any, done: Any) -> None:
    """Trains ``nets`` nets one after the other whenever ``begin`` lets it."""
    import torch
    from torch.nn.functional import cross_entropy

    from ensembler.training.models import ArchSpec, build_net, normalise

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images = normalise(torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8))
    images, classes = images.to(memory_format=torch.channels_last), torch.randint(0, 10, (BATCH,))
    spec = ArchSpec(name="resnet10_slim", image_size=(32, 32), num_classes=10)
    built = [build_net(spec).to(memory_format=torch.channels_last).train() for _ in range(nets)]  # type: ignore[call-overload]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True) for net in built]
    for _ in range(ROUNDS + 1):  # the first warms up
        begin.wait()
        started = time.perf_counter()
        for net, optimizer in zip(built, optimizers, strict=True):
            for _ in range(STEPS):
                loss = cross_entropy(net.tail(net.body(net.head(images))), classes)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        done.put(time.perf_counter() - started)


def main() -> None:
    """Measures and records."""
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    ways = [(2, 2, 1), (1, 1, 2)]  # threads, nets of a process, processes
    barriers = [context.Barrier(processes + 1) for _, _, processes in ways]
    for (threads, nets, processes), barrier in zip(ways, barriers, strict=True):
        for _ in range(processes):
            context.Process(target=_train, args=(threads, nets, barrier, done), daemon=True).start()
    ratios = []
    for number in range(ROUNDS + 1):
        times = []
        for (_, _, processes), barrier in zip(ways, barriers, strict=True):
            barrier.wait()
            times.append(max(done.get() for _ in range(processes)))
        print(f"one after the other {times[0]:.2f} s, together {times[1]:.2f} s: {times[0] / times[1]:.3f}", flush=True)
        if number:
            ratios.append(times[0] / times[1])
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    note = f"median of {ROUNDS}: {each}; two slim nets, {STEPS} steps of {BATCH} images; above 1 together is faster"
    figure = results.figure("stage1_together_ratio", round(statistics.median(ratios), 3), "ratio", "", note)
    results.record("core", [figure], command="python benchmarks/stage1_together.py", seed=0)


if __name__ == "__main__":
    main()
