# SPDX-License-Identifier: Apache-2.0
"""
Where frames wait for the worker: one slot that the newest frame takes, or a bounded queue.

With one slot, frames better wait in the middleware: taking one costs milliseconds under Python's
lock, in vain if a newer one replaces it. ``Gate`` leaves them there until the worker waits, and
``Freshness`` tells whether the one that was there then is still worth an answer.
"""

from collections import deque
from collections.abc import Callable
import threading
import time
from typing import Any, Generic, TypeVar

from rclpy.callback_groups import CallbackGroup

T = TypeVar('T')
_FEW = 10  # frames: one skipped among so many means that they come too fast
_LONGEST_NS = 10**9  # period of frames that are waited for


class Mailbox(Generic[T]):
    """
    A bounded first-in first-out queue whose ``put`` never waits: it pushes the oldest out.

    With ``size`` 1 the newest item wins. Safe for use by several threads.
    """

    def __init__(self, size: int = 1, on_waiting: Callable[[], None] | None = None) -> None:
        """
        Hold at most ``size`` items.

        ``on_waiting`` is called when somebody begins to wait; it must not use this mailbox.
        """
        if size < 1:
            raise ValueError(f'size must be at least 1, got {size}')
        self._size = size
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._ready_s = 0.0  # when the items may be taken, by time.monotonic()
        self._closed = False
        self._waiting = False
        self._on_waiting = on_waiting

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for an item."""
        return self._waiting

    def put(self, item: T, wait_s: float = 0.0) -> T | None:
        """
        Add an item; return the oldest one if it had to go. A closed mailbox takes nothing.

        With ``wait_s``, which is for a mailbox of size 1, nobody gets the item for so long:
        whoever waits goes on waiting, and a newer one may take its place.
        """
        with self._changed:
            if self._closed:
                return item
            self._items.append(item)
            self._ready_s = time.monotonic() + wait_s if wait_s else 0.0
            self._waiting = self._waiting and wait_s > 0
            pushed_out = self._items.popleft() if len(self._items) > self._size else None
            self._changed.notify()
        # Hand Python's lock to whom was woken; he would get it a quarter of a millisecond later.
        time.sleep(0)
        return pushed_out

    def get(self) -> T | None:
        """Wait for an item and take it; None once the mailbox is closed."""
        with self._changed:
            while not self._closed:
                left_s = self._ready_s - time.monotonic() if self._items else None
                if left_s is not None and left_s <= 0:
                    break
                # Again after each wake-up: what was put may have been cleared away since.
                if not self._waiting:
                    self._waiting = True
                    if self._on_waiting is not None:
                        self._on_waiting()
                self._changed.wait(left_s)
            self._waiting = False
            return None if self._closed else self._items.popleft()

    def clear(self) -> int:
        """Throw all items away and return how many there were."""
        with self._changed:
            count = len(self._items)
            self._items.clear()
            return count

    def close(self) -> None:
        """Throw all items away and let every ``get`` return None."""
        with self._changed:
            self._closed = True
            self._waiting = False
            self._items.clear()
            self._changed.notify_all()


class Freshness:
    """
    Tells how long to wait for a newer frame than the one that has just been taken.

    Where frames come faster than they are answered, most go unanswered anyway, and which ones is
    ours to choose. Answering a frame that has waited for a time a already makes the answer older
    by a; waiting for the next one, which comes after T - a where T is their period, makes answers
    rarer by T - a. At the receiver the newest answer is on average the time it took plus a plus
    half the time between answers old, so waiting pays where a > (T - a) / 2, that is a > T / 3.
    """

    def __init__(self) -> None:
        """Begin with no frame seen."""
        self._last_ns = 0
        self._held = False
        self._since_skipped = _FEW

    def wait_s(self, received_ns: int, skipped: int, now_ns: int) -> float:
        """
        Return for how many seconds a newer frame is worth waiting for; 0 to answer this one now.

        Parameters
        ----------
        received_ns
            When the middleware received the frame; 0 where it does not say.
        skipped
            How many frames came, and were replaced, since the last one that was asked about.
        now_ns
            The present time of the same clock.

        """
        last_ns, self._last_ns = self._last_ns, received_ns
        held, self._held = self._held, False
        self._since_skipped = 0 if skipped else self._since_skipped + 1
        # Not twice in a row; not where all the last ones were answered: it is not too many then.
        if held or self._since_skipped >= _FEW or not last_ns or not received_ns:
            return 0.0
        period_ns = (received_ns - last_ns) / (skipped + 1)
        age_ns = now_ns - received_ns
        # Up to two periods: the next is on its way then. Later, the stream has ended.
        if period_ns > _LONGEST_NS or not 0 < period_ns < 3 * age_ns < 6 * period_ns:
            return 0.0
        self._held = True
        # The last frame of a stream is answered, too: when the next one is half a period late.
        return (max(period_ns - age_ns, 0) + period_ns / 2) / 1e9


class Gate(CallbackGroup):  # type: ignore[misc]
    """
    A callback group whose subscription is taken from only while ``is_open`` says so.

    The executor looks when it builds its wait set: wake it when the answer becomes yes.
    """

    def __init__(self, is_open: Callable[[], bool]) -> None:
        """Ask ``is_open`` each time."""
        super().__init__()
        self._is_open = is_open

    def can_execute(self, entity: Any) -> bool:
        """Tell whether the entity may be waited for and taken from now."""
        return self._is_open()

    def beginning_execution(self, entity: Any) -> bool:
        """Allow what has been taken to run."""
        return True

    def ending_execution(self, entity: Any) -> None:
        """Do nothing: one thread runs all callbacks."""
