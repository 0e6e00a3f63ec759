"""Verification: a request comes from a holder of the secret and is recent, or it is `Unverified`."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterator
from typing import Any, get_args

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trigate.errors import BadRequest, Unverified
from trigate.signatures import (
    MAX_CHALLENGE_BYTES,
    MIN_SECRET_BYTES,
    Challenge,
    Scheme,
    Verified,
    Verifier,
    challenge,
    secret_problem,
    sign_standard,
)

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
OTHER = "another-secret-of-some-32-bytes-"


@attrs.frozen(kw_only=True)
class Vector:
    """A valid signed request.

    Attributes:
        flipped: The headers in which every changed bit must be refused.
        source: Where the vector is published.
    """

    scheme: Scheme
    secret: str
    headers: dict[bytes, bytes]
    body: bytes
    timestamp: int | None = None
    flipped: tuple[bytes, ...]
    event_id: str | None = None
    source: str

    def verify(self, *secrets: str, headers: dict[bytes, bytes] | None = None, **changes: Any) -> Verified:
        body = changes.get("body", self.body)
        now = changes.get("now", self.timestamp or 0)
        return Verifier(self.scheme, secrets or (self.secret,)).verify(
            self.headers if headers is None else headers, body, now=now
        )


STANDARD = Vector(
    scheme="standard-webhooks",
    secret="whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    headers={
        b"webhook-id": b"msg_p5jXN8AQM9LWM0D4loKWxJek",
        b"webhook-timestamp": b"1614265330",
        b"webhook-signature": b"v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    },
    body=b'{"test": 2432232314}',
    timestamp=1614265330,
    flipped=(b"webhook-id", b"webhook-timestamp", b"webhook-signature"),
    event_id="msg_p5jXN8AQM9LWM0D4loKWxJek",
    source="standard-webhooks/standard-webhooks: libraries/python/tests/test_webhooks.py, test_sign_function",
)
GITHUB = Vector(
    scheme="github",
    secret="It's a Secret to Everybody",
    headers={
        b"x-hub-signature-256": b"sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17",
        b"x-github-delivery": b"72d3162e-cc78-11e3-81ab-4c9367dc0958",
    },
    body=b"Hello, World!",
    flipped=(b"x-hub-signature-256",),
    event_id="72d3162e-cc78-11e3-81ab-4c9367dc0958",
    source='docs.github.com: "Validating webhook deliveries", section "Testing the webhook payload validation"; the '
    'delivery id is that of "Webhook events and payloads", and is not signed',
)
SLACK = Vector(
    scheme="slack",
    secret="8f742231b10e8888abcd99yyyzzz85a5",
    headers={
        b"x-slack-request-timestamp": b"1531420618",
        b"x-slack-signature": b"v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503",
    },
    body=b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow&channel_id=G8PSS9T3V"
    b"&channel_name=foobar&user_id=U2CERLKJA&user_name=roadrunner&command=%2Fwebhook-collect&text="
    b"&response_url=https%3A%2F%2Fhooks.slack.com%2Fcommands%2FT1DC2JH3J%2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN"
    b"&trigger_id=398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c",
    timestamp=1531420618,
    flipped=(b"x-slack-request-timestamp", b"x-slack-signature"),
    event_id="v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503",
    source='api.slack.com: "Verifying requests from Slack"',
)
SLACK_EVENT = Vector(
    scheme="slack",
    secret="8f742231b10e8888abcd99yyyzzz85a5",
    headers={
        b"x-slack-request-timestamp": b"1531420618",
        b"x-slack-signature": b"v0=1aa9e61f576a0ab26dd5386ac155a1b9fb5aac5d2d24302e65936df4ff0566eb",
    },
    body=b'{"type":"event_callback","event_id":"Ev08MFMKH6","event":{"type":"app_mention"}}',
    timestamp=1531420618,
    flipped=(b"x-slack-request-timestamp", b"x-slack-signature"),
    event_id="Ev08MFMKH6",
    source="The vector above has a form as its body, and no id; this one is of `openssl dgst -sha256 -hmac`.",
)
STRIPE = Vector(
    scheme="stripe",
    secret="whsec_0123456789abcdefghijklmnopqrstuv",
    headers={
        b"stripe-signature": b"t=1492774577,v1=d4e07cc172374705088627c40405df0b9b377944751bee42ffde3d90bc84dd4c",
    },
    body=b'{"id":"evt_1","object":"event","type":"invoice.paid"}',
    timestamp=1492774577,
    flipped=(b"stripe-signature",),
    event_id="evt_1",
    source='Stripe publishes the algorithm ("Verify webhook signatures manually") and no vector with its secret; this '
    "one is of `openssl dgst -sha256 -hmac` over `1492774577.` and the body.",
)
BEARER = Vector(
    scheme="bearer",
    secret="0123456789abcdefghijklmn",
    headers={b"authorization": b"Bearer 0123456789abcdefghijklmn"},
    body=b"{}",
    flipped=(),
    source="RFC 6750 section 2.1",
)
TELEGRAM = Vector(
    scheme="telegram",
    secret="0123456789_abcdefghi-KLMN",
    headers={b"x-telegram-bot-api-secret-token": b"0123456789_abcdefghi-KLMN"},
    body=b"{}",
    flipped=(b"x-telegram-bot-api-secret-token",),
    source="core.telegram.org/bots/api#setwebhook, secret_token",
)
VECTORS = [STANDARD, GITHUB, SLACK, SLACK_EVENT, STRIPE, BEARER, TELEGRAM]
each_vector = pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.scheme)
each_signed = pytest.mark.parametrize(
    "vector", [STANDARD, GITHUB, SLACK, SLACK_EVENT, STRIPE], ids=lambda vector: vector.scheme
)
each_timed = pytest.mark.parametrize("vector", [STANDARD, SLACK, STRIPE], ids=lambda vector: vector.scheme)


def _hex(secret: str, content: bytes) -> bytes:
    return hmac.new(secret.encode(), content, hashlib.sha256).hexdigest().encode()


def _signed(scheme: Scheme, body: bytes, *, timestamp: bytes = b"1000", event_id: bytes = b"msg_1") -> Vector:
    """A request that is signed for its scheme, with any content."""
    match scheme:
        case "standard-webhooks":
            key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
            mac = hmac.new(key, b".".join((event_id, timestamp, body)), hashlib.sha256).digest()
            headers = {b"webhook-signature": b"v1," + base64.b64encode(mac)}
            headers |= {b"webhook-id": event_id, b"webhook-timestamp": timestamp}
            secret = STANDARD.secret
        case "slack":
            headers = {b"x-slack-signature": b"v0=" + _hex(SLACK.secret, b"v0:" + timestamp + b":" + body)}
            headers |= {b"x-slack-request-timestamp": timestamp}
            secret = SLACK.secret
        case "stripe":
            headers = {b"stripe-signature": b"t=" + timestamp + b",v1=" + _hex(STRIPE.secret, timestamp + b"." + body)}
            secret = STRIPE.secret
        case _:
            pytest.fail(scheme)
    return Vector(scheme=scheme, secret=secret, headers=headers, body=body, timestamp=1000, flipped=(), source="")


def _flips(data: bytes) -> Iterator[bytes]:
    """Copies of the data, each with one bit changed."""
    for position in range(len(data)):
        for bit in range(8):
            yield data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


# -- all schemes ------------------------------------------------------------------------------------------------------


@each_vector
def test_published_vectors(vector: Vector) -> None:
    """The published examples of each scheme verify, and the event's id is the scheme's own."""
    assert vector.verify() == Verified(event_id=vector.event_id)


@each_signed
def test_any_bit_of_the_body(vector: Vector) -> None:
    """A signed body is refused when any bit changes."""
    for body in _flips(vector.body):
        with pytest.raises(Unverified):
            vector.verify(body=body)


@each_vector
def test_any_bit_of_the_headers(vector: Vector) -> None:
    """So is a changed bit of a signature, a timestamp or a signed id, even if the text decodes to the same bytes."""
    for name in vector.flipped:
        for value in _flips(vector.headers[name]):
            with pytest.raises(Unverified):
                vector.verify(headers={**vector.headers, name: value})


@each_signed
@pytest.mark.parametrize("body", [b"", b"\n", b" "], ids=["nothing", "more", "more"])
def test_another_length_of_the_body(vector: Vector, body: bytes) -> None:
    """A body that was truncated or extended is refused, even if it is the same JSON."""
    with pytest.raises(Unverified):
        vector.verify(body=body and vector.body + body)


@each_vector
def test_any_missing_header(vector: Vector) -> None:
    """A request with a missing or empty header is refused, and the message names the header."""
    for name in {*vector.headers} - {b"x-github-delivery"}:
        rest = {other: value for other, value in vector.headers.items() if other != name}
        for headers in (rest, {**rest, name: b""}):
            with pytest.raises(Unverified, match=f"The header {name.decode()} is missing"):
                vector.verify(headers=headers)


@each_vector
def test_rotation(vector: Vector) -> None:
    """Each of several secrets verifies at any position. Without it the request is refused."""
    other = base64.b64encode(OTHER.encode()).decode() if vector.scheme == "standard-webhooks" else OTHER
    assert vector.verify(vector.secret, other) == vector.verify(other, vector.secret) == vector.verify()
    with pytest.raises(Unverified, match="does not match"):
        vector.verify(other, other.replace("a", "b"))


@each_vector
def test_every_secret_is_compared(vector: Vector, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timing reveals nothing: all secrets are compared, whichever of them matches, or none."""
    compared: list[int] = []
    compare = hmac.compare_digest

    def counting(left: bytes, right: bytes) -> bool:
        compared.append(0)
        return compare(left, right)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    other = base64.b64encode(OTHER.encode()).decode() if vector.scheme == "standard-webhooks" else OTHER
    counts = []
    for secrets in ((vector.secret, other, other), (other, other, vector.secret), (other, other, other)):
        compared.clear()
        try:
            vector.verify(*secrets)
        except Unverified:
            assert vector.secret not in secrets
        counts.append(len(compared))
    assert counts == [3, 3, 3]


@each_timed
@pytest.mark.parametrize("age_s", [-300, -299.5, 0, 300])
def test_within_the_tolerance(vector: Vector, age_s: float) -> None:
    """A request may be 300 seconds old, or 300 seconds in the future."""
    assert vector.timestamp is not None
    assert vector.verify(now=vector.timestamp + age_s).event_id == vector.event_id


@each_timed
@pytest.mark.parametrize("age_s", [-1e300, -301, 301, 86400, 1e300])
def test_beyond_the_tolerance(vector: Vector, age_s: float) -> None:
    """At 301 seconds it is refused, and the message says why."""
    assert vector.timestamp is not None
    with pytest.raises(Unverified, match="more than 300 s away"):
        vector.verify(now=vector.timestamp + age_s)


@pytest.mark.parametrize("scheme", ["standard-webhooks", "slack", "stripe"])
@pytest.mark.parametrize(
    "timestamp",
    [
        *(b"-1000", b"+1000", b" 1000", b"1000 ", b"1000.0", b"1e3", b"1_000", b"0x3e8", b"nan", b"inf", b"1000,1000"),
        *(b"1" * 13, b"9" * 5000, b"\xff", b"1000\n", b"10\x0000"),
        "\u0661\u0660\u0660\u0660".encode(),  # digits to str.isdigit, and to int
    ],
)
def test_absurd_timestamps(scheme: Scheme, timestamp: bytes) -> None:
    """A timestamp has a dozen digits at most. Anything else is refused, even if it is signed."""
    assert _signed(scheme, b"{}").verify() is not None
    with pytest.raises(Unverified):
        _signed(scheme, b"{}", timestamp=timestamp).verify()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_verifier_needs_secrets(scheme: Scheme) -> None:
    """No verifier can be made without a usable secret, so none accepts everything by mistake."""
    for secrets in ((), ("",), ("short",), (OTHER, "")):
        with pytest.raises(ValueError, match=r"secret"):
            Verifier(scheme, secrets)


@each_vector
def test_secrets_are_not_shown(vector: Vector) -> None:
    """Neither a repr nor a message shows a secret or the right signature."""
    verifier = Verifier(vector.scheme, (vector.secret,))
    assert repr(verifier) == f"Verifier({vector.scheme}, 1 secrets)"
    wrong = {name: value + b"x" if name in vector.flipped else value for name, value in vector.headers.items()}
    with pytest.raises(Unverified) as caught:
        vector.verify(headers=wrong | {b"authorization": b"Bearer x"})
    assert vector.secret not in caught.value.message
    for value in vector.headers.values():
        assert value.decode() not in caught.value.message


# -- each scheme ------------------------------------------------------------------------------------------------------


def test_bearer_in_any_case() -> None:
    """The word Bearer may have any case (RFC 9110 section 11.1). The secret may not."""
    for value in (b"bearer " + BEARER.secret.encode(), b"BEARER  " + BEARER.secret.encode()):
        assert BEARER.verify(headers={b"authorization": value}) == Verified()
    for value in (b"Basic " + BEARER.secret.encode(), BEARER.secret.encode(), b"Bearer", b"Bearer ", b"Bearer \xff"):
        with pytest.raises(Unverified):
            BEARER.verify(headers={b"authorization": value})


def test_any_bit_of_a_bearer_secret() -> None:
    """A bearer secret is refused when any bit changes."""
    for secret in _flips(BEARER.secret.encode()):
        with pytest.raises(Unverified):
            BEARER.verify(headers={b"authorization": b"Bearer " + secret})


def test_several_standard_signatures() -> None:
    """One of several signatures must match. Only those of v1 count."""
    good = STANDARD.headers[b"webhook-signature"]
    bad = b"v1,Ceo5qEr07ixe2NLpvHk3FH9bwy/WavXrAFQ/9tdO6mc="
    for value in (bad + b" " + good, good + b" " + bad, b"v1a,x v2,y garbage " + good, b" " + good + b" "):
        assert STANDARD.verify(headers={**STANDARD.headers, b"webhook-signature": value}).event_id
    for value in (bad, b"v2" + good[2:], b"v1a" + good[2:], good[3:], b"v1,", b" ", good + b"," + bad, good[:-1]):
        with pytest.raises(Unverified):
            STANDARD.verify(headers={**STANDARD.headers, b"webhook-signature": value})


@pytest.mark.parametrize("secret", ["MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", STANDARD.secret])
def test_the_prefix_of_a_standard_secret(secret: str) -> None:
    """The prefix may be left out."""
    assert STANDARD.verify(secret).event_id
    signed = sign_standard(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, STANDARD.body)
    assert signed.encode() == STANDARD.headers[b"webhook-signature"]


def test_the_parts_of_a_standard_signature_stay_separate() -> None:
    """The signed parts are joined by dots, so an id with a dot could move text from one part to the next."""
    vector = _signed("standard-webhooks", b"1300.{}")
    assert vector.verify().event_id == "msg_1"
    shifted = {**vector.headers, b"webhook-id": b"msg_1.1000", b"webhook-timestamp": b"1300"}
    with pytest.raises(Unverified, match="dot"):
        vector.verify(headers=shifted, body=b"{}", now=1300)


@pytest.mark.parametrize("event_id", [b"a b", b"\xc3\xa9", b"a\n", b"\x7f", b"x" * 257])
def test_ids_are_visible_ascii(event_id: bytes) -> None:
    """An id is stored, logged and shown. A long id, or one that is not visible ASCII, is refused even if it is
    signed."""
    with pytest.raises(Unverified, match="visible ASCII"):
        _signed("standard-webhooks", b"{}", event_id=event_id).verify()
    with pytest.raises(Unverified, match="visible ASCII"):
        GITHUB.verify(headers={**GITHUB.headers, b"x-github-delivery": event_id})


def test_github_does_not_sign_the_id() -> None:
    """The id of a delivery is not signed, so it may be changed or missing. Nothing limits the age of a request."""
    assert GITHUB.verify(headers={**GITHUB.headers, b"x-github-delivery": b"other"}) == Verified(event_id="other")
    signature = {b"x-hub-signature-256": GITHUB.headers[b"x-hub-signature-256"]}
    assert GITHUB.verify(headers=signature, now=1e10) == Verified(event_id=None)


@pytest.mark.parametrize("value", [b"sha1=" + b"0" * 40, b"sha256=", b"sha256", b"\xff" * 71])
def test_github_signatures_of_another_form(value: bytes) -> None:
    """A signature is ``sha256=`` and the digest in lower-case hex, and nothing else."""
    for each in (value, GITHUB.headers[b"x-hub-signature-256"].upper(), GITHUB.headers[b"x-hub-signature-256"][7:]):
        with pytest.raises(Unverified):
            GITHUB.verify(headers={b"x-hub-signature-256": each})


def test_one_slack_signature() -> None:
    """Slack sends one signature. A list of them is refused."""
    good = SLACK.headers[b"x-slack-signature"]
    for value in (good + b"," + good, good + b" " + good, good[3:], b"v1" + good[2:]):
        with pytest.raises(Unverified):
            SLACK.verify(headers={**SLACK.headers, b"x-slack-signature": value})


def test_several_stripe_signatures() -> None:
    """One of several v1 signatures must match, other schemes do not count, and there must be one timestamp."""
    timestamp, good = STRIPE.headers[b"stripe-signature"].split(b",")
    bad = b"v1=" + b"0" * 64
    for items in ([timestamp, bad, good], [good, timestamp], [timestamp, good, b"v0=" + b"1" * 64, b"x", b""]):
        assert STRIPE.verify(headers={b"stripe-signature": b",".join(items)}).event_id == "evt_1"
    for items in (
        [timestamp, bad],
        [timestamp, b"v0=" + good[3:]],
        [timestamp],
        [good],
        [timestamp, timestamp, good],
        [timestamp, b"t=1492774578", good],
        [b"t", good],
        [timestamp, b" " + good],
        [b"garbage"],
    ):
        with pytest.raises(Unverified):
            STRIPE.verify(headers={b"stripe-signature": b",".join(items)})


@pytest.mark.parametrize(("scheme", "name"), [("slack", b"event_id"), ("stripe", b"id")])
def test_ids_in_bodies(scheme: Scheme, name: bytes) -> None:
    """A signed body without an id, with an invalid id, or that is no JSON is accepted. It has no id; with Slack, whose
    slash commands have none, its signature stands for it."""
    assert _signed(scheme, b'{"%b":"e1"}' % name).verify().event_id == "e1"
    bodies = [b"", b"{}", b"[]", b"null", b"payload=%7B%7D", b'{"a":' * 100_000, b"[" * 100_000, b"\xff"]
    for value in (b"1", b"null", b'""', b'"a b"', b'"%b"' % (b"x" * 257), b'["e1"]', b'"\\ud800"', b'"\xff"', b'"a'):
        bodies.append(b'{"%b":%b}' % (name, value))
    for body in bodies:
        vector = _signed(scheme, body)
        stands_in = vector.headers[b"x-slack-signature"].decode() if scheme == "slack" else None
        assert vector.verify().event_id == stands_in, body[:20]


# -- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_secret_problems(scheme: Scheme) -> None:
    """An empty or short secret is refused in every scheme. One of the minimum length is accepted."""

    def made(size: int) -> str:
        return base64.b64encode(b"x" * size).decode() if scheme == "standard-webhooks" else "x" * size

    assert secret_problem(scheme, "") == "is empty"
    assert secret_problem(scheme, made(1)) == "has fewer than 24 bytes"
    assert secret_problem(scheme, made(MIN_SECRET_BYTES - 1)) == "has fewer than 24 bytes"
    assert secret_problem(scheme, made(MIN_SECRET_BYTES)) is None
    assert secret_problem(scheme, made(MIN_SECRET_BYTES) + "\udcff") is not None


@pytest.mark.parametrize(
    ("scheme", "secret", "problem"),
    [
        ("standard-webhooks", "whsec_", "has fewer than 24 bytes"),
        ("standard-webhooks", "whsec_" + "A" * 31, "has fewer than 24 bytes"),
        ("standard-webhooks", "whsec_" + "A" * 33, "is not base64"),
        ("standard-webhooks", "whsec_" + "A" * 31 + "?", "is not base64"),
        ("standard-webhooks", "whsec_" + "A" * 31 + "é", "is not base64"),
        ("standard-webhooks", "whsec_" + "A" * 32 + "\n", "is not base64"),
        ("standard-webhooks", "whsk_" + "A" * 32, "is not base64"),
        ("standard-webhooks", "whsec_" + "A" * 34, None),
        ("stripe", "whsec_" + "A" * 23, "has fewer than 24 bytes"),
        ("stripe", "whsec_" + "A" * 24, None),
        ("github", "é" * 12, None),
        ("telegram", "x" * 257, "is not what Telegram allows: up to 256 of A-Z, a-z, 0-9, _ and -"),
        ("telegram", "x" * 24 + "\n", "is not what Telegram allows: up to 256 of A-Z, a-z, 0-9, _ and -"),
        ("bearer", "x" * 24 + " x", "has characters that a header cannot carry"),
        ("bearer", "é" * 24, "has characters that a header cannot carry"),
        ("slack", "x" * 24 + "\udcff", "is not text in UTF-8"),
    ],
)
def test_secrets_of_each_scheme(scheme: Scheme, secret: str, problem: str | None) -> None:
    """Base64 is measured decoded, and Stripe's without its prefix. A secret that could never match is refused from the
    start."""
    assert secret_problem(scheme, secret) == problem


def test_signing_errors() -> None:
    """Signing with an invalid secret, or an id that receivers should refuse, is a programming error."""
    for secret, message_id in (("", "a"), ("whsec_AAAA", "a"), (STANDARD.secret, "a.b"), (STANDARD.secret, "")):
        with pytest.raises(ValueError, match=r"secret|id"):
            sign_standard(secret, message_id, 1, b"")


@settings(deadline=None)
@given(body=st.binary(max_size=64), message_id=st.text("azAZ09_-!~", min_size=1, max_size=40))
def test_own_signatures_verify(body: bytes, message_id: str) -> None:
    """Trigate's own signatures verify."""
    signature = sign_standard(STANDARD.secret, message_id, 1000, body)
    headers = {b"webhook-id": message_id.encode(), b"webhook-timestamp": b"1000"}
    headers |= {b"webhook-signature": signature.encode()}
    assert STANDARD.verify(headers=headers, body=body, now=1000) == Verified(event_id=message_id)


# -- random input -----------------------------------------------------------------------------------------------------

NAMES = sorted({name for vector in VECTORS for name in vector.headers})
pieces = st.sampled_from(
    [b"v1", b"v0", b"t", b"=", b",", b" ", b".", b"sha256=", b"Bearer ", b"1000", b"\x00", b"\xff"]
)
values = st.one_of(st.binary(max_size=40), st.lists(pieces, max_size=12).map(b"".join))
requests = st.dictionaries(st.sampled_from(NAMES), values)
bodies = st.one_of(
    st.binary(max_size=40),
    st.lists(st.sampled_from([b"{", b"}", b'"id"', b":", b'"event_id"', b'"x"', b"1"])).map(b"".join),
)


@each_vector
@settings(deadline=None)
@given(headers=requests, body=bodies, now=st.floats(allow_nan=False))
def test_only_unverified_is_raised(vector: Vector, headers: dict[bytes, bytes], body: bytes, now: float) -> None:
    """Whatever bytes a request has, it is refused with `Unverified`."""
    with pytest.raises(Unverified):
        vector.verify(headers=headers, body=body, now=now)


@pytest.mark.parametrize("scheme", ["standard-webhooks", "slack", "stripe"])
@settings(deadline=None)
@given(body=bodies)
def test_any_signed_body(scheme: Scheme, body: bytes) -> None:
    """A signed body is accepted whatever it contains."""
    assert isinstance(_signed(scheme, body).verify(), Verified)


# -- challenges -------------------------------------------------------------------------------------------------------

TOKENS = (OTHER, GITHUB.secret)
HUB = {"hub.mode": "subscribe", "hub.challenge": "1158201444", "hub.verify_token": OTHER}


def test_a_challenge_is_answered_as_plain_text() -> None:
    """A browser must not take the answer for a page."""
    status, headers, body = Challenge(text="<b>").to_response()
    assert (status, body) == (200, b"<b>")
    assert dict(headers) == {b"content-type": b"text/plain", b"x-content-type-options": b"nosniff"}


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_hub_challenge(scheme: Scheme | None) -> None:
    """A subscription is confirmed to a request that has one of the tokens, in every scheme."""
    for token in TOKENS:
        query = {**HUB, "hub.verify_token": token}
        assert challenge(scheme, "GET", query, b"", tokens=TOKENS) == Challenge(text="1158201444")


@pytest.mark.parametrize("token", ["", "x", OTHER[:-1], OTHER + "x", OTHER.upper(), "\ud800", "é"])
@pytest.mark.parametrize("tokens", [TOKENS, (), ("",)])
def test_hub_challenge_with_another_token(token: str, tokens: tuple[str, ...]) -> None:
    """Without one of the tokens it is refused, also when no token is configured."""
    for query in ({**HUB, "hub.verify_token": token}, {"hub.mode": "subscribe", "hub.challenge": "1"}):
        with pytest.raises(Unverified):
            challenge("github", "GET", query, b"", tokens=tokens)


@pytest.mark.parametrize("text", [None, "", "x" * (MAX_CHALLENGE_BYTES + 1), "é", "a\nb", "a\x00", "\x7f", "\ud800"])
def test_challenges_that_cannot_be_answered(text: str | None) -> None:
    """A challenge that is long or not printable ASCII is not reflected."""
    query = {key: value for key, value in {**HUB, "hub.challenge": text}.items() if value is not None}
    with pytest.raises(BadRequest, match="printable ASCII") as caught:
        challenge(None, "GET", query, b"", tokens=TOKENS)
    assert caught.value.param == "hub.challenge"


def test_slack_challenge() -> None:
    """Slack's challenge is returned as it came. The same limits apply."""
    body = b'{"token":"Jhj5dZrVaK7ZwHHjRyZWjbDl","challenge":"3eZbrw1aBm2rZgRNFdxV2595","type":"url_verification"}'
    assert challenge("slack", "POST", {}, body, tokens=()) == Challenge(text="3eZbrw1aBm2rZgRNFdxV2595")
    for text in (b'"\xc3\xa9"', b'"a\\n"', b"1", b"null", b'"%b"' % (b"x" * 257)):
        with pytest.raises(BadRequest):
            challenge("slack", "POST", {}, b'{"type":"url_verification","challenge":%b}' % text, tokens=())


def test_requests_that_are_no_challenge() -> None:
    """Ordinary requests are no challenge, and neither is one platform's challenge to the other platform's hook."""
    slack = b'{"type":"url_verification","challenge":"x"}'
    for scheme in SCHEMES:
        assert challenge(scheme, "POST", HUB, b"{}", tokens=TOKENS) is None
        assert challenge(scheme, "GET", {"hub.mode": "unsubscribe"}, slack, tokens=TOKENS) is None
        assert challenge(scheme, "GET", {}, slack, tokens=TOKENS) is None
        assert scheme == "slack" or challenge(scheme, "POST", {}, slack, tokens=TOKENS) is None
    assert challenge("slack", "POST", {}, b'{"type":"event_callback","challenge":"x"}', tokens=()) is None
    assert challenge("slack", "POST", {}, b"\xff", tokens=()) is None


@settings(deadline=None)
@given(
    query=st.dictionaries(st.sampled_from(sorted(HUB)), st.text()), body=bodies, method=st.sampled_from(["GET", "POST"])
)
def test_any_challenge_has_a_defined_answer(query: dict[str, str], body: bytes, method: str) -> None:
    """For any input the result is one of three: no challenge, refused, or returned as it came."""
    try:
        found = challenge("slack", method, query, body, tokens=TOKENS)
    except (Unverified, BadRequest):
        return
    assert found is None
