"""The invariants: after each step, whenever nothing is in flight, and of each call when it is over.

Each function yields a description of every violation, and nothing if all invariants hold.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import trio

from bench.events import DONE
from tests.simulator import draws
from tests.simulator.books import is_counted
from tests.simulator.clients import Call
from trigate.errors import codes
from trigate.exchange.answers import _REST_S
from trigate.exchange.attempt import Attempt
from trigate.exchange.exchange import Exchange
from trigate.exchange.upstream_call import UpstreamCall
from trigate.gateway.gateway import Gateway
from trigate.store.memory import MemoryStore
from trigate.store.records import ExchangeRecord
from trigate.upstream.generation import Generation

if TYPE_CHECKING:
    from tests.simulator.world import World

KEEP_ALIVE = b": keep-alive\n\n"
_ERROR = b'data: {"error"'
_EPSILON_S = 0.001
GRACE_S = 0.5
"""How much later than its deadline an answer may end."""
_CODES = codes()
_NAME = re.compile(rb'"id":"chatcmpl-(\d+)-(\d+)"')
_PASSED_ON = re.compile(r"s4\d\d")  # provider errors that the client gets unchanged
_REPORTED = "s0"

Live = Mapping[Exchange, Sequence[Attempt]]


# -- after each step --------------------------------------------------------------------------------------------------


def of_step(world: World, gateway: Gateway) -> Iterator[str]:
    """What must hold at each moment at which no task can run."""
    live, now = _live(gateway), trio.current_time()
    for exchange, attempts in live.items():
        call = world.calls.get(exchange.id)
        if call is None or call.returned or not call.entered:
            yield f"{exchange.id} is live, but its call is not"
        elif call.disconnected_at + (_REST_S if exchange.is_ended else 0.0) < now and not _finishes(exchange):
            yield f"{exchange.id} is live, but its client disconnected {now - call.disconnected_at:.6f} s ago"
        yield from _of_limits(exchange, attempts, now)
    yield from _of_admission(gateway, live)
    yield from _of_upstreams(world, gateway, live)
    yield from _of_quotas(world, gateway, live)
    wanted = Counter(
        (exchange.id, attempt.target.upstream)
        for exchange, attempts in live.items()
        for attempt in attempts
        if not attempt.is_superseded
    )
    for taken in world.open:
        if taken.is_wanted:
            wanted[taken.id, taken.upstream] -= 1
            if wanted[taken.id, taken.upstream] < 0:
                yield f"{taken.upstream} answers {taken.id}, but no attempt reads it: an orphan"
    probes = Counter(
        (attempt.target, exchange.call.endpoint.path)
        for exchange, attempts in live.items()
        for attempt in attempts
        if attempt.step.entry == "probe"
        and exchange.generation is gateway.generations.current  # a reload may begin anew
    )
    for target, endpoint, state in gateway.exchange_services.upstream.targets.items():
        if state.breaker._probing and not state.in_flight:
            yield f"the breaker of {target} waits for its probe, but there is none"
        probing = probes[target, endpoint]
        if probing > state.breaker._probing:
            yield f"{probing} probes are at {target}, but its breaker counts {int(state.breaker._probing)}"
    too_early = gateway.live.is_draining and not world.is_stopped and now + _EPSILON_S < world.moved_by
    if too_early and any(is_open() for is_open in world.accepted):
        yield f"calls are refused, but clients have {world.moved_by - now:.3f} s left to move"
    if len(gateway.exchange_services.upstream.timers) > len(live):
        yield f"{len(gateway.exchange_services.upstream.timers)} timers run for {len(live)} exchanges"
    if not world.in_app:
        yield from _of_idle(world, gateway)


def _live(gateway: Gateway) -> Live:
    """The exchanges in flight, with their attempts in progress. (The simulation has no shared calls.)"""
    live: dict[Exchange, Sequence[Attempt]] = {}
    for exchange in gateway.live:
        assert isinstance(exchange, Exchange)
        live[exchange] = exchange.source.live if isinstance(exchange.source, UpstreamCall) else ()
    return live


def _sending_since(exchange: Exchange) -> float | None:
    """Since when a send to the client waits; None = none does."""
    assert exchange.client is not None
    return exchange.client.sending_since


def _finishes(exchange: Exchange) -> bool:
    """Whether the answer is read to its end although the client has disconnected."""
    return exchange.request.model.on_disconnect == "finish" and exchange._may_finish()


def _of_limits(exchange: Exchange, attempts: Sequence[Attempt], now: float) -> Iterator[str]:
    """An exchange past its time limit has ended, unless its client keeps it waiting or already has the answer."""
    stall_s = exchange.generation.config.limits.stall_timeout_s
    sending_since = _sending_since(exchange)
    if sending_since is not None and sending_since + 1.5 * stall_s + _EPSILON_S < now:
        yield f"{exchange.id} is live, but its client reads nothing; stall_timeout_s is {stall_s:g}"
    if sending_since is not None or exchange.is_ended:
        return
    if exchange.deadline_at + _EPSILON_S < now:
        yield f"{exchange.id} is live {now - exchange.deadline_at:.3f} s after its deadline"
    for attempt in attempts:
        phases: list[tuple[Literal["first_token", "idle"], float]] = [("first_token", attempt.waiting_since)]
        if attempt.waiting_since == math.inf:  # the first token has come
            phases.append(("idle", attempt.last_byte_at))
        for phase, since in phases:
            if since > now:  # not yet
                continue
            limit_s = exchange.generation.config.timeout_s(attempt.target.upstream, phase, exchange.call.model)
            if since + limit_s + _EPSILON_S < now:
                yield f"{exchange.id} waits for {attempt.target} for {now - since:.3f} s; {phase} is {limit_s:g} s"


def _of_admission(gateway: Gateway, live: Live) -> Iterator[str]:
    slots = gateway.exchange_services.admission.slots
    at_work = sum(1 for attempts in live.values() if attempts)
    if not at_work <= slots.taken <= len(live) - slots.queued:
        yield f"{slots}, but {len(live)} exchanges are live, of which {at_work} make attempts"
    if sum(slots.taken_by.values()) != slots.taken:
        yield f"{slots}, but the keys have {slots.taken_by}"
    for key in slots._waiting:
        if slots.is_free(key):
            yield f"{slots}, but {key} waits although a slot is free"


def _of_upstreams(world: World, gateway: Gateway, live: Live) -> Iterator[str]:
    held: Counter[int] = Counter()
    waiting: Counter[int] = Counter()
    let_go: Counter[int] = Counter()
    users: Counter[int] = Counter()
    for exchange, attempts in live.items():
        users[id(exchange.generation)] += 1
        for attempt in attempts:
            upstream = exchange.generation.upstreams[attempt.target.upstream]
            if attempt.phase != "ended":  # its answer waits for the client
                (waiting if attempt.phase == "queued" else held)[id(upstream)] += 1
            if attempt.reply is not None and _sending_since(exchange) is not None and _is_let_go(attempt.reply):
                let_go[id(upstream)] += 1
    for generation in world.generations:
        if generation.exchanges != users[id(generation)]:
            yield f"{generation.exchanges} exchanges hold a generation, but {users[id(generation)]} use it"
        for name, upstream in generation.upstreams.items():
            statistics = upstream.statistics()
            if (statistics.in_flight, statistics.queued) != (held[id(upstream)], waiting[id(upstream)]):
                yield (
                    f"{name} has {statistics.in_flight} slots taken and {statistics.queued} calls waiting for one; "
                    f"its attempts hold {held[id(upstream)]}, and {waiting[id(upstream)]} wait"
                )
            if statistics.in_flight > statistics.max_connections:
                yield f"{name} has {statistics.in_flight} calls at once; {statistics.max_connections} are allowed"
    for line in world.lines:
        pool = line.transport.statistics()
        if pool.open != line.open + line.dialling:
            yield f"{line.transport}; {line.open} connections are open, {line.dialling} are being made"
    for generation in world.generations:
        for name, upstream in generation.upstreams.items():
            pool = upstream.transport.statistics()  # type: ignore[attr-defined] # the simulation's transports have it
            if pool.open - pool.idle != upstream.in_flight - let_go[id(upstream)]:
                yield f"{upstream.transport} of {name}, but {upstream.in_flight} calls use it"


def _of_quotas(world: World, gateway: Gateway, live: Live) -> Iterator[str]:
    """What is held of the limits is what the exchanges in flight, and their attempts, have reserved."""
    own = {exchange.reservation for exchange in live} - {None}
    held = {each for each in world.books.open if not each.limits.all[0].scope.startswith("upstream:")}
    if held != own:
        yield f"{len(held)} reservations hold something, but {len(own)} exchanges have one"
    quotas = gateway.exchange_services.quotas
    for counter in quotas.all_counters():
        if is_counted(counter) and counter.held != world.books.held(counter):  # type: ignore[attr-defined] # it is
            yield f"{counter}, but its calls hold {world.books.held(counter)}"


def _is_let_go(reply: Any) -> bool:
    """Whether the reply's connection is already closed, while the reply waits for a client that does not read."""
    return reply._source.response._connection is None


def _of_idle(world: World, gateway: Gateway) -> Iterator[str]:
    """What must hold whenever no call is in flight."""
    if len(gateway.live):
        yield f"idle, but {gateway!r}"
    if len(gateway.exchange_services.upstream.timers):
        yield f"idle, but {gateway.exchange_services.upstream.timers!r}"
    services = gateway.exchange_services
    relay = services.upstream.socket_relay
    if services.cancel_queue._scopes or (relay is not None and relay.streams):
        yield f"idle, but {services.cancel_queue!r}, {relay!r}"
    slots = gateway.exchange_services.admission.slots
    if slots.taken or slots.queued or slots.taken_by:
        yield f"idle, but {slots}"
    for target, _, state in gateway.exchange_services.upstream.targets.items():
        if state.in_flight:
            yield f"idle, but {state.in_flight} attempts at {target} have not ended"
    for taken in world.open:
        if taken.is_wanted:
            yield f"idle, but {taken.upstream} answers {taken.id}: an orphan"
    if world.books.open or services.quotas._renewing:
        yield f"idle, but {len(world.books.open)} reservations and {len(services.quotas._renewing)} leases are open"
    if gateway.sessions.turns:
        yield f"idle, but {gateway.sessions.turns} session turns are running"
    for generation in world.generations:
        if generation is not gateway.generations.current and not is_closed(generation):
            yield "idle, but a replaced generation is open"
    totals = gateway.live.totals
    if not totals.exchanges == totals.complete + totals.cancelled + totals.failed == world.settled.total():
        yield f"{world.settled.total()} exchanges were settled, but {totals}"


def is_closed(generation: Generation) -> bool:
    """Whether the generation has no open connection."""
    return all(
        upstream.transport.statistics().open == 0  # type: ignore[attr-defined] # as above
        for upstream in generation.upstreams.values()
    )


def of_ledger(world: World, records: Sequence[ExchangeRecord]) -> Iterator[str]:
    """Each exchange has one ledger record with its outcome."""
    kept = Counter((record.request_id, record.outcome) for record in records)
    if kept != world.settled:
        yield f"settled: {world.settled - kept}, but the ledger has {kept - world.settled}"


def of_store(world: World, gateway: Gateway) -> Iterator[str]:
    """What each scope has spent is what its exchanges have cost, on each day, and no more than its budget."""
    spent = {(scope, day): amount for scope, day, amount in _rows(gateway, "SELECT scope, day, amount FROM spent")}
    noted = {each: amount for each, amount in world.books.spent.items() if amount}
    if spent != noted:
        yield f"the store has {spent} as spent, but the calls have cost {noted}"
    recorded = _rows(gateway, "SELECT request_id, cost FROM exchanges")
    if dict(recorded) != world.books.costs:
        yield f"the ledger has the costs {recorded}, but the calls have cost {world.books.costs}"


def of_closed_store(gateway: Gateway) -> Iterator[str]:
    """A gateway that has ended has given all its leases back."""
    left = "SELECT name, amount FROM leases WHERE amount > 0 AND name NOT LIKE '%/rpm' AND name NOT LIKE '%/tpm'"
    if leases := _rows(gateway, left):
        yield f"closed, but {leases} are leased"


def _rows(gateway: Gateway, query: str) -> list[tuple[Any, ...]]:
    store = gateway.store
    assert isinstance(store, MemoryStore)
    return list(store._db.execute(query)) if store._db is not None else []


def of_end(world: World) -> Iterator[str]:
    """What must hold when a gateway has been closed."""
    for line in world.lines:
        if line.open or line.dialling or line.transport.statistics().open:
            yield f"closed, but {line.transport} has {line.open} connections"
    if world.in_app:
        yield f"closed, but {len(world.in_app)} calls are running"
    if any(is_open() for is_open in world.accepted):
        yield "closed, but client connections are open"


# -- of a call --------------------------------------------------------------------------------------------------------


def of_call(world: World, call: Call) -> Iterator[str]:
    """What must hold of a call that is over for the client and for the app."""
    if call.entered > 1:
        yield f"the app was called {call.entered} times"
    if call.settled != call.admitted:
        yield f"its exchange was admitted {call.admitted} times, but settled {call.settled} times"
    answer = call.answer
    if answer.complete and answer.keep_alive and call.begun_at > world.succeeded_at:
        yield "another gateway has taken over, but its client was not notified"
    if answer.late:
        yield "bytes arrived after the end of its answer"
    if not answer.complete and not call.disconnected and not _may_lack_its_end(world, call):
        yield f"its answer, {answer.status or 'nothing'}, has no proper end"
    if answer.complete and call.admitted and not call.disconnected and not call.stalled:
        # The client's deadline also covers the wait for a session turn; the gateway's limit does not.
        due_at = min(call.admitted_at + call.total_s, call.sent_at + (call.request.timeout_s or math.inf))
        if answer.ended_at > due_at + GRACE_S:
            yield f"it ended {answer.ended_at - due_at:.3f} s after its deadline"
        begun_at = answer.begun_at if call.request.kind == "stream" else answer.ended_at
        # The connection may still have been busy with the rest of the previous answer.
        if begun_at > call.sent_at + (call.request.sdk_timeout_s or math.inf) + _REST_S:
            yield f"it began after {begun_at - call.sent_at:.3f} s; its SDK waits for {call.request.sdk_timeout_s}"
    if not answer.status:
        return
    if answer.status == 200:
        match call.request.kind:
            case "stream":
                yield from _of_stream(world, call)
            case "json":
                yield from _of_json(call)
            case "speech":
                yield from _of_speech(call)
    elif answer.complete:
        yield from _of_error(world, call, bytes(answer.body))


def _may_lack_its_end(world: World, call: Call) -> bool:
    if world.broken_off or call.stalled:
        return True
    if not call.entered:
        if call.before is not None and not call.before.sent_at <= call.before.returned_at:
            return (
                True  # the request before was refused before its body had arrived, and the server did not wait for it
            )
        idle_since = call.before.returned_at if call.before is not None else math.inf
        return world.stopping or call.begun_at + _EPSILON_S > idle_since + draws.KEEP_ALIVE_TIMEOUT_S
    # Audio cannot carry an error event, so the client's only sign of an error is a truncated response.
    return call.request.kind == "speech" and call.answer.status == 200 and call.outcome in _CODES


def _of_error(world: World, call: Call, body: bytes) -> Iterator[str]:
    try:
        code = msgspec.json.decode(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        yield f"its answer is {call.answer.status} without an error: {body!r}"
        return
    if code in ("overloaded", "rate_limited") and "retry-after-ms" not in call.answer.headers:
        yield f"{code} has no retry time"
    yield from _of_code(world, call, code)


def _of_code(world: World, call: Call, code: Any) -> Iterator[str]:
    if _PASSED_ON.fullmatch(str(code)):
        meant: tuple[str, ...] = ("upstream_rejected", "upstream_throttled")
    elif code == _REPORTED:
        meant = ("upstream_error",)
    else:
        meant = (code,)
    if code == "draining" and not world.stopping:
        yield "the client got draining, but the gateway is not stopping"
    if code == "internal_error" or not _CODES.issuperset(meant):
        yield f"its error has the code {code}"
    if call.admitted and not call.disconnected and call.outcome not in meant:
        yield f"the client got {code}, but the exchange was settled as {call.outcome}"


def _is_complete(call: Call) -> Iterator[str]:
    if call.outcome not in ("complete", "finished") or (call.outcome == "finished" and not call.disconnected):
        yield f"the answer is complete, but the exchange was settled as {call.outcome}"


def events_of(body: bytes) -> tuple[list[bytes], bytes]:
    """The events of a stream without the gateway's comments, and the bytes after the last complete event.

    >>> events_of(b": keep-alive\\n\\ndata: 1\\n\\n: keep-alive\\n\\n: keep-alive\\n\\ndata: 2\\n\\ndat")
    ([b'data: 1\\n\\n', b'data: 2\\n\\n'], b'dat')
    """
    events: list[bytes] = []
    at = 0
    while True:
        while body.startswith(KEEP_ALIVE, at):
            at += len(KEEP_ALIVE)
        end = body.find(b"\n\n", at)
        if end < 0:
            return events, body[at:]
        events.append(body[at : end + 2])
        at = end + 2


def text_of(events: list[bytes]) -> str:
    """The text of the events of a chat stream; events that are not JSON have none."""
    return "".join(_content(choice) for value in _decoded(events) for choice in value["choices"])


def _decoded(events: list[bytes]) -> Iterator[Any]:  # Any: JSON
    for event in events:
        with contextlib.suppress(ValueError):
            yield msgspec.json.decode(event[6:])


def _content(choice: Any) -> str:  # Any: as above
    return choice["delta"].get("content") or ""


def _public(call: Call, upstream: str, body: bytes) -> bytes:
    return body.replace(b'"model":"m-%b"' % upstream.encode(), b'"model":"%b"' % call.request.model.encode())


def _of_stream(world: World, call: Call) -> Iterator[str]:
    answer, asked = call.answer, call.request
    events, rest = events_of(bytes(answer.body))
    if rest and answer.complete:
        yield f"its answer ends with an incomplete event: {rest!r}"
    if not answer.complete and (rest.startswith(_ERROR[: len(rest)]) or KEEP_ALIVE.startswith(rest)):
        rest = b""  # the client disconnected in the middle of it
    last = [position for position, event in enumerate(events) if event == DONE or event.startswith(_ERROR)]
    if last and (last[0] != len(events) - 1 or rest):
        yield f"something follows the last event: {b''.join(events[last[0] :]) + rest!r}"
        return
    if not last and answer.complete:
        yield f"its stream ends with neither [DONE] nor an error: {events[-1:]!r}"
    done = bool(last) and events[-1] == DONE
    sent = events[:-1] if last and not done else events
    yield from _of_text(call, sent, done=done)
    if not call.continued:
        yield from _of_bytes(call, b"".join(sent) + rest, done=done)
    if call.quiet_s > call.keep_alive_s + _EPSILON_S and answer.complete:
        yield f"it was quiet for {call.quiet_s:.3f} s; keep_alive_s is {call.keep_alive_s:g}"
    if done and answer.complete:
        yield from _is_complete(call)
        if (call.events, call.bytes) != (len(events), sum(map(len, events))) and not call.disconnected:
            yield f"its exchange counts {call.events} events, {call.bytes} bytes; there are {len(events)}: {events!r}"
    elif last and answer.complete:
        code = msgspec.json.decode(events[-1][6:])["error"]["code"]
        yield from _of_code(world, call, code)
        stated = len(sent), sum(map(len, sent))
        if (call.events, call.bytes) != stated and code != _REPORTED and not call.disconnected:
            yield f"its exchange counts {call.events} events, {call.bytes} bytes before the error; there are {stated}"
        if code in ("overloaded", "rate_limited"):
            yield f"{code} is an event, which cannot carry a retry time"
    if call.outcome == "complete" and not done and not call.disconnected and not call.stalled:
        yield f"the exchange was settled as complete, but the client of {asked.id} has no [DONE]"


def _of_bytes(call: Call, got: bytes, *, done: bool) -> Iterator[str]:
    """A stream from one provider contains that provider's bytes, unchanged."""
    name = _NAME.search(got)
    if name is None:  # the client disconnected within the first event
        sent = [_public(call, upstream, reply.body) for upstream, reply in call.replies]
        if got and (done or not any(body.startswith(got) for body in sent)):
            yield f"no provider sent {got!r}"
        return
    upstream, reply = call.replies[int(name[2])]
    expected = _public(call, upstream, reply.body)
    if int(name[1]) != call.request.number or not expected.startswith(got) or (done and got != expected):
        yield f"its answer is {got!r}, but {upstream} sent {expected!r}"
    stated = call.answer.headers.get("x-trigate-upstream")
    if stated != upstream and not call.answer.body.startswith(KEEP_ALIVE):  # sent before the upstream is known
        yield f"its head names {stated}, but {upstream} answered"
    if done and not reply.whole:
        yield f"its stream is complete, but that of {upstream} was not"


def _of_text(call: Call, events: list[bytes], *, done: bool) -> Iterator[str]:
    """The events carry the text or a prefix of it, whichever provider sent them."""
    names, roles = set(), 0
    for value in _decoded(events):
        names.add(value["id"])
        roles += sum("role" in choice["delta"] for choice in value["choices"])
        if value["model"] != call.request.model:
            yield f"an event names the model {value['model']}"
    text = text_of(events)
    if not call.request.text.startswith(text) or (done and text != call.request.text):
        yield f"it says {text!r} instead of {call.request.text!r}"
    if len(names) > 1 or roles > 1:
        yield f"its events have the ids {sorted(names)}, and {roles} have a role"


def _of_json(call: Call) -> Iterator[str]:
    got = bytes(call.answer.body)
    expected = [_public(call, upstream, reply.body) for upstream, reply in call.replies if reply.whole]
    if not any(each.startswith(got) and (len(each) == len(got) or not call.answer.complete) for each in expected):
        yield f"its answer is {got!r}, but the providers sent {expected!r}"
    if call.answer.complete:
        yield from _is_complete(call)


def _of_speech(call: Call) -> Iterator[str]:
    got, asked = bytes(call.answer.body), call.request
    if not asked.speech.startswith(got) or (call.answer.complete and got != asked.speech):
        yield f"it got {len(got)} bytes, of {len(asked.speech)}, but not the right ones"
    if call.answer.complete:
        yield from _is_complete(call)
