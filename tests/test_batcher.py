"""The batcher decides alone: no socket, no thread, no clock."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ensembler.cloud_runtime.batcher import SPARE, Batcher, BatchPolicy, Queued
from ensembler.protocol.errors import ConfigError


def request(item, rows=1, size=10, arrived=0.0, deadline=1e9, **options) -> Queued:
    return Queued(item=item, rows=rows, size_bytes=size, arrived_ms=arrived, deadline_ms=deadline, **options)


def batcher(**policy) -> Batcher:
    return Batcher(BatchPolicy(**policy))


def items(batch) -> list:
    return [queued.item for queued in batch]


def fill(queue, *names, **options):
    """Offers requests that must be taken."""
    for name in names:
        assert queue.offer(request(name, **options), 0.0) is None


def measured(queue, row_ms):
    """Lets the queue learn how long a row takes."""
    fill(queue, "first")
    queue.take(0.0)
    queue.computed(None, rows=1, elapsed_ms=row_ms)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("max_batch_rows", "max_queue_rows", "max_queue_bytes", "max_client_rows")),
        *((name, value) for name in ("max_batch_ms", "batch_wait_ms") for value in (-1.0, math.nan, math.inf)),
    ],
)
def test_an_impossible_policy_is_refused_by_the_options_name(name, value):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} {value}"):
        BatchPolicy(**{name: value})


# --- batches ---


def test_a_free_engine_gets_a_lone_request_at_once():
    queue = batcher()
    fill(queue, "a")
    assert queue.wait_ms(0.0) == 0.0
    assert items(queue.take(0.0)) == ["a"]
    assert queue.wait_ms(0.0) is None
    assert queue.take(0.0) == []


def test_requests_that_gathered_are_taken_together_in_order_of_arrival():
    queue = batcher(max_batch_rows=4)
    fill(queue, *"abcde")
    assert items(queue.take(0.0)) == list("abcd")
    assert items(queue.take(0.0)) == ["e"]


def test_a_batch_counts_rows_and_never_splits_a_request():
    queue = batcher(max_batch_rows=10)
    fill(queue, *"abc", rows=4)
    assert items(queue.take(0.0)) == ["a", "b"]


def test_a_request_larger_than_a_batch_is_computed_alone():
    queue = batcher(max_batch_rows=8)
    fill(queue, "huge", rows=100)
    fill(queue, "small", client="another")
    batches = [items(queue.take(0.0)), items(queue.take(0.0))]
    assert sorted(batches) == [["huge"], ["small"]]


def test_a_batch_is_filled_for_so_long_as_the_policy_says():
    queue = batcher(max_batch_ms=35.0)
    measured(queue, row_ms=10.0)
    fill(queue, *"abcdefg")
    assert items(queue.take(0.0)) == list("abc")
    fill(queue, "huge", rows=50, client="another")
    assert ["huge"] in [items(queue.take(0.0)) for _ in range(3)]


def test_a_batch_is_not_filled_so_far_that_it_ends_after_a_deadline_in_it():
    queue = batcher(max_batch_ms=100.0)
    measured(queue, row_ms=10.0)
    fill(queue, "a", "b")
    fill(queue, "hasty", deadline=45.0)
    fill(queue, "d", "e", "f")
    assert items(queue.take(0.0)) == ["a", "b", "hasty", "d"]


def test_a_deadline_does_not_make_batches_small_that_are_short_anyway():
    queue = batcher(max_batch_ms=100.0)
    measured(queue, row_ms=2.0)
    fill(queue, "hasty", deadline=3.0)
    fill(queue, *"bcdefg")
    assert items(queue.take(0.0)) == ["hasty", *"bcde"]


def test_the_oldest_request_waits_for_company_only_as_long_as_the_policy_says():
    queue = batcher(batch_wait_ms=5.0)
    queue.offer(request("a", arrived=100.0), 100.0)
    assert queue.take(101.0) == []
    assert queue.wait_ms(101.0) == pytest.approx(4.0)
    queue.offer(request("b", arrived=104.0), 104.0)
    assert items(queue.take(105.0)) == ["a", "b"]


def test_a_full_batch_does_not_wait():
    queue = batcher(batch_wait_ms=1000.0, max_batch_rows=2)
    fill(queue, "a", "b")
    assert items(queue.take(0.0)) == ["a", "b"]


def test_models_are_never_mixed_and_the_one_whose_engine_is_free_is_taken():
    queue = batcher()
    fill(queue, "a1", model="a")
    fill(queue, "b1", model="b")
    fill(queue, "a2", model="a")
    assert queue.take(0.0, free=()) == []
    assert items(queue.take(0.0, free=("b",))) == ["b1"]
    assert items(queue.take(0.0, free=("a", "b"))) == ["a1", "a2"]


def test_a_full_batch_of_one_model_does_not_send_another_ones_lone_request_early():
    queue = batcher(batch_wait_ms=100.0, max_batch_rows=2)
    fill(queue, "a1", model="a")
    fill(queue, "b1", "b2", model="b")
    assert items(queue.take(1.0)) == ["b1", "b2"]
    assert queue.take(1.0) == []
    assert queue.wait_ms(1.0) == pytest.approx(99.0)


def test_what_was_lost_once_is_computed_alone():
    queue = batcher()
    fill(queue, *"abc")
    for lost in queue.take(0.0):
        queue.put_back(request(lost.item, alone=True))
    fill(queue, "d")
    assert [items(queue.take(0.0)) for _ in range(4)] == [["a"], ["b"], ["c"], ["d"]]


# --- bounds ---


def test_a_full_queue_refuses_with_a_time_that_grows_with_the_work_ahead():
    queue = batcher(max_queue_rows=3)
    for name in "abc":
        fill(queue, name, client=name)
    first = queue.offer(request("d", client="d"), 0.0)
    for one in queue.take(0.0):
        queue.computed(None, rows=1, elapsed_ms=500.0)
        fill(queue, one.item, client=one.client)
    later = queue.offer(request("d", client="d"), 0.0)
    assert first.reason == later.reason == "queue"
    assert later.retry_after_ms > first.retry_after_ms > 0
    assert len(queue) == 3


def test_bytes_bound_the_queue_too():
    queue = batcher(max_queue_bytes=25)
    fill(queue, "a", size=20)
    assert queue.offer(request("b", size=10, client="b"), 0.0).reason == "queue"


def test_a_request_beyond_the_whole_queue_is_taken_when_nothing_waits():
    queue = batcher(max_queue_rows=3)
    fill(queue, "huge", rows=50)
    assert items(queue.take(0.0)) == ["huge"]


def test_one_client_never_fills_the_queue():
    queue = batcher(max_queue_rows=100)
    taken = sum(queue.offer(request(i, client="flood"), 0.0) is None for i in range(1000))
    assert taken == 50
    assert queue.offer(request("x", client="flood"), 0.0).reason == "share"
    assert queue.offer(request("y", client="other"), 0.0) is None


def test_a_limit_for_each_client_may_be_set():
    queue = batcher(max_client_rows=2)
    fill(queue, "a", "b", client="one")
    assert queue.offer(request("c", client="one"), 0.0).reason == "share"
    fill(queue, "d", client="two")


# --- fairness ---


def test_a_client_that_floods_does_not_delay_another():
    queue = batcher(max_batch_rows=4)
    fill(queue, *range(50), client="flood")
    queue.take(0.0)
    fill(queue, "patient", client="other")
    assert "patient" in items(queue.take(0.0))


def test_clients_that_both_wait_get_equal_rows_whatever_the_size_of_their_requests():
    queue = batcher(max_batch_rows=8, max_queue_rows=4000)
    fill(queue, *["big"] * 20, rows=8, client="big")
    fill(queue, *["small"] * 160, rows=1, client="small")
    rows = {"big": 0, "small": 0}
    for _ in range(20):
        for queued in queue.take(0.0):
            rows[queued.item] += queued.rows
    assert abs(rows["big"] - rows["small"]) <= 16


def test_a_client_does_not_save_up_turns_while_it_is_away():
    queue = batcher(max_batch_rows=2, max_queue_rows=1000)
    fill(queue, *["busy"] * 100, client="busy")
    for _ in range(20):
        queue.take(0.0)
    fill(queue, *["back"] * 20, client="back")
    found = [item for _ in range(10) for item in items(queue.take(0.0))]
    assert found.count("busy") == 10


# --- deadlines ---


def test_work_whose_deadline_passed_is_given_back_before_it_is_computed():
    queue = batcher()
    fill(queue, "late", deadline=50.0)
    fill(queue, "in time", deadline=500.0)
    assert queue.next_deadline_ms() == 50.0
    assert items(queue.expired(60.0)) == ["late"]
    assert queue.next_deadline_ms() == 500.0
    assert items(queue.take(60.0)) == ["in time"]
    assert queue.next_deadline_ms() is None


def test_a_request_that_cannot_be_done_in_time_is_refused_at_once():
    queue = batcher(max_queue_rows=1000)
    measured(queue, row_ms=10.0)
    fill(queue, *range(20), client="first")
    refusal = queue.offer(request("hasty", deadline=15.0, client="other"), 0.0)
    assert refusal.reason == "deadline"
    assert queue.offer(request("patient", deadline=1000.0, client="other"), 0.0) is None


def test_a_queue_that_takes_half_as_long_again_as_expected_makes_nobody_late():
    queue = batcher()
    measured(queue, row_ms=10.0)
    fill(queue, *"abcd")
    assert queue.offer(request("just", deadline=60.0), 0.0).reason == "deadline"
    assert queue.offer(request("in time", deadline=70.0), 0.0) is None


def test_before_the_first_batch_nothing_is_refused_for_its_deadline():
    queue = batcher()
    assert queue.offer(request("a", deadline=1e-6), 0.0) is None


def test_a_batch_that_is_being_computed_counts_for_what_is_left_of_it():
    queue = batcher()
    measured(queue, row_ms=100.0)
    fill(queue, "a")
    queue.take(0.0)
    assert queue.offer(request("b", deadline=150.0), 10.0).reason == "deadline"  # 90 + 100 more
    assert queue.offer(request("b", deadline=250.0), 90.0) is None  # 10 + 100 more


def test_drop_all_empties_the_queue():
    queue = batcher()
    fill(queue, "a", "b")
    assert items(queue.drop_all()) == ["a", "b"]
    assert len(queue) == queue.rows == queue.size_bytes == 0


@pytest.mark.parametrize("way", ["take", "expired"])
def test_nothing_is_kept_of_what_left(way):
    """A server that never idles must not grow by a deadline or a turn for every request it ever had."""
    queue = batcher(max_batch_rows=1, max_queue_rows=10)
    fill(queue, "always there", client="first")
    for number in range(2000):
        deadline = number + 0.5 if way == "expired" else 1e300
        queue.offer(request(number, deadline=deadline, client=number), float(number))
        if way == "take":
            queue.take(float(number))
        else:
            queue.expired(number + 0.75)
    assert len(queue) <= 2
    kept = [queue._deadlines, queue._clients, *(model.turns for model in queue._models.values())]
    assert all(len(one) <= 2 * 2 + SPARE + 1 for one in kept)


class Life(RuleBasedStateMachine):
    """Any order of offers, batches, losses and deadlines: no request is lost, doubled or mixed."""

    def __init__(self):
        super().__init__()
        self.queue = batcher(max_batch_rows=16, max_queue_rows=40, max_queue_bytes=400)
        self.now = 0.0
        self.waiting, self.computing, self.number = {}, [], 0

    @rule(
        rows=st.integers(1, 20),
        patience=st.integers(0, 200),
        client=st.sampled_from("abc"),
        model=st.sampled_from("xy"),
    )
    def offer(self, rows, patience, client, model):
        self.number += 1
        asked = request(
            self.number,
            rows=rows,
            size=rows,
            arrived=self.now,
            deadline=self.now + patience,
            client=client,
            model=model,
        )
        held = sum(one.rows for one in self.waiting.values() if one.client == client)
        refusal = self.queue.offer(asked, self.now)
        if refusal is None:
            self.waiting[self.number] = asked
        else:
            assert refusal.retry_after_ms > 0
            # A client with nothing waiting is refused by a full queue or a deadline alone.
            assert held or refusal.reason != "share"

    @rule(free=st.sets(st.sampled_from("xy")))
    def take(self, free):
        batch = self.queue.take(self.now, free)
        assert len({one.model for one in batch}) <= 1
        assert all(one.model in free for one in batch)
        assert len(batch) <= 1 or sum(one.rows for one in batch) <= 16
        assert batch or not any(one.model in free for one in self.waiting.values())
        for one in batch:
            del self.waiting[one.item]
        if batch:
            self.computing.append(batch)

    @rule(took=st.integers(0, 100))
    def finish(self, took):
        if self.computing:
            batch = self.computing.pop(0)
            self.now += took
            self.queue.computed(batch[0].model, sum(one.rows for one in batch), float(took))

    @rule()
    def lose(self):
        if self.computing:
            for one in self.computing.pop(0):
                again = request(one.item, rows=one.rows, size=one.rows, client=one.client, model=one.model, alone=True)
                self.queue.put_back(again)
                self.waiting[one.item] = again

    @rule(later=st.integers(1, 50))
    def expire(self, later):
        self.now += later
        late = self.queue.expired(self.now)
        assert {one.item for one in late} == {n for n, one in self.waiting.items() if one.deadline_ms <= self.now}
        for one in late:
            del self.waiting[one.item]

    @invariant()
    def counts_are_right(self):
        queue, waiting = self.queue, self.waiting.values()
        assert len(queue) == len(waiting)
        assert queue.rows == sum(one.rows for one in waiting)
        assert queue.size_bytes == sum(one.size_bytes for one in waiting)
        for model in "xy":
            assert queue.waiting_rows(model) == sum(one.rows for one in waiting if one.model == model)
        assert (queue.wait_ms(self.now) is None) == (not waiting)
        assert all(one.computing >= 0 for one in queue._models.values())

    def teardown(self):
        assert {one.item for one in self.queue.drop_all()} == self.waiting.keys()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 8)), min_size=1, max_size=80))
def test_a_client_with_nothing_waiting_is_served_within_one_round_of_the_others(arrivals):
    """Between its arrival and its turn no other client gets more than one request and a batch."""
    queue = batcher(max_batch_rows=8, max_queue_rows=10_000)
    for name, rows in arrivals:
        queue.offer(request(name, rows=rows, client=name), 0.0)
    queue.take(0.0)
    queue.offer(request("new", client="new"), 0.0)
    before = 0
    while True:
        batch = queue.take(0.0)
        if "new" in items(batch):
            break
        before += sum(one.rows for one in batch)
    assert before <= 4 * 8 + 8
