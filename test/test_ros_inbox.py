# SPDX-License-Identifier: Apache-2.0
"""The mailbox: the newest frame wins, nothing is lost silently, waiting ends."""

import threading
import time

import _needs_ros  # noqa: F401
from anomaly_seg_ros.ros.inbox import Freshness, Gate, Mailbox
import numpy as np
import pytest


def test_one_slot_keeps_the_newest() -> None:
    box: Mailbox[int] = Mailbox()
    assert box.put(1) is None
    assert box.put(2) == 1
    assert box.put(3) == 2
    assert box.get() == 3


def test_queue_keeps_order_and_pushes_out_the_oldest() -> None:
    box: Mailbox[int] = Mailbox(3)
    assert [box.put(i) for i in range(5)] == [None, None, None, 0, 1]
    assert [box.get() for _ in range(3)] == [2, 3, 4]


def test_clear_counts_what_it_throws_away() -> None:
    box: Mailbox[int] = Mailbox(4)
    for i in range(3):
        box.put(i)
    assert box.clear() == 3
    assert box.clear() == 0


def test_waiting_goes_on_after_a_clear() -> None:
    """Who was woken by an item that is gone by then waits again, and says so."""
    waits: list[bool] = []
    box: Mailbox[int] = Mailbox(on_waiting=lambda: waits.append(True))
    got: list[int | None] = []
    thread = threading.Thread(target=lambda: got.append(box.get()))
    thread.start()
    while not box.waiting:
        time.sleep(0.001)
    with box._changed:  # held, so that the other thread cannot be faster
        box.put(1)
        assert box.clear() == 1
    deadline = time.monotonic() + 5
    while not box.waiting:
        assert time.monotonic() < deadline, 'nothing will ever be let in again'
        time.sleep(0.001)
    assert len(waits) == 2
    box.put(2)
    thread.join(5)
    assert got == [2]


def test_close_ends_waiting_and_refuses_items() -> None:
    box: Mailbox[int] = Mailbox()
    got: list[int | None] = []
    thread = threading.Thread(target=lambda: got.append(box.get()))
    thread.start()
    time.sleep(0.05)
    box.close()
    thread.join(5)
    assert not thread.is_alive()
    assert got == [None]
    assert box.put(7) == 7
    assert box.get() is None


def test_waiting_is_told_once_for_each_wait() -> None:
    waits: list[bool] = []
    box: Mailbox[int] = Mailbox(2, on_waiting=lambda: waits.append(box.waiting))
    gate = Gate(lambda: box.waiting)
    assert not gate.can_execute(None)
    got: list[int | None] = []
    thread = threading.Thread(target=lambda: got.extend(box.get() for _ in range(3)))
    thread.start()
    while not gate.can_execute(None):
        time.sleep(0.001)
    box.put(1)
    while len(got) < 1 or not box.waiting:
        time.sleep(0.001)
    box.put(2)
    box.put(3)
    thread.join(5)
    assert got == [1, 2, 3]
    assert waits in ([True, True], [True, True, True])
    assert not gate.can_execute(None)


def test_an_item_that_is_held_back_makes_room_or_comes_in_the_end() -> None:
    waits: list[bool] = []
    box: Mailbox[int] = Mailbox(on_waiting=lambda: waits.append(True))
    got: list[tuple[int | None, float]] = []
    thread = threading.Thread(
        target=lambda: got.extend((box.get(), time.monotonic()) for _ in range(2)))
    thread.start()
    while not box.waiting:
        time.sleep(0.001)
    assert box.put(1, 30.0) is None
    time.sleep(0.05)
    assert box.waiting and not got, 'nobody has it yet, and newer ones may come'
    assert box.put(2) == 1
    while len(got) < 1 or not box.waiting:
        time.sleep(0.001)
    assert got[0][0] == 2 and len(waits) == 2
    began_s = time.monotonic()
    box.put(3, 0.1)
    thread.join(5)
    assert got[1][0] == 3 and 0.1 <= got[1][1] - began_s < 2
    assert not box.waiting


MS = 1_000_000


def test_a_late_frame_waits_for_the_next_only_where_there_are_too_many() -> None:
    """At 100 Hz; each case begins with a frame at 1 s."""
    def asked(*frames: tuple[int, int, int]) -> list[float]:
        """Ask for frames by the time in ms they came, how many were skipped, and their age."""
        freshness = Freshness()
        assert freshness.wait_s(1000 * MS, 0, 1000 * MS) == 0
        return [freshness.wait_s(came * MS, skipped, (came + age) * MS)
                for came, skipped, age in frames]

    assert asked(*((1000 + 10 * k, 0, 9) for k in range(1, 30))) == [0] * 29  # the node keeps up
    assert asked((1040, 3, 3)) == [0]  # a third of the period, or less
    assert asked((1040, 3, 4)) == [pytest.approx(0.011)]  # until the next is 5 ms late
    assert asked((1040, 3, 9), (1050, 0, 0), (1090, 3, 5)) \
        == [pytest.approx(0.006), 0, pytest.approx(0.010)]
    assert asked((1040, 3, 9), (1060, 1, 9), (1100, 3, 9)) \
        == [pytest.approx(0.006), 0, pytest.approx(0.006)]  # never twice in a row
    assert asked((1040, 3, 12)) == [pytest.approx(0.005)]  # the next is late already
    assert asked((1040, 3, 20)) == [0]  # the stream has ended
    # One that takes 19 ms is twice as slow as the camera, though none was skipped here and there.
    assert asked((1020, 1, 0), (1030, 0, 9), (1040, 0, 0)) == [0, pytest.approx(0.006), 0]
    late = [*((1020 + 10 * k, 0, 0) for k in range(1, 10)), (1120, 0, 9)]
    assert asked((1020, 1, 0), *late) == [0] * 11  # but not for ever after one skipped frame
    assert asked((5000, 1, 1500)) == [0]  # a slow stream after a stall: nobody waits for seconds
    assert asked((0, 3, 9), (1080, 3, 9), (1120, 3, -5), (1110, 1, 9)) == [0] * 4  # no times


def mean_age_s(service_s: float, period_s: float, fresh: bool) -> tuple[float, float]:
    """
    Return how old the newest answer is on average at the receiver, and the rate of answers.

    Frames come every ``period_s``; answering one takes ``service_s``, a quarter more or less.
    """
    freshness, rng, last, area = Freshness(), np.random.default_rng(0), 0, 0.0
    now_s = began_s = answered_s = stamp_s = 1.0
    answers = 0
    while answers < 3000:
        newest = int(now_s / period_s)
        if newest == last:
            now_s = (newest + 1) * period_s + 1e-9
            continue
        came_s = newest * period_s
        wait_s = freshness.wait_s(round(came_s * 1e9), newest - last - 1, round(now_s * 1e9)) \
            if fresh else 0.0
        last = newest
        if wait_s:
            now_s = (newest + 1) * period_s + 1e-9
            continue
        now_s += service_s * rng.uniform(0.75, 1.25)
        # The area under the age between two answers.
        area += ((now_s - stamp_s) ** 2 - (answered_s - stamp_s) ** 2) / 2
        answered_s, stamp_s, answers = now_s, came_s, answers + 1
    return area / (now_s - began_s), answers / (now_s - began_s)


@pytest.mark.parametrize('ratio', [2.3, 2.8, 3.7, 5.5])
def test_waiting_for_fresher_frames_makes_the_newest_answer_younger(ratio: float) -> None:
    """That is what it is for; it costs answers, but not many."""
    plain, plain_hz = mean_age_s(0.04, 0.04 / ratio, False)
    fresh, fresh_hz = mean_age_s(0.04, 0.04 / ratio, True)
    assert fresh < 0.97 * plain
    assert fresh_hz > 0.85 * plain_hz


@pytest.mark.parametrize('period_s', [0.045, 0.051])
def test_a_node_that_keeps_up_or_nearly_so_answers_as_before(period_s: float) -> None:
    plain, plain_hz = mean_age_s(0.04, period_s, False)
    fresh, fresh_hz = mean_age_s(0.04, period_s, True)
    assert fresh < 1.001 * plain and fresh_hz > 0.99 * plain_hz


def test_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match='at least 1, got 0'):
        Mailbox(0)


def test_every_item_is_taken_or_given_back_once() -> None:
    """Under load from several threads, items are neither lost nor doubled."""
    box: Mailbox[int] = Mailbox(2)
    back: list[int] = []
    taken: list[int] = []

    def produce(first: int) -> None:
        for i in range(first, first + 2000):
            old = box.put(i)
            if old is not None:
                back.append(old)

    def consume() -> None:
        while (item := box.get()) is not None:
            taken.append(item)

    consumers = [threading.Thread(target=consume) for _ in range(2)]
    producers = [threading.Thread(target=produce, args=(2000 * k,)) for k in range(3)]
    for thread in consumers + producers:
        thread.start()
    for thread in producers:
        thread.join(20)
    deadline = time.monotonic() + 5
    while len(taken) + len(back) < 6000 and time.monotonic() < deadline:
        time.sleep(0.01)
    box.close()
    for thread in consumers:
        thread.join(5)
    assert sorted(taken + back) == list(range(6000))
