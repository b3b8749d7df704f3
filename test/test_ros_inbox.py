# SPDX-License-Identifier: Apache-2.0
"""The mailbox: the newest frame wins, nothing is lost silently, waiting ends."""

import threading
import time

import _needs_ros  # noqa: F401
from anomaly_seg_ros.ros.inbox import Gate, Mailbox
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
