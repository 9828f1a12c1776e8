"""The batcher decides alone: no socket, no thread, no clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensembler.cloud_runtime.batcher import Batcher, BatchPolicy, Queued


def request(item, rows=1, size=10, arrived=0.0, deadline=1000.0) -> Queued:
    return Queued(item=item, rows=rows, size_bytes=size, arrived_ms=arrived, deadline_ms=deadline)


def batcher(**policy) -> Batcher:
    return Batcher(BatchPolicy(**policy))


def items(batch) -> list:
    return [queued.item for queued in batch]


def test_a_free_engine_gets_a_lone_request_at_once():
    queue = batcher()
    assert queue.offer(request("a")) is None
    assert queue.wait_ms(0.0) == 0.0
    assert items(queue.take(0.0)) == ["a"]
    assert queue.wait_ms(0.0) is None


def test_requests_that_gathered_are_taken_together_in_order_of_arrival():
    queue = batcher(max_batch_rows=4)
    for name in "abcde":
        queue.offer(request(name))
    assert items(queue.take(0.0)) == list("abcd")
    assert items(queue.take(0.0)) == ["e"]


def test_a_batch_counts_rows_and_never_splits_a_request():
    queue = batcher(max_batch_rows=10)
    for name, rows in (("a", 4), ("b", 4), ("c", 4)):
        queue.offer(request(name, rows=rows))
    assert items(queue.take(0.0)) == ["a", "b"]


def test_a_request_larger_than_a_batch_is_computed_alone():
    queue = batcher(max_batch_rows=8)
    queue.offer(request("huge", rows=100))
    queue.offer(request("small"))
    assert items(queue.take(0.0)) == ["huge"]


def test_the_oldest_request_waits_for_company_only_as_long_as_the_policy_says():
    queue = batcher(batch_wait_ms=5.0)
    queue.offer(request("a", arrived=100.0))
    assert queue.take(101.0) == []
    assert queue.wait_ms(101.0) == pytest.approx(4.0)
    queue.offer(request("b", arrived=104.0))
    assert items(queue.take(105.0)) == ["a", "b"]


def test_a_full_batch_does_not_wait():
    queue = batcher(batch_wait_ms=1000.0, max_batch_rows=2)
    queue.offer(request("a"))
    queue.offer(request("b"))
    assert items(queue.take(0.0)) == ["a", "b"]


def test_a_full_queue_refuses_with_a_time_that_grows_with_the_work_ahead():
    queue = batcher(max_queue_rows=3)
    for name in "abc":
        assert queue.offer(request(name)) is None
    first = queue.offer(request("d"))
    queue.computed(rows=1, compute_ms=500.0)
    assert first is not None
    assert queue.offer(request("d")) > first
    assert len(queue) == 3


def test_bytes_bound_the_queue_too():
    queue = batcher(max_queue_bytes=25)
    assert queue.offer(request("a", size=20)) is None
    assert queue.offer(request("b", size=10)) is not None


def test_a_request_beyond_the_whole_queue_is_taken_when_nothing_waits():
    queue = batcher(max_queue_rows=3)
    assert queue.offer(request("huge", rows=50)) is None
    assert items(queue.take(0.0)) == ["huge"]


def test_work_whose_deadline_passed_is_given_back_before_it_is_computed():
    queue = batcher()
    queue.offer(request("late", deadline=50.0))
    queue.offer(request("in time", deadline=500.0))
    assert items(queue.expired(60.0)) == ["late"]
    assert items(queue.take(60.0)) == ["in time"]


def test_drop_all_empties_the_queue():
    queue = batcher()
    queue.offer(request("a"))
    assert items(queue.drop_all()) == ["a"]
    assert len(queue) == 0
    assert queue.rows == 0


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("offer"), st.integers(1, 20), st.integers(0, 100)),
            st.tuples(st.just("take"), st.just(0), st.just(0)),
            st.tuples(st.just("expire"), st.just(0), st.just(0)),
        ),
        max_size=60,
    )
)
def test_no_request_is_lost_or_answered_twice_and_the_counts_stay_right(steps):
    queue = batcher(max_batch_rows=16, max_queue_rows=40, max_queue_bytes=400)
    offered, refused, left = [], [], []
    now = 0.0
    for number, (kind, rows, patience) in enumerate(steps):
        now += 10.0
        if kind == "offer":
            result = queue.offer(request(number, rows=rows, size=rows, arrived=now, deadline=now + patience))
            (offered if result is None else refused).append(number)
            assert result is None or result > 0
        elif kind == "take":
            batch = queue.take(now)
            assert len(batch) <= 1 or sum(q.rows for q in batch) <= 16
            left += items(batch)
        else:
            late = queue.expired(now)
            assert all(q.deadline_ms <= now for q in late)
            left += items(late)
        waiting = list(queue._queue)
        assert queue.rows == sum(q.rows for q in waiting)
        assert queue._bytes == sum(q.size_bytes for q in waiting)
    left += items(queue.drop_all())
    assert sorted(left) == offered
    assert not set(left) & set(refused)
