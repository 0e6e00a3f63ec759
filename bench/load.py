"""The load generator: a process that makes calls and reports how long everything took.

``python -m bench.load`` reads one `Job` as a line of JSON from its standard input and writes one `Report` as a line of
JSON. Before the report, a ``hold`` job writes ``{"steady": N}`` when its streams are open, and waits for a line
``close``. The process ends when its input ends.

Three kinds of load:

- ``closed``: a number of clients, each of which calls again after its answer. It measures a gateway's capacity. Its
latencies mean little, since a slow gateway gets fewer calls.
- ``open``: calls are due at given times, evenly or at random (Poisson). Latency counts **from the time at which the
call was due**, whether or not a connection was free, so that waiting caused by the gateway counts.
- ``hold``: streams are opened and stay open until the command to close them.

A call with an unexpected result (another status, a missing event, no ``[DONE]``) is an error, and none of its times
count.

It is one loop over non-blocking sockets, for the reason given in `readiness`; llhttp parses the answers. Content events
are counted by the mark at the start of each one's content, however a gateway has split or re-encoded them. The delay is
taken from every event of one stream in ``sample_every`` and not from some events of each stream: of events that arrive
together, only the first or the last would count.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import attrs
import cattrs
import httptools

from bench.distribution import Histogram
from bench.readiness import READ, WRITE, Poller, raise_descriptor_limit

MARK = b'"@'
"""The start of an event's content: an opening quote followed by the mock upstream's mark."""

_STAMP = re.compile(rb'"@([0-9a-f]{16})')
_CONNECTIONS_AT_ONCE = 64
"""Limit on connections being opened at a time: a listener's backlog may be as short as 100."""


@attrs.frozen(kw_only=True)
class Job:
    """A load to generate.

    Attributes:
        port: On 127.0.0.1, since the clocks of both ends are compared.
        path: The path to call.
        body: The whole body; ``@ID@`` in it is replaced by the stream's number.
        status: The expected status. Only the body of a 200 is checked.
        refusals: Statuses that are allowed refusals under overload; their latency is counted separately.
        stream: Whether the answer is a stream, of ``events`` content events.
        repeats: The stream has its text once more behind the content events, as Responses do; those count as well.
        ends: What is in the end of a complete stream.
        results: What is in a plain answer.
        connections: Clients, streams, or (``open``) the most connections.
        rate: Calls per second of an ``open`` load.
        poisson: At random rather than evenly.
        begin_ns: When to begin, by the monotonic clock.
        warmup_s: The time until the window opens.
        window_s: The length of the window.
        ramp_s: The clients of a ``closed`` load, and the streams of a ``hold``, begin over this time.
        drain_s: How long calls may continue after the window; then they count as unfinished.
        sample_every: See the module's docstring.
        keep_samples: Report each call's due time and latency.
        burst_at_s: The time from the beginning at which the calls of the burst are due at once.
        close_over_s: A ``hold`` closes its streams over this time; 0 = all at once.
        first_id: The first stream's number.
        first_ms: The mock upstream's wait before a stream's first event, which is subtracted from the time to the first
            content.
    """

    kind: Literal["closed", "open", "hold"]
    port: int
    path: str = "/v1/chat/completions"
    headers: Mapping[str, str] = {}
    body: str
    status: int = 200
    refusals: tuple[int, ...] = ()
    stream: bool = False
    events: int = 0
    repeats: bool = False
    ends: str = "[DONE]"
    results: str = '"choices"'
    connections: int = 1
    rate: float = 0
    poisson: bool = False
    seed: int = 1
    begin_ns: int = 0
    warmup_s: float = 0
    window_s: float = 1
    ramp_s: float = 0
    drain_s: float = 5
    sample_every: int = 1
    keep_samples: bool = False
    burst_at_s: float = 0
    burst_calls: int = 0
    close_over_s: float = 0
    first_id: int = 0
    first_ms: float = 0


@attrs.define(kw_only=True)
class Report:
    """The result of a job. Times are in microseconds; ``latency`` and ``first_content`` count from when a call was due.

    Attributes:
        calls: Correct answers within the window.
        events: Content events that arrived within the window.
        errors: Counts by kind.
        error: A description of the first error.
        unfinished: Calls that had not ended at the end of the drain. Expected of endless streams.
        latency: Of calls that were due within the window.
        refused: Of calls that were refused.
        first_content: To a stream's first content event, without the mock upstream's wait.
        delay: Of content events, from the mock upstream's send to the read here.
        samples: ``(due, latency)`` of each call; ``due`` in microseconds since the beginning.
        closed_ns: When each stream was closed, by its number.
        busy: The share of the window in which this process used a CPU. Near 1, the load generator was the bottleneck.
    """

    calls: int = 0
    events: int = 0
    received_bytes: int = 0
    connections: int = 0
    errors: dict[str, int] = attrs.Factory(dict)
    error: str = ""
    unfinished: int = 0
    latency: Histogram = attrs.Factory(Histogram)
    refused: Histogram = attrs.Factory(Histogram)
    first_content: Histogram = attrs.Factory(Histogram)
    delay: Histogram = attrs.Factory(Histogram)
    samples: list[tuple[int, int]] = attrs.Factory(list)
    closed_ns: dict[str, int] = attrs.Factory(dict)
    busy: float = 0.0

    def merge(self, other: Report) -> None:
        """Adds the report of another process for the same time."""
        self.calls += other.calls
        self.events += other.events
        self.received_bytes += other.received_bytes
        self.connections += other.connections
        for kind, count in other.errors.items():
            self.errors[kind] = self.errors.get(kind, 0) + count
        self.error = self.error or other.error
        self.unfinished += other.unfinished
        self.latency.merge(other.latency)
        self.refused.merge(other.refused)
        self.first_content.merge(other.first_content)
        self.delay.merge(other.delay)
        self.samples += other.samples
        self.closed_ns.update(other.closed_ns)
        self.busy = max(self.busy, other.busy)


converter = cattrs.Converter()
converter.register_unstructure_hook(Histogram, lambda histogram: histogram.to_json())
converter.register_structure_hook(Histogram, lambda value, _type: Histogram.from_json(value))


def share(job: Job, processes: int) -> list[Job]:
    """Splits a job among processes so that together they make the load of one.

    >>> [part.connections for part in share(Job(kind="closed", port=1, body="", connections=5), 2)]
    [3, 2]
    """
    processes = min(processes, job.connections)
    return [
        attrs.evolve(
            job,
            connections=job.connections // processes + (number < job.connections % processes),
            rate=job.rate / processes,
            seed=job.seed + number,
            burst_calls=job.burst_calls // processes + (number < job.burst_calls % processes),
            # the evenly spaced arrivals of the processes interleave
            begin_ns=job.begin_ns + (int(1e9 / job.rate) * number if job.rate and not job.poisson else 0),
            first_id=job.first_id + number * 1_000_000,
        )
        for number in range(processes)
    ]


def arrivals(job: Job) -> Iterator[int]:
    """Yields the due times of an open load's calls, in nanoseconds after its beginning.

    >>> job = Job(kind="open", port=1, body="", rate=100, window_s=0.04, burst_at_s=0.015, burst_calls=2)
    >>> [due // 1_000_000 for due in arrivals(job)]
    [0, 10, 15, 15, 20, 30]
    """
    end_ns = int((job.warmup_s + job.window_s) * 1e9)
    burst_ns = int(job.burst_at_s * 1e9)
    burst = job.burst_calls
    chance = random.Random(job.seed)
    due_ns = chance.expovariate(job.rate) * 1e9 if job.poisson else 0.0
    while due_ns < end_ns:
        if burst and due_ns > burst_ns:
            yield from [burst_ns] * burst
            burst = 0
        yield int(due_ns)
        due_ns += (chance.expovariate(job.rate) if job.poisson else 1 / job.rate) * 1e9


class Client:
    """A connection to the gateway with its current call."""

    __slots__ = (
        "connecting",
        "due_ns",
        "events",
        "fd",
        "first_ns",
        "head",
        "key",
        "last",
        "load",
        "number",
        "parser",
        "received",
        "request",
        "reused",
        "sampled",
        "sock",
        "status",
        "tail",
    )

    parser: httptools.HttpResponseParser

    def __init__(self, load: Load, number: int) -> None:
        self.load = load
        self.number = number
        self.sock: socket.socket | None = None
        self.fd = -1
        self.connecting = False
        self.reused = False
        self.due_ns = 0  # 0 = no call
        self.reset()

    def reset(self) -> None:
        """Discards the last answer."""
        self.events = self.first_ns = self.status = 0
        self.received = False
        self.last = -1
        self.head = self.tail = b""
        self.sampled = False
        self.key = ""
        self.request = b""

    # called by llhttp

    def on_headers_complete(self) -> None:
        """The status is known."""
        self.status = self.parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        """Receives a part of the body: a chunk, and so usually an event."""
        if not self.load.streams:
            self.head = self.head + data if self.head else data
            return
        count = data.count(MARK)
        if self.last == 0x22 and data[0] == 0x40:  # the mark itself was split
            count += 1
        self.last = data[-1]
        self.tail = data if len(data) > 16 else (self.tail + data)[-64:]
        if not count:
            if not self.head:
                self.head = data
            return
        load = self.load
        now = load.now_ns
        self.events += count
        if not self.first_ns:
            self.first_ns = now
            load.steady += 1
        if load.window_open:
            load.report.events += count
            if self.sampled:
                load.delays += [now - int(stamp, 16) for stamp in _STAMP.findall(data)]

    def on_message_complete(self) -> None:
        """The answer is complete."""
        self.load.on_answer(self, keep=self.parser.should_keep_alive())


class Load:
    """One run of a job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.streams = job.stream
        self.report = Report()
        self.delays: list[int] = []
        self.now_ns = time.monotonic_ns()
        self.window_open = False
        self.steady = 0
        """Streams that have had their first content."""
        self._latencies: list[int] = []
        self._firsts: list[int] = []
        self._refusals: list[int] = []
        self._poller = Poller()
        self._clients: dict[int, Client] = {}
        self._idle: list[Client] = []
        self._queue: deque[int] = deque()
        self._made = 0
        self._busy = 0
        self._connecting = 0
        self._to_connect: deque[Client] = deque()
        self._next_id = job.first_id
        self._first_ns = int(job.first_ms * 1e6)
        self._begin_ns = job.begin_ns or self.now_ns
        self._open_ns = self._begin_ns + int(job.warmup_s * 1e9)
        self._end_ns = self._open_ns + int(job.window_s * 1e9)
        self._stopping = False
        self._results = job.results.encode()
        self._ends = job.ends.encode()
        head = "".join(f"{name}: {value}\r\n" for name, value in job.headers.items())
        self._head = (
            f"POST {job.path} HTTP/1.1\r\nhost: 127.0.0.1:{job.port}\r\ncontent-type: application/json\r\n"
            f"accept: {'text/event-stream' if job.stream else 'application/json'}\r\n{head}content-length: "
        ).encode()
        self._body = job.body.encode()
        self._names_streams = b"@ID@" in self._body
        self._whole = self._request(self._body)

    def _request(self, body: bytes) -> bytes:
        return b"%b%d\r\n\r\n%b" % (self._head, len(body), body)

    def run(self, control_fd: int) -> Report:
        """Runs the job."""
        while time.monotonic_ns() < self._begin_ns:
            time.sleep(min(0.05, max(0.0, (self._begin_ns - time.monotonic_ns()) / 1e9)))
        if self.job.kind == "hold":
            self._hold(control_fd)
        else:
            self._call()
        for client in [*self._clients.values()]:
            self._disconnect(client)
        report = self.report
        report.latency.add(latency // 1000 for latency in self._latencies)
        report.refused.add(latency // 1000 for latency in self._refusals)
        report.first_content.add(first // 1000 for first in self._firsts)
        report.delay.add(delay // 1000 for delay in self.delays)
        return report

    # -- the loops ----------------------------------------------------------------------------------------------------

    def _call(self) -> None:
        """Makes calls until the window closes, then waits for the calls in flight."""
        job = self.job
        calls = arrivals(job) if job.kind == "open" else self._starts()
        next_ns = next(calls, None)
        cpu_s = 0.0
        # endless streams are not waited for: their Job has no drain time
        give_up_ns = self._end_ns + int(job.drain_s * 1e9)
        while True:
            now = self.now_ns = time.monotonic_ns()
            if not self.window_open and self._open_ns <= now < self._end_ns:
                self.window_open = True
                cpu_s = time.process_time()
            elif now >= self._end_ns and not self._stopping:
                self.window_open = False
                self._stopping = True
                self.report.busy = (time.process_time() - cpu_s) / job.window_s
            while next_ns is not None and self._begin_ns + next_ns <= now:
                self._arrive(self._begin_ns + next_ns)
                next_ns = next(calls, None)
            if self._stopping and (not self._busy or now >= give_up_ns):
                self.report.unfinished += self._busy + len(self._queue)
                return
            until = give_up_ns if self._stopping else self._end_ns
            if not self.window_open and not self._stopping:
                until = self._open_ns
            if next_ns is not None:
                until = min(until, self._begin_ns + next_ns)
            self._poll_once((until - now) / 1e9)

    def _starts(self) -> Iterator[int]:
        step_ns = int(self.job.ramp_s * 1e9 / self.job.connections)
        return iter([number * step_ns for number in range(self.job.connections)])

    def _hold(self, control_fd: int) -> None:
        """Opens streams, reports how many are open, and closes them on command.

        The window limits the time until they are open, and then the time until the command.
        """
        self._poller.add(control_fd, READ)
        starts = deque(self._starts())
        reported = False
        give_up_ns = self._end_ns
        self.window_open = True
        cpu_s, began_s = time.process_time(), time.monotonic()
        close_at: list[tuple[int, Client]] = []
        while True:
            now = self.now_ns = time.monotonic_ns()
            while starts and self._begin_ns + starts[0] <= now:
                self._arrive(self._begin_ns + starts.popleft())
            settled = self.steady + sum(self.report.errors.values())
            if not reported and (now >= give_up_ns or (not starts and settled >= self.job.connections)):
                starts.clear()
                print(json.dumps({"steady": self.steady}), flush=True)
                reported = True
                give_up_ns = now + int(self.job.window_s * 1e9)
            elif now >= give_up_ns:
                break
            if close_at:
                while close_at and close_at[-1][0] <= now:
                    client = close_at.pop()[1]
                    if client.due_ns:
                        self.report.closed_ns[client.key] = time.monotonic_ns()
                        self._disconnect(client)
                if not close_at:
                    break
            until = give_up_ns
            if starts:
                until = min(until, self._begin_ns + starts[0])
            if close_at:
                until = min(until, close_at[-1][0])
            if control_fd in self._poll_once((until - now) / 1e9):
                os.read(control_fd, 4096)
                self._poller.remove(control_fd)
                now = time.monotonic_ns()
                streaming = [client for client in self._clients.values() if client.due_ns]
                step_ns = int(self.job.close_over_s * 1e9 / max(1, len(streaming)))
                close_at = [(now + number * step_ns, client) for number, client in enumerate(streaming)][::-1]
                if not close_at:
                    break
        self.report.busy = (time.process_time() - cpu_s) / max(1e-9, time.monotonic() - began_s)

    def _poll_once(self, timeout_s: float) -> list[int]:
        """Waits and reads once; returns ready descriptors that belong to no client."""
        others = []
        clients = self._clients
        clock = time.monotonic_ns
        for fd, mask in self._poller.wait(min(max(0.0, timeout_s), 1.0)):
            client = clients.get(fd)
            if client is None:
                others.append(fd)
            elif client.connecting:
                self._connected(client)
            elif mask & ~WRITE:
                assert client.sock is not None
                try:
                    data = client.sock.recv(65_536)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                self.now_ns = clock()
                if not data:
                    self._eof(client)
                    continue
                client.received = True
                self.report.received_bytes += len(data)
                try:
                    client.parser.feed_data(data)
                except httptools.HttpParserError:
                    self._fail(client, "not HTTP", data)
        return others

    # -- a call -------------------------------------------------------------------------------------------------------

    def _arrive(self, due_ns: int) -> None:
        """Handles a call that is due."""
        if self._idle:
            self._send(self._idle.pop(), due_ns)
        elif self._made < self.job.connections:
            client = Client(self, self._made)
            self._made += 1
            self._send(client, due_ns)
        else:
            self._queue.append(due_ns)

    def _send(self, client: Client, due_ns: int) -> None:
        client.reset()
        client.due_ns = due_ns
        self._busy += 1
        if self.streams:
            client.sampled = self._next_id % self.job.sample_every == 0
            if self._names_streams:
                client.key = str(self._next_id)
                client.request = self._request(self._body.replace(b"@ID@", client.key.encode()))
            self._next_id += 1
        if client.fd >= 0:
            client.reused = True
            self._write(client)
        else:
            self._connect(client)

    def _connect(self, client: Client) -> None:
        if self._connecting >= _CONNECTIONS_AT_ONCE:
            self._to_connect.append(client)
            return
        sock = client.sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect_ex(("127.0.0.1", self.job.port))
        client.fd = sock.fileno()
        client.connecting = True
        client.reused = False
        client.parser = httptools.HttpResponseParser(client)
        self._connecting += 1
        self.report.connections += 1
        self._clients[client.fd] = client
        self._poller.add(client.fd, READ | WRITE)

    def _connected(self, client: Client) -> None:
        assert client.sock is not None
        client.connecting = False
        self._connecting -= 1
        if self._to_connect:
            self._connect(self._to_connect.popleft())
        error = client.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._fail(client, "cannot connect", os.strerror(error).encode())
            return
        self._poller.change(client.fd, READ)
        self._write(client)

    def _write(self, client: Client) -> None:
        assert client.sock is not None
        request = client.request or self._whole
        try:
            sent = client.sock.send(request)
        except OSError:
            self._eof(client)
            return
        if sent < len(request):
            self._fail(client, "would not take the request", b"")

    def on_answer(self, client: Client, *, keep: bool) -> None:
        """Handles a complete answer, correct or not."""
        if client.status in self.job.refusals:
            if self._open_ns <= client.due_ns < self._end_ns:
                self._refusals.append(self.now_ns - client.due_ns)
            self._free(client, keep=keep)
            return
        wrong = self._what_is_wrong(client)
        if wrong:
            self._fail(client, wrong, client.head + client.tail, keep=False)
            return
        now, due_ns = self.now_ns, client.due_ns
        if self.window_open:
            self.report.calls += 1
        # counted by due time, including calls that end after the window: leaving them out would leave out the slow ones
        if self._open_ns <= due_ns < self._end_ns:
            self._latencies.append(now - due_ns)
            if client.first_ns:
                self._firsts.append(client.first_ns - due_ns - self._first_ns)
        if self.job.keep_samples:
            self.report.samples.append(((due_ns - self._begin_ns) // 1000, (now - due_ns) // 1000))
        self._free(client, keep=keep)

    def _what_is_wrong(self, client: Client) -> str:
        if client.status != self.job.status:
            return f"status {client.status}"
        if self.job.status != 200:
            return ""
        if not self.streams:
            return "" if self._results in client.head else f"no {self.job.results.strip(chr(34))}"
        if client.events != self.job.events and not (self.job.repeats and client.events > self.job.events):
            return f"{'fewer' if client.events < self.job.events else 'more'} events than asked for"
        return "" if self._ends in client.tail else f"no {self.job.ends}"

    def _eof(self, client: Client) -> None:
        if not client.due_ns:  # idle: the gateway closes unused connections
            self._disconnect(client)
            self._idle.remove(client)
            self._idle.insert(0, client)
        elif client.reused and not client.received:  # it was closed at the moment of its reuse, so retry once
            due_ns = client.due_ns
            self._disconnect(client)
            self._busy -= 1
            self._send(client, due_ns)
        else:
            self._fail(client, "closed early", client.head + client.tail)

    def _fail(self, client: Client, kind: str, shown: bytes, *, keep: bool = False) -> None:
        report = self.report
        report.errors[kind] = report.errors.get(kind, 0) + 1
        report.error = report.error or f"{kind}: {shown[:300].decode(errors='replace')}"
        self._free(client, keep=keep)

    def _free(self, client: Client, *, keep: bool) -> None:
        client.due_ns = 0
        self._busy -= 1
        if not keep:
            self._disconnect(client)
        if self.job.kind == "closed":
            # a gateway that refuses at once must not get a million calls
            if not self._stopping and sum(self.report.errors.values()) < 1000:
                self._send(client, self.now_ns)
        elif self.job.kind == "open":
            if self._queue:
                self._send(client, self._queue.popleft())
            else:
                self._idle.append(client)

    def _disconnect(self, client: Client) -> None:
        if client.fd < 0 or client.sock is None:
            return
        if client.connecting:
            self._connecting -= 1
            client.connecting = False
        self._poller.remove(client.fd)
        del self._clients[client.fd]
        client.sock.close()
        client.sock = None
        client.fd = -1


def main() -> None:
    """Runs the jobs from standard input, one after the other."""
    raise_descriptor_limit()
    control_fd = sys.stdin.fileno()
    # read from the descriptor: a buffered reader would keep a line from the poller
    buffer = b""
    while True:
        while b"\n" not in buffer:
            data = os.read(control_fd, 65_536)
            if not data:
                return
            buffer += data
        line, _, buffer = buffer.partition(b"\n")
        if line == b"close":  # the command came after the streams were closed
            continue
        given: Any = json.loads(line)  # Any: JSON
        report = Load(converter.structure(given, Job)).run(control_fd)
        print(json.dumps(converter.unstructure(report)), flush=True)


if __name__ == "__main__":
    main()
