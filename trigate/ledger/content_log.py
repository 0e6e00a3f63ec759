"""The log of contents: what clients have asked and got, in files of JSON lines. It is off unless it is configured.

An exchange notes its answer as it goes to the client (`content.AnswerContent`), and adds an entry when it has ended;
both are synchronous. A task redacts the entries and writes them, in a thread. Entries that wait take at most
`MAX_WAITING_BYTES`; further ones, and those that cannot be written, are dropped, which is logged: a call neither waits
for this log nor fails because of it.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import attrs
import trio

from trigate.concurrency.notify import Wakeup, open_service
from trigate.config.report_sections import ContentLogConfig
from trigate.keys.key import ANYBODY, Key
from trigate.ledger.content import AnswerContent, entry_of
from trigate.logs import log
from trigate.store.records import ExchangeRecord

MAX_WAITING_BYTES = 64 * 1024 * 1024
CLOSE_TIMEOUT_S = 3.0
"""How long the entries that wait may take when the gateway stops, in seconds."""
PRUNE_S = 60.0
"""The shortest time between two deletions of old files, in seconds."""
_FILES = 10
"""A file has at most this part of the size of all."""


@attrs.frozen
class _Entry:
    record: ExchangeRecord
    request: bytes
    answer: AnswerContent


class ContentLog:
    """The log of contents of this worker. Made by `open_content_log`."""

    def __init__(self) -> None:
        self._settings = ContentLogConfig()
        self._patterns: Sequence[re.Pattern[str]] = ()
        self._waiting: list[_Entry] = []
        self._waiting_bytes = 0
        self._dropped = 0
        self._wakeup = Wakeup()
        self._path = ""
        self._pruned_at = 0.0

    def __repr__(self) -> str:
        return f"<ContentLog, {len(self._waiting)} entries waiting>"

    def apply(self, settings: ContentLogConfig) -> None:
        """Applies new settings."""
        self._settings, self._path = settings, ""
        self._patterns = [re.compile(pattern) for pattern in settings.redact]

    def answer_for(self, key: Key) -> AnswerContent | None:
        """Returns what notes an answer; None = the calls of this key are not logged."""
        if self._settings.directory is None or not (key.settings.content_log or key is ANYBODY):
            return None
        return AnswerContent(self._settings.entry_bytes)

    def add(self, record: ExchangeRecord, request: bytes, answer: AnswerContent) -> None:
        """Adds an exchange that has ended. Synchronous."""
        if self._waiting_bytes + len(request) + answer.size > MAX_WAITING_BYTES:
            self._dropped += 1
        else:
            self._waiting.append(_Entry(record, request, answer))
            self._waiting_bytes += len(request) + answer.size
        self._wakeup.set()

    async def run(self) -> None:
        """Writes entries; never returns."""
        while True:
            await self._wakeup.wait()
            await self._flush()

    async def _flush(self) -> None:
        await trio.lowlevel.checkpoint()
        entries, self._waiting, self._waiting_bytes = self._waiting, [], 0
        dropped, self._dropped = self._dropped, 0
        error = f"more than {MAX_WAITING_BYTES} bytes wait"
        if entries and self._settings.directory is not None:
            try:
                await trio.to_thread.run_sync(self._write, self._settings, self._settings.directory, entries)
            except OSError as failure:
                error, dropped = failure.strerror or repr(failure), dropped + len(entries)
            except Exception as defect:  # a defect must not end the gateway
                log.exception("content_log_crashed")
                error, dropped = repr(defect), dropped + len(entries)
        if dropped:
            log.error("contents_dropped", count=dropped, error=error)

    def _write(self, settings: ContentLogConfig, directory: str, entries: Sequence[_Entry]) -> None:
        """Writes entries to the file, in a thread."""
        lines = b"".join(
            entry_of(
                _facts(entry.record),
                entry.request,
                entry.answer.taken(),
                patterns=self._patterns,
                entry_bytes=settings.entry_bytes,
            )
            for entry in entries
        )
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._prune(settings, directory)
        if not self._path or _size(self._path) > settings.max_bytes // _FILES:
            second, ns = divmod(time.time_ns(), 10**9)
            begun = time.strftime("%Y%m%dT%H%M%S", time.gmtime(second))
            self._path = os.path.join(directory, f"content-{begun}.{ns:09}Z-{os.getpid()}.jsonl")
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(lines)

    def _prune(self, settings: ContentLogConfig, directory: str) -> None:
        """Deletes the files that are too old, and the oldest ones while all are too large together."""
        now = time.time()
        if self._path and now < self._pruned_at + PRUNE_S and _size(self._path) <= settings.max_bytes // _FILES:
            return
        self._pruned_at = now
        total = 0
        files = sorted(glob.glob(os.path.join(glob.escape(directory), "content-*.jsonl")), reverse=True)
        for path in files:  # the newest first
            with contextlib.suppress(FileNotFoundError):  # another worker has deleted it
                found = os.stat(path)
                total += found.st_size
                if total > settings.max_bytes or (settings.retention_s and found.st_mtime < now - settings.retention_s):
                    os.unlink(path)

    async def close(self) -> None:
        """Writes the entries that wait."""
        await trio.lowlevel.cancel_shielded_checkpoint()
        if self._waiting or self._dropped:
            with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                await self._flush()


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:  # it was deleted, by age
        return 0


def _facts(record: ExchangeRecord) -> dict[str, object]:
    return {
        "id": record.id,
        "request_id": record.request_id,
        "key": record.owner,
        "started_at": record.started_at,
        "endpoint": record.endpoint,
        "model": record.model,
        "target": record.target,
        "outcome": str(record.outcome),
        "status": record.status,
    }


@asynccontextmanager
async def open_content_log() -> AsyncIterator[ContentLog]:
    """Opens the log for a block. Nothing is written before the first entry."""
    contents = ContentLog()
    try:
        async with open_service(contents.run):
            yield contents
    finally:
        await contents.close()  # noqa: ASYNC102 - shielded, with a deadline of its own
