"""A bounded queue between two stages of a video pipeline."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")
POLL_S = 0.1


class FrameQueue(Generic[T]):
    """First in, first out, bounded; when full it either makes the producer wait or drops the oldest item."""

    def __init__(self, capacity: int, stop: threading.Event, *, drop_oldest: bool) -> None:
        """Make an empty queue.

        Args:
            capacity: items it holds, at least 1.
            stop: set by anyone to end the pipeline at once; waiting calls then return.
            drop_oldest: live sources want the newest frames; files want every frame.
        """
        self.dropped = 0
        self._items: deque[T] = deque()
        self._capacity = capacity
        self._stop = stop
        self._drop_oldest = drop_oldest
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: T) -> None:
        """Append an item; waits for room unless the queue drops the oldest. Ignored once stopped."""
        with self._changed:
            while len(self._items) >= self._capacity:
                if self._drop_oldest:
                    self._items.popleft()
                    self.dropped += 1
                elif self._stop.is_set():
                    return
                else:
                    self._changed.wait(POLL_S)
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> T | None:
        """Take the oldest item, waiting for one; None when the queue is closed and empty, or stopped."""
        with self._changed:
            while not self._items:
                if self._closed or self._stop.is_set():
                    return None
                self._changed.wait(POLL_S)
            if self._stop.is_set():
                return None
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """No more items will come; those inside can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
