"""Keeps the reasoning before tool calls, for clients that do not send it back (`trigate.dialects.memory`).

It is kept by the name of the gateway key and the id of the tool call, so no key gets another one's: in this worker, and
in the store, which all workers share and which survives a restart.

What a call costs:

* A call whose format is not translated costs nothing.
* An answer is remembered only if it has tool calls and reasoning before them, or payloads. The write is queued and not
  waited for.
* A request is looked up only if it has tool calls without their reasoning, and in the store only those that this worker
  does not know. That the store has none is remembered, too, except for the latest tool calls: another worker may be
  about to write theirs. So a conversation of a model that does not reason asks the store once for each turn.

The memory never fails a call: if the store cannot be used, or is slower than `PATIENCE_S`, the call goes out as it is.

The key of the gateway's marks (`trigate.dialects.marks`) is here as well, since it comes from the same store: random,
made by the first worker that needs it. While the store cannot be used, marks are made with a key of this process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import msgspec
import trio

from trigate.config.sections import ReasoningMemoryConfig
from trigate.dialects.marks import KEY_BYTES, Marks
from trigate.dialects.memory import Remembered
from trigate.dialects.translated_call import Memory, TranslatedCall
from trigate.errors import StoreUnavailable
from trigate.store.interface import Store
from trigate.store.records import ReasoningRecord

PATIENCE_S = 1.0
"""Seconds that a call waits for the store."""
_LOOKED_UP = 1000
"""The most tool calls of one request that are looked up; the latest ones."""
_ENTRY_BYTES = 200
"""What an entry takes in memory besides its value, roughly."""
_MARKS = "marks"

_decode = msgspec.json.Decoder(Remembered).decode
_encode = msgspec.json.Encoder().encode


class ReasoningMemory:
    """The memory of one worker. Made by the composition root."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._settings = ReasoningMemoryConfig()
        self._entries: OrderedDict[tuple[str, str], tuple[float, bytes]] = OrderedDict()
        self._size_bytes = 0
        self._marks: Marks | None = None
        self._own_marks = Marks(os.urandom(KEY_BYTES))

    def __repr__(self) -> str:
        return f"<ReasoningMemory {len(self._entries)} entries, {self._size_bytes} bytes>"

    def apply(self, settings: ReasoningMemoryConfig) -> None:
        """Applies the configuration."""
        self._settings = settings
        if not settings.enabled:
            self._entries.clear()
            self._size_bytes = 0
        self._shrink()

    async def use_for(self, call: TranslatedCall, owner: str) -> None:
        """Gives a call what is known of its conversation, and remembers its answer.

        Args:
            owner: The name of the gateway key.
        """
        settings = self._settings
        marks = self._marks or await self._load_marks()
        found: Mapping[str, Remembered] = {}
        if settings.enabled and (lost := call.lost):
            found = await self._recall(owner, lost[-_LOOKED_UP:], latest=call.latest_calls)
        keep = functools.partial(self._keep, owner) if settings.enabled else None
        call.use(Memory(marks=marks, found=found, keep=keep, max_bytes=settings.entry_bytes))

    async def _load_marks(self) -> Marks:
        with trio.move_on_after(PATIENCE_S), contextlib.suppress(StoreUnavailable):
            self._marks = Marks(await self._store.secret(_MARKS, self._own_marks.key))
        return self._marks or self._own_marks

    # -- looking up ---------------------------------------------------------------------------------------------------

    async def _recall(self, owner: str, calls: Sequence[str], *, latest: frozenset[str]) -> Mapping[str, Remembered]:
        since = time.time() - self._settings.retention_s
        found: dict[str, bytes] = {}
        unknown: list[str] = []
        for call in calls:
            entry = self._entries.get((owner, call))
            if entry is None or entry[0] < since:
                unknown.append(call)
            else:
                self._entries.move_to_end((owner, call))
                found[call] = entry[1]
        if unknown:
            with trio.move_on_after(PATIENCE_S):
                try:
                    stored = await self._store.reasoning.get(owner, unknown, since=since)
                except StoreUnavailable:
                    stored = None
                if stored is not None:
                    self._note_stored(owner, unknown, stored, latest)
                    found |= stored
        return {call: _decode(value) for call, value in found.items() if value}

    def _note_stored(
        self, owner: str, unknown: Sequence[str], stored: Mapping[str, bytes], latest: frozenset[str]
    ) -> None:
        # Its age is unknown here: the store is asked again after half of the time, at the latest.
        at = time.time() - self._settings.retention_s / 2
        for call in unknown:
            if call in stored or call not in latest:
                self._put(owner, call, at, stored.get(call, b""))

    # -- keeping ------------------------------------------------------------------------------------------------------

    def _keep(self, owner: str, calls: Mapping[str, Remembered]) -> None:
        now = time.time()
        records = [ReasoningRecord(owner, call, now, _encode(each)) for call, each in calls.items()]
        for record in records:
            self._put(owner, record.call, now, record.value)
        self._store.reasoning.put(records, most=self._settings.max_entries)

    def _put(self, owner: str, call: str, at: float, value: bytes) -> None:
        self._drop((owner, call))
        self._entries[owner, call] = at, value
        self._size_bytes += _ENTRY_BYTES + len(value)
        self._shrink()

    def _drop(self, key: tuple[str, str]) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._size_bytes -= _ENTRY_BYTES + len(entry[1])

    def _shrink(self) -> None:
        while self._size_bytes > self._settings.memory_bytes:
            self._drop(next(iter(self._entries)))
