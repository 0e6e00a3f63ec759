"""Child processes: started in their own process groups, controlled over pipes, read from /proc, and always ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from bench.load import Job, Report, converter, share

STOP_S = 5.0
"""The time after SIGTERM until the whole group gets SIGKILL."""

_PROC = Path("/proc")
HAS_PROC = (_PROC / "self" / "stat").exists()
"""Without /proc, CPU time and memory are not measured, and the result says so."""


@asynccontextmanager
async def open_process(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], log: Path | None = None
) -> AsyncIterator[trio.Process]:
    """Runs a program in its own process group and ends the group with the block.

    Args:
        log: Receives its output. Without one, input and output are pipes, and errors go to this process's stderr.
    """
    with contextlib.ExitStack() as files:
        output = subprocess.PIPE if log is None else files.enter_context(log.open("ab"))
        process = await trio.lowlevel.open_process(
            command,
            stdin=subprocess.PIPE if log is None else subprocess.DEVNULL,
            stdout=output,
            stderr=None if log is None else subprocess.STDOUT,
            cwd=cwd,
            env=env,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            await _stop(process)


async def _stop(process: trio.Process) -> None:
    if process.stdin is not None:
        await process.stdin.aclose()
    # the whole group: a parent that exits alone leaves its workers running
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with trio.move_on_after(STOP_S):
        await process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


class Lines:
    """A child that reads commands as lines and answers with lines of JSON."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.pid = process.pid
        self._input = process.stdin
        self._output = process.stdout
        self._buffer = b""

    async def send_line(self, line: str) -> None:
        """Sends a line."""
        await self._input.send_all(line.encode() + b"\n")

    async def read(self) -> Any:  # Any: JSON
        """Reads an answer.

        Raises:
            EOFError: The child has exited; its error messages are on the terminal.
        """
        while b"\n" not in self._buffer:
            data = await self._output.receive_some(1 << 20)
            if not data:
                raise EOFError("a process of the bench ended early")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)


def environment() -> dict[str, str]:
    """This process's environment without variables that would lead a gateway to other upstreams, other code or a
    proxy."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.endswith("_API_KEY")
        and not name.startswith("TRIGATE_")
        and not name.lower().endswith("_proxy")
        and name != "PYTHONPATH"
    }


def _tool_environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}


# -- the mock upstream, the load generator ----------------------------------------------------------------------------


class Upstream:
    """The mock upstream's processes, on one port."""

    def __init__(self, port: int, processes: Sequence[Lines]) -> None:
        self.port = port
        self.processes = processes

    async def statistics(self, *, reset: bool = False) -> dict[str, Any]:  # Any: see `bench.upstream.Server.statistics`
        """Adds up the statistics of all processes. Of a maximum it takes the maximum."""
        total: dict[str, Any] = {}
        for lines in self.processes:
            with trio.CancelScope(shield=True):  # an unread answer would be taken for the next one
                await lines.send_line("reset" if reset else "stats")
                answer = await lines.read()
            for name, value in answer.items():
                greatest = name in ("late_max_us", "late_mean_us", "now_ns")
                before = total.get(name, [] if isinstance(value, list) else 0)
                total[name] = max(before, value) if greatest else before + value
        return total

    async def wait_active(self, streams: int, *, at_most_s: float) -> bool:
        """Waits until this many streams are open and returns whether they were in time."""
        with trio.move_on_after(at_most_s):
            while (await self.statistics())["active"] != streams:  # noqa: ASYNC110 - another process's state has no event
                await trio.sleep(0.02)
            return True
        return False


@asynccontextmanager
async def open_upstream(*, processes: int, port: int = 0) -> AsyncIterator[Upstream]:
    """Runs the mock upstream."""
    command = [sys.executable, "-m", "bench.upstream", *(["--shared"] if processes > 1 else [])]
    async with contextlib.AsyncExitStack() as stack:
        everyone = []
        for _ in range(processes):
            process = await stack.enter_async_context(
                open_process([*command, "--port", str(port)], cwd=Path.cwd(), env=_tool_environment())
            )
            lines = Lines(process)
            port = (await lines.read())["port"]
            everyone.append(lines)
        yield Upstream(port, everyone)


class Generator:
    """The load generator's processes."""

    def __init__(self, lines: Sequence[Lines]) -> None:
        self._lines = lines
        self._early: dict[Lines, Any] = {}  # Any: JSON

    async def start(self, job: Job) -> Sequence[Lines]:
        """Sends a job. `report` collects its result."""
        parts = share(job, len(self._lines))
        busy = self._lines[: len(parts)]
        for lines, part in zip(busy, parts, strict=True):
            await lines.send_line(json.dumps(converter.unstructure(part)))
        return busy

    async def wait_steady(self, busy: Sequence[Lines]) -> int:
        """Waits until the streams of a ``hold`` are open and returns their number."""
        steady = 0
        for lines in busy:
            answer = await lines.read()
            if "steady" in answer:
                steady += answer["steady"]
            else:  # its time limit passed before
                self._early[lines] = answer
        return steady

    async def close_streams(self, busy: Sequence[Lines]) -> Report:
        """Closes the streams of a ``hold``."""
        for lines in busy:
            if lines not in self._early:
                await lines.send_line("close")
        return await self.report(busy)

    async def report(self, busy: Sequence[Lines]) -> Report:
        """Waits for the end of a job and merges the reports."""
        whole = Report()
        for lines in busy:
            answer = self._early.pop(lines, None) or await lines.read()
            whole.merge(converter.structure(answer, Report))
        return whole


@asynccontextmanager
async def open_generator(*, processes: int) -> AsyncIterator[Generator]:
    """Runs the load generator."""
    async with contextlib.AsyncExitStack() as stack:
        everyone = [
            Lines(
                await stack.enter_async_context(
                    open_process([sys.executable, "-m", "bench.load"], cwd=Path.cwd(), env=_tool_environment())
                )
            )
            for _ in range(processes)
        ]
        yield Generator(everyone)


# -- data of the system on a process and its descendants --------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Memory:
    """Memory of some processes.

    Attributes:
        resident_bytes: The sum; shared memory counts for each process.
        proportional_bytes: Shared memory counts once, divided among the processes. None where it cannot be read.
    """

    resident_bytes: int
    proportional_bytes: int | None


def tree(pid: int) -> list[int]:
    """A process and its current descendants."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def cpu_s(pids: Sequence[int]) -> float:
    """CPU time of processes, to the nanosecond. That of exited children is to the kernel's tick.

    Source: clock_getcpuclockid(3): a process's clock is ``~pid << 3 | 2``. /proc/PID/stat has ticks of 10 ms only.
    """
    tick = os.sysconf("SC_CLK_TCK")
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += time.clock_gettime(~pid << 3 | 2)
            fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            total += (int(fields[13]) + int(fields[14])) / tick
    return total


def memory(pids: Sequence[int]) -> Memory:
    """Memory of processes."""
    page = os.sysconf("SC_PAGE_SIZE")
    resident = 0
    proportional: int | None = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            resident += int((_PROC / str(pid) / "statm").read_text().split()[1]) * page
            try:
                rollup = (_PROC / str(pid) / "smaps_rollup").read_text()
            except (PermissionError, FileNotFoundError):
                proportional = None
                continue
            pss_kib = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
            proportional = None if proportional is None else proportional + pss_kib * 1024
    return Memory(resident_bytes=resident, proportional_bytes=proportional)
