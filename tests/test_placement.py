"""Which machine holds which group of nets: enough copies, never two on one machine, and evenly spread."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ensembler.cloud_runtime.placement import next_step

NODES = "abcd"


def settle(placed, nodes, replicas):
    """Applies steps until none is left; returns how many there were."""
    for count in range(1000):
        step = next_step(placed, nodes, replicas)
        if step is None:
            return count
        held = placed[step.group]
        assert (step.node in held) != step.start
        (held.add if step.start else held.remove)(step.node)
    raise AssertionError("it never settles")


def loads(placed, nodes):
    counted = Counter(node for held in placed for node in held)
    return [counted[node] for node in nodes]


@given(
    groups=st.integers(1, 6),
    replicas=st.integers(1, 4),
    present=st.lists(st.integers(1, 2 ** len(NODES) - 1), min_size=1, max_size=5),
)
def test_whatever_machines_come_and_go_every_group_has_its_copies_evenly_spread(groups, replicas, present):
    placed = [set() for _ in range(groups)]
    for bits in present:
        nodes = [node for index, node in enumerate(NODES) if bits >> index & 1]
        placed = [held & set(nodes) for held in placed]  # the others are gone, and what they held with them
        settle(placed, nodes, replicas)
        assert {len(held) for held in placed} == {min(replicas, len(nodes))}
        assert max(loads(placed, nodes)) - min(loads(placed, nodes)) <= 1


def test_what_is_well_placed_stays_when_a_machine_goes():
    placed = [{"a"}, set(), {"c"}]
    assert settle(placed, ["a", "c"], 1) == 1
    assert placed[0] == {"a"}
    assert placed[2] == {"c"}


def test_a_machine_that_comes_gets_its_share_and_nothing_is_stopped_before_its_successor_computes():
    placed = [{"a"}, {"a"}]
    first = next_step(placed, ["a", "b"], 1)
    assert (first.node, first.start) == ("b", True)
    placed[first.group].add("b")
    assert next_step(placed, ["a", "b"], 1, settled=False) is None
    second = next_step(placed, ["a", "b"], 1)
    assert (second.group, second.node, second.start) == (first.group, "a", False)


def test_without_a_machine_nothing_is_to_be_done():
    assert next_step([set()], [], 1) is None
