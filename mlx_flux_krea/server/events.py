"""Events of the server: a ring of the latest ones, and streams that read it, each at its own speed.

A stream holds a position and no events of its own, so that a thousand idle or slow ones cost the memory of as many
numbers, and none can hold up those who publish.
"""

import asyncio
import json
import secrets
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

KEPT = 2000  # events
STREAMS = 64  # at a time
BEAT = 15.0  # seconds between comments of an idle stream


class Events:
    """The ring. Any thread may publish; streams are read in the loop that `listen` was called in.

    Attributes:
        streams: that are open; whoever answers with one counts it.
    """

    def __init__(self):
        self.streams = 0
        self._boot = secrets.token_hex(4)  # numbers begin anew with each start
        self._ring: deque[tuple[int, str, Any]] = deque(maxlen=KEPT)
        self._number = 0
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: asyncio.Event | None = None
        self._is_closed = False

    def listen(self) -> None:
        """Takes the running loop as the one that reads streams."""
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()

    def publish(self, name: str, data: Any) -> None:
        """Adds an event.

        Args:
            name: of the event.
            data: as JSON.
        """
        with self._lock:
            self._number += 1
            self._ring.append((self._number, name, data))
        self._wake()

    def close(self) -> None:
        """Ends every stream."""
        self._is_closed = True
        self._wake()

    @property
    def now(self) -> int:
        """The number of the latest event."""
        return self._number

    async def follow(self, number: int) -> AsyncIterator[tuple[int, str, Any] | None]:
        """Yields the events after a number as they come; None after `BEAT` seconds without one.

        Where some were missed, the first is ("reset", {}).
        """
        while not self._is_closed:
            missed = self._after(number)
            for event in missed:
                number = event[0]
                yield event
            if missed:
                continue
            news = self._news
            assert news is not None
            if self._after(number) or self._is_closed:  # they came before `news` was taken
                continue
            try:
                await asyncio.wait_for(news.wait(), BEAT)
            except TimeoutError:
                yield None

    async def stream(self, last: str) -> AsyncIterator[bytes]:
        """Yields server-sent events for a client.

        Args:
            last: its Last-Event-ID; "": none.
        """
        boot, _, number = last.partition("-")
        known = boot == self._boot and number.isdecimal() and len(number) < 16 and int(number) <= self._number
        start = int(number) if known else self._number
        if not known:
            yield self._encoded((start, "reset", {}))
        async for event in self.follow(start):
            yield b": idle\n\n" if event is None else self._encoded(event)

    def _after(self, number: int) -> list[tuple[int, str, Any]]:
        with self._lock:
            if self._ring and self._ring[0][0] > number + 1:
                return [(self._number, "reset", {})]
            return [event for event in self._ring if event[0] > number] if self._number > number else []

    def _wake(self) -> None:
        if self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._renew)

    def _renew(self) -> None:
        news, self._news = self._news, asyncio.Event()
        if news:
            news.set()

    def _encoded(self, event: tuple[int, str, Any]) -> bytes:
        number, name, data = event
        return f"id: {self._boot}-{number}\nevent: {name}\ndata: {json.dumps(data)}\n\n".encode()
