"""Decides which machine holds which group of nets; knows no Ray, no clock and no network.

Each group is wanted on several machines, never twice on one. A machine that comes or goes changes as little as
possible: what is missing is started where least is, and a machine that came is given its share, one move at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Step:
    """One change: a copy of ``group`` is started on ``node``, or stopped there."""

    group: int
    node: str
    start: bool


def next_step(
    placed: Sequence[Collection[str]], nodes: Sequence[str], replicas: int, *, settled: bool = True
) -> Step | None:
    """Returns the next change, or None where nothing is to be done; to be asked again after every change.

    Args:
        placed: for each group the nodes that hold it, or are about to; all of them in ``nodes``.
        nodes: the machines that may hold groups.
        replicas: how many machines each group is wanted on; on all of them where there are fewer.
        settled: whether all that was started also computes by now. Nothing is moved or stopped before.
    """
    if not nodes:
        return None
    load = {node: sum(node in group for group in placed) for node in nodes}
    few = min(range(len(placed)), key=lambda group: len(placed[group]))
    if len(placed[few]) < min(replicas, len(nodes)):
        free = [node for node in nodes if node not in placed[few]]
        return Step(group=few, node=min(free, key=load.__getitem__), start=True)
    if not settled:
        return None
    many = max(range(len(placed)), key=lambda group: len(placed[group]))
    if len(placed[many]) > replicas:
        return Step(group=many, node=max(placed[many], key=load.__getitem__), start=False)
    fullest, emptiest = max(nodes, key=load.__getitem__), min(nodes, key=load.__getitem__)
    if load[fullest] - load[emptiest] < 2:
        return None
    moving = next(g for g, held in enumerate(placed) if fullest in held and emptiest not in held)
    return Step(group=moving, node=emptiest, start=True)
