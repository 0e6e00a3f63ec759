"""The random draws of a simulation: configurations, requests and the providers' replies. Pure.

Every draw has its own generator, seeded with the simulation's seed and the draw's purpose. So the fate of a request
does not depend on concurrent events, and a shorter run of a seed is the beginning of a longer one.
"""

from __future__ import annotations

import functools
import math
import random
from typing import Any, Literal

import attrs
import msgspec

from bench import events
from tests.simulator import allowances

UPSTREAMS = ("alpha", "beta", "gamma")
MODELS = ("one", "both", "spread", "race", "kept", "alpha/m-alpha")
KEYS = {name: f"key-of-{name}-0123456789" for name in ("ada", "bob", "cyd")}
_CALLS = {"ada": 430, "bob": 140, "cyd": 140}
"""How many calls a minute are made with a key, about."""
SPEECH_BYTES = 3000
KEEP_ALIVE_TIMEOUT_S = 5
NONSENSE = b"data: {nonsense\n\n"
_WEATHER_S = 15.0

# JSON strings that look like protocol syntax, and characters that careless readers split.
_WORDS = (
    *("so ", "it ", "goes, ", "Grüße ", "🌍 ", "\u2028", "\x85 ", "\r\n\r\n", "\\", '"', "x" * 80 + " "),
    *('"model":"m-alpha"', "data: [DONE]\n\n", '{"error":{}} ', '"finish_reason":"stop" ', '"usage":{} ', "\\u006d "),
)


def rng_for(*what: object) -> random.Random:
    """The random generator for one purpose."""
    return random.Random("/".join(map(str, what)))


def is_plain(seed: int, *what: object) -> bool:
    """Whether a connection uses a real socket."""
    return rng_for(seed, "plain", *what).random() < 0.7


# -- the configuration ------------------------------------------------------------------------------------------------


def configuration(seed: int, number: int, life: int) -> dict[str, Any]:  # Any: a table of TOML
    """A configuration as its file would hold it, with limits low enough to be reached.

    Args:
        number: Of the configuration.
        life: Of the gateway.
    """
    tables = _services(seed, number)
    shape, amounts = rng_for(seed, "budgets", life), rng_for(seed, "allowances", number)

    def limited(calls: float) -> dict[str, Any]:  # Any: a table of TOML
        return allowances.limits(shape, amounts, calls=calls)

    for name in UPSTREAMS:
        limits = limited(400)
        if name in tables["upstreams"]:
            tables["upstreams"][name] |= limits
    for model in tables["models"].values():
        model |= limited(120)
    tables["keys"] = {name: {"secret": secret, **limited(_CALLS[name])} for name, secret in KEYS.items()}
    for name in ("ada", "bob"):
        tables["keys"][name]["group"] = "team"
    tables["groups"] = {"team": limited(600)}
    tables["allowance"] = limited(700)
    tables["prices"] = allowances.prices(shape, [f"{name}/m-{name}" for name in UPSTREAMS])
    if amounts.random() < 0.2:
        del tables["keys"]["cyd"]
    return tables


def _services(seed: int, number: int) -> dict[str, Any]:  # Any: as above
    rng, routing = rng_for(seed, "configuration", number), rng_for(seed, "routing", number)

    def chance(of: float) -> bool:
        return rng.random() < of

    def one_of(*values: Any) -> Any:  # Any: as the table
        return rng.choice(values)

    def rules() -> dict[str, Any]:  # Any: as above
        own: dict[str, Any] = {"on_truncation": one_of("error", "continue", "continue")}
        if chance(0.3):
            own["max_attempts"] = rng.randint(1, 5)
        if chance(0.2):
            own["total_timeout_s"] = round(rng.uniform(2.0, 8.0), 2)
        return own

    upstreams = [name for name in UPSTREAMS if name == "alpha" or chance(0.9)]
    targets = [f"{name}/m-{name}" for name in upstreams]
    shuffled = rng.sample(targets, len(targets))
    return {
        "upstreams": {
            name: {
                "base_url": f"http://{name}.invalid:{one_of(80, 80, 8080)}/v1",
                "models": [f"m-{name}"],
                "include_usage": False,  # an answer is compared with what its provider has sent
                "max_connections": rng.randint(3, 8),
                "queue_timeout_s": round(rng.uniform(0.3, 3.0), 2),
                **({"first_token_timeout_s": 1.5} if chance(0.2) else {}),
            }
            for name in upstreams
        },
        "models": {
            "one": {"targets": targets[:1], **rules()},
            "both": {
                "targets": shuffled[:2],
                **rules(),
                "affinity": routing.choice(("session", "none")),
                "on": [each for each in ("content_filter", "timeout", "rate_limit", "error") if routing.random() < 0.9],
            },
            "spread": {
                "targets": shuffled,
                "strategy": "balance",
                **rules(),
                "affinity": routing.choice(("session", "prefix", "none")),
                **({"weights": [1, 2, 3][: len(targets)]} if chance(0.5) else {}),
            },
            "race": {
                "targets": shuffled[:2],
                "strategy": "hedge",
                "hedge_budget": one_of(0.3, 1.0),
                **rules(),
                **({"hedge_delay_s": round(rng.uniform(0.05, 0.5), 3)} if chance(0.7) else {}),
            },
            "kept": {
                "targets": shuffled[-2:],
                "on_disconnect": "finish",
                "finish_timeout_s": round(rng.uniform(0.5, 4.0), 2),
                **rules(),
            },
        },
        "limits": {
            "max_exchanges": rng.randint(8, 16),
            "max_exchanges_per_key": one_of(0, 0, 6),
            "max_queued": rng.randint(2, 12),
            "queue_timeout_s": round(rng.uniform(0.5, 4.0), 2),
            "key_rate_per_s": one_of(0, 0, 0, 10),
            "key_burst": 20,
            "buffered_bytes": one_of(1000, 100_000),
            "event_bytes": 4000,
            "response_bytes": 20_000,
            "body_timeout_s": 1.5,
            "connect_timeout_s": 1,
            "response_head_timeout_s": one_of(0, 2),
            "first_token_timeout_s": 3,
            "idle_timeout_s": 2,
            "total_timeout_s": 12,
            "keep_alive_s": one_of(0.3, 0.7, 5),
            "stall_timeout_s": 1.5,
        },
        "retries": {
            "max_attempts": rng.randint(1, 4),
            "backoff_s": one_of(0, 0.1),
            "max_backoff_s": 1,
            "budget": one_of(0, 0.5, 1.0),
        },
        "breaker": {
            "failures": one_of(0, 4, 4),
            "failure_rate": one_of(0, 0.7),
            "min_calls": 10,
            "cooldown_s": one_of(0.3, 1.5),
        },
        "server": {"drain_timeout_s": round(rng.uniform(0.2, 3.0), 2), "keep_alive_timeout_s": KEEP_ALIVE_TIMEOUT_S},
        "sessions": {"wait_s": one_of(0.5, 5), "history_messages": 6},
    }


# -- a request --------------------------------------------------------------------------------------------------------

Kind = Literal["stream", "json", "speech"]


@attrs.frozen(kw_only=True)
class Request:
    """What a client asks for and how it behaves. Times are in seconds.

    Attributes:
        text: The text of the complete answer.
        speech: The answer's bytes, if it is audio.
        pause_s: The pause before the request.
        uploads: The pauses between the pieces of its body.
        disconnect_after_s: The client disconnects after this time; ``math.inf`` = never.
        disconnect_after_bytes: The client disconnects after this many bytes of the answer.
        how: How it disconnects.
        stalls_bytes: The client stops reading after this many bytes, for ``stalls_s``.
        cancel_after_s: An operator cancels it after this time through ``/status/streams``.
        session: The session whose turn it is; empty = none.
        max_tokens: The most that its answer may have; None = it does not say.
    """

    number: int
    id: str
    kind: Kind
    model: str
    key: str
    text: str
    speech: bytes = attrs.field(repr=lambda speech: f"<{len(speech)} bytes>")
    pause_s: float
    uploads: tuple[float, ...]
    timeout_s: float | None
    sdk_timeout_s: float | None
    disconnect_after_s: float
    disconnect_after_bytes: float
    how: Literal["close", "reset", "half-close"]
    stalls_bytes: float
    stalls_s: float
    cancel_after_s: float
    session: str
    max_tokens: int | None

    @property
    def wire(self) -> tuple[bytes, bytes]:
        """The encoded head and body of the request."""
        body: dict[str, object] = {"model": self.model, "request": self.number}
        if self.kind == "speech":
            path, body["input"] = "audio/speech", "Say it."
        else:
            path, body["messages"] = "chat/completions", [{"role": "user", "content": "Hi"}]
            body["stream"] = self.kind == "stream"
            if self.max_tokens is not None:
                body["max_tokens"] = self.max_tokens
        data = msgspec.json.encode(body)
        lines = [
            f"POST /v1/{path} HTTP/1.1",
            "host: gateway.test",
            f"authorization: Bearer {KEYS[self.key]}",
            f"x-request-id: {self.id}",
            "content-type: application/json",
            f"content-length: {len(data)}",
        ]
        if self.session:
            lines.append(f"x-session-key: {self.session}")
        if self.timeout_s is not None:
            lines.append(f"x-request-timeout: {self.timeout_s}")
        if self.sdk_timeout_s is not None:
            lines.append(f"x-stainless-read-timeout: {self.sdk_timeout_s}")
        return "\r\n".join([*lines, "", ""]).encode(), data


def request(seed: int, number: int) -> Request:
    """The request with this number."""
    rng, most = rng_for(seed, "request", number), rng_for(seed, "most", number)
    fate = rng.random()
    stream = rng.random()
    stalls = 0.18 <= fate < 0.24
    return Request(
        number=number,
        id=f"r{number}",
        kind="stream" if stream < 0.75 else "json" if stream < 0.93 else "speech",
        model=rng.choice(MODELS),
        key=rng.choice(("ada", "ada", "ada", "bob", "cyd")),
        text=f"{number}: " + "".join(rng.choices(_WORDS, k=rng.randint(20, 200) if stalls else rng.randint(0, 16))),
        speech=rng.randbytes(rng.randint(1, SPEECH_BYTES)),
        pause_s=rng.expovariate(2.0),
        uploads=tuple(rng.expovariate(2.0) for _ in range(rng.randint(1, 3))) if rng.random() < 0.05 else (),
        timeout_s=round(rng.uniform(0.01, 2.0) ** 2 + 0.01, 3) if rng.random() < 0.08 else None,
        sdk_timeout_s=round(rng.uniform(0.1, 4.0), 3) if rng.random() < 0.08 else None,
        disconnect_after_s=rng.expovariate(1.0) if fate < 0.12 else math.inf,
        disconnect_after_bytes=rng.randint(1, 3000) if 0.12 <= fate < 0.18 else math.inf,
        how=rng.choice(("close", "close", "reset", "half-close")),
        stalls_bytes=rng.randint(0, 1000) if stalls else math.inf,
        stalls_s=rng.choice((1.0, 1.2, 1.4, 4.0, 30.0)),
        cancel_after_s=rng.expovariate(1.0) if 0.24 <= fate < 0.26 or (stalls and rng.random() < 0.25) else math.inf,
        session=rng.choice("pqr") if stream < 0.93 and rng.random() < 0.06 else "",
        max_tokens=most.randint(1, 100) if most.random() < 0.9 else None,
    )


# -- a reply ----------------------------------------------------------------------------------------------------------


@attrs.frozen
class Say:
    """Sends bytes."""

    data: bytes


@attrs.frozen
class Pause:
    """Sends nothing for a while; ``math.inf`` = for ever."""

    seconds: float


@attrs.frozen
class End:
    """Ends the connection."""

    how: Literal["fin", "rst"]


Step = Say | Pause | End


@attrs.frozen(kw_only=True)
class Reply:
    """A provider's reply to one request.

    Attributes:
        steps: In order. After the last one the connection can carry another request, or has ended.
        body: The body that the client may get, under the upstream's model id: all of it or a prefix.
        whole: The reply is complete.
        then_closes_s: The provider closes the connection this long after the reply; ``math.inf`` = never.
    """

    steps: tuple[Step, ...]
    body: bytes
    whole: bool
    then_closes_s: float


@functools.lru_cache(maxsize=256)
def _chance_of_weather(seed: int, upstream: str, period: int) -> float:
    return rng_for(seed, "weather", upstream, period).random()


def weather(seed: int, upstream: str, now: float) -> Literal["fair", "rough", "out"]:
    """The state of an upstream for some seconds, so that faults come in groups."""
    chance = _chance_of_weather(seed, upstream, int(now / _WEATHER_S))
    return "fair" if chance < 0.8 else "rough" if chance < 0.93 else "out"


def connecting(seed: int, upstream: str, number: int, now: float) -> tuple[float, bool]:
    """How long the upstream takes to accept its n-th connection (``math.inf`` = for ever), and whether it accepts."""
    rng = rng_for(seed, "connecting", upstream, number)
    if weather(seed, upstream, now) == "out":
        return (math.inf if rng.random() < 0.2 else rng.expovariate(50.0)), False
    chance = rng.random()
    return (rng.expovariate(50.0) if chance > 0.02 else rng.choice((0.9, 1.0, math.inf))), chance < 0.97


_BEFORE = ("hang", "fin", "rst", "half head", "no HTTP", "refused", "throttled", "busy", "broken", "interim")
_WITHIN = ("cut", "reset", "half event", "no end", "no finish", "error", "silence", "large", "nonsense", "bad chunk")


def reply(seed: int, upstream: str, asked: Request, number: int, prefix: str, now: float) -> Reply:
    """The reply of an upstream to a request.

    Args:
        number: How often the request has reached a provider before.
        prefix: The part of the answer that the client already has.
    """
    rng = rng_for(seed, "reply", asked.number, number)
    rough = weather(seed, upstream, now) != "fair"
    fate = rng.random() * (0.4 if rough else 1.0)
    fault = "" if fate > 0.2 else rng.choice(_BEFORE if fate < 0.09 else _WITHIN)
    script = _Script(rng, asked, f"m-{upstream}", number, prefix, fault)
    tokens = rng_for(seed, "tokens", asked.number, number)
    script.tokens = tokens.randint(1, 60), tokens.randint(1, 120)
    script.write()
    return Reply(
        steps=tuple(script.steps),
        body=b"".join(script.sent_events),
        whole=script.whole,
        then_closes_s=rng.choice((0.0, 0.1, 1.0)) if rng.random() < 0.15 else math.inf,
    )


class _Script:
    """Builds a reply."""

    def __init__(self, rng: random.Random, asked: Request, model: str, number: int, prefix: str, fault: str) -> None:
        self._rng = rng
        self._asked = asked
        self._model = model
        self._name = f"chatcmpl-{asked.number}-{number}"
        self._remaining = asked.text[len(prefix) :]
        self._fault = fault
        self._chunked = True
        self.tokens = 0, 0
        self.steps: list[Step] = []
        self.sent_events: list[bytes] = []
        self.whole = False

    def write(self) -> None:
        """Builds the steps of the reply."""
        self._pause(often=True)
        if self._fault in _BEFORE and not self._before():
            return
        match self._asked.kind:
            case "stream":
                self._stream()
            case "json":
                self._json()
            case "speech":
                self._speech()

    # -- pieces

    def _pause(self, *, often: bool = False) -> None:
        rng = self._rng
        chance = rng.random()
        if chance < 0.03:
            self.steps.append(Pause(rng.uniform(0.5, 4.0)))
        elif chance < (0.9 if often else 0.5):
            self.steps.append(Pause(rng.expovariate(8.0)))

    def _say(self, data: bytes) -> None:
        """Sends the data in one piece or in two."""
        rng = self._rng
        if len(data) > 1 and rng.random() < 0.1:
            at = rng.randrange(1, len(data))
            self.steps += [Say(data[:at]), Pause(rng.choice((0.0, 0.02)))]
            data = data[at:]
        self.steps.append(Say(data))

    def _head(self, status: int, kind: str, *more: str, length: int | None = None) -> None:
        self._chunked = length is None
        framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
        self._say("\r\n".join([f"HTTP/1.1 {status} So", f"content-type: {kind}", framing, *more, "", ""]).encode())

    def _body(self, data: bytes) -> None:
        self._say(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def _close(self) -> None:
        if self._chunked:
            self._say(b"0\r\n\r\n")

    def _end(self, how: Literal["fin", "rst"] = "fin") -> None:
        self.steps.append(End(how))

    def _refusal(self, status: int, *more: str) -> None:
        body = msgspec.json.encode({"error": {"message": "no", "type": "t", "param": None, "code": f"s{status}"}})
        self._head(status, "application/json", *more, length=len(body))
        self._body(body)

    # -- the faults before the head

    def _before(self) -> bool:
        """Writes the fault and returns whether an answer still follows."""
        match self._fault:
            case "hang":
                self.steps.append(Pause(math.inf))
            case "fin" | "rst":
                self._end(self._fault)
            case "half head":
                self.steps += [Say(b"HTTP/1.1 200 OK\r\ncontent-ty"), End("fin")]
            case "no HTTP":
                self.steps += [Say(b"220 mail.invalid ESMTP\r\n"), End("fin")]
            case "refused":
                self._refusal(self._rng.choice((400, 404, 422)))
            case "throttled":
                wait = ("retry-after-ms: 200", "retry-after: 1", "retry-after: 4", "x-nothing: 1")
                self._refusal(429, self._rng.choice(wait))
            case "busy":
                self._refusal(503, self._rng.choice(("retry-after-ms: 300", "x-nothing: 1")))
            case "broken":
                self._refusal(self._rng.choice((500, 502, 408)))
            case _:
                self._say(b"HTTP/1.1 102 Processing\r\n\r\n")
                return True
        return False

    # -- a stream

    def _chunk(self, delta: object, finish: str | None = None) -> bytes:
        return events.event(events.chunk(delta, finish, model=self._model, id=self._name))

    def _events(self) -> list[bytes]:
        """All events of a good stream but ``[DONE]``."""
        stream = [self._chunk({"role": "assistant", "content": ""})]
        remaining = self._remaining
        longest = self._rng.choice((40, 40, 700))  # so that an event may exceed what a socket takes at once
        while remaining:
            size = self._rng.randint(1, longest)
            stream.append(self._chunk({"content": remaining[:size]}))
            remaining = remaining[size:]
        stream.append(self._chunk({}, "stop"))
        if self._rng.random() < 0.3:
            counts = b"%d" % self.tokens[0], b"%d" % self.tokens[1]
            usage = (
                b'data: {"id":"%b","model":"%b","choices":[],"usage":{"prompt_tokens":%b,"completion_tokens":%b}}\n\n'
            )
            stream.append(usage % (self._name.encode(), self._model.encode(), *counts))
        return stream

    def _stream(self) -> None:
        rng, fault = self._rng, self._fault
        stream = self._events()
        breaks_at = rng.randrange(len(stream)) if fault in _WITHIN else len(stream)
        if fault == "no end":
            breaks_at = len(stream)
        self._head(200, "text/event-stream")
        for position, event in enumerate(stream):
            self._pause()
            if position == breaks_at and self._break(event):
                return
            if rng.random() < 0.05:
                self._body(b": keep-alive\n\n")
            if fault == "no finish" and b'"finish_reason":"stop"}' in event:
                continue
            self.sent_events.append(event)
            self._body(event)
        if fault == "no end":  # each choice has ended, so the gateway adds it
            self.sent_events.append(events.DONE)
            self.whole = True
            self._close()
            return
        if fault == "no finish":
            self._body(events.DONE)
            self._close()
            return
        self.sent_events.append(events.DONE)
        self.whole = True
        after = rng.random()
        if after < 0.05:
            self._body(events.DONE + b'data: {"late":true}\n\n')
        else:
            self._body(events.DONE)
        if after > 0.95:
            self.steps += [Pause(rng.choice((0.1, 2.0))), End("fin")]
        else:
            self._close()

    def _break(self, event: bytes) -> bool:
        """Writes a fault in place of an event and returns whether the reply ends with it."""
        match self._fault:
            case "cut":
                self._end()
            case "reset":
                self._end("rst")
            case "half event":
                self._body(event[: self._rng.randrange(1, len(event))])
                self._end()
            case "error":
                self._body(b'data: {"error":{"message":"overloaded","code":"s0"}}\n\n')
                self._close()
            case "silence":
                self.steps.append(Pause(math.inf))
            case "large":
                self._body(b"data: " + b"x" * 5000)
            case "nonsense":  # after the first content events are not inspected but passed on
                self.sent_events.append(NONSENSE)
                self._body(NONSENSE)
            case "bad chunk":
                self.steps += [Say(b"xyz\r\n"), End("fin")]
            case _:
                return False
        return self._fault != "nonsense"

    # -- other answers

    def _json(self) -> None:
        rng, fault = self._rng, self._fault
        choice = events.choice(message={"role": "assistant", "content": self._remaining}, finish_reason="stop")
        body = events.encode(events.completion(choice, events.tokens(*self.tokens), model=self._model, id=self._name))
        if fault == "large":
            body = body[:-1] + b',"padding":"%b"}' % (b"x" * 30_000)
        elif fault in ("nonsense", "bad chunk"):
            body = body[:-3]
        elif fault == "error":
            body = b'{"error":{"message":"overloaded","code":"s0"}}'
        self._head(200, "application/json", length=len(body) if rng.random() < 0.6 else None)
        if fault in ("cut", "reset", "half event", "silence", "no end", "no finish"):
            self._body(body[: rng.randrange(len(body))] or b"{")
            if fault == "silence":
                self.steps.append(Pause(math.inf))
            else:
                self._end("rst" if fault == "reset" else "fin")
            return
        self._pause()
        self._body(body)
        self._close()
        if fault not in ("large", "nonsense", "bad chunk", "error"):
            self.sent_events.append(body)
            self.whole = True

    def _speech(self) -> None:
        rng, fault, speech = self._rng, self._fault, self._asked.speech
        self._head(200, "audio/mpeg", length=len(speech) if rng.random() < 0.5 else None)
        breaks_at = rng.randrange(len(speech)) if fault in _WITHIN else len(speech)
        at = 0
        while at < breaks_at:
            self._pause()
            piece = speech[at : min(breaks_at, at + rng.randint(1, 1000))]
            self.sent_events.append(piece)
            self._body(piece)
            at += len(piece)
        if fault == "silence":
            self.steps.append(Pause(math.inf))
        elif fault in _WITHIN:
            self._end("rst" if fault == "reset" else "fin")
        else:
            self._close()
            self.whole = True
