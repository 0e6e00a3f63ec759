"""Verifies on its raw bytes that a webhook request is signed with a secret of its hook. Pure: time is an argument.

Rules for editing this:

- The signature covers the received bytes. Nothing is decoded, trimmed or serialised again before it is compared. The
  *text* of a signature is compared, not its bytes, since base64 and hex have several texts for the same bytes.
- Every signature is compared with that of every secret, each in constant time, even after a match.
- A missing, repeated or malformed value raises `Unverified`, and nothing else is raised.

What the schemes protect, and what they do not:

=================  ===============================================  ==========================  ======================
scheme             signed                                           a copy, sent again          the event's id
=================  ===============================================  ==========================  ======================
standard-webhooks  id, time, body                                   refused after 300 s         ``webhook-id``
slack              time, body                                       refused after 300 s         ``event_id`` in the body
stripe             time, body                                       refused after 300 s         ``id`` in the body
github             body                                             accepted for ever           ``X-GitHub-Delivery``
bearer, telegram   nothing: the secret itself is sent               the secret has leaked       none
=================  ===============================================  ==========================  ======================

Where Slack's body has no id (a slash command is a form), the signature stands for it.

Within the 300 s, only its id distinguishes a copy of a signed request from the original, so the caller must remember
the ids. ``X-GitHub-Delivery`` is the exception: GitHub defines it for that purpose, and repeats it when it delivers an
event again, but does not sign it. So it recognises GitHub's own repetitions. It does not recognise an attacker that
sends a recorded body and signature with another id: that takes a digest of the body, the only part that an attacker
cannot change. An attacker cannot use the id of another event for another body either, as the body is signed.

Source: the Standard Webhooks specification 1.0.0 ("Signature scheme"); GitHub, "Validating webhook deliveries" and
"Best practices for using webhooks"; Slack, "Verifying requests from Slack" and "url_verification event"; Stripe,
"Verify webhook signatures manually"; Telegram, Bot API ``setWebhook``; PubSubHubbub 0.3 and Meta, "Webhooks:
Verification Requests".
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Literal, assert_never

import attrs
import msgspec

from trigate.errors import BadRequest, Header, Unverified

Scheme = Literal["bearer", "standard-webhooks", "github", "slack", "stripe", "telegram"]

MIN_SECRET_BYTES = 24
"""The minimum of Standard Webhooks, applied to all schemes."""
MAX_CHALLENGE_BYTES = 256

_PREFIX = "whsec_"
_ID = re.compile(r"[!-~]{1,256}")
_TIMESTAMP = re.compile(rb"[0-9]{1,12}")
_TELEGRAM = re.compile(r"[A-Za-z0-9_-]{1,256}")  # the Bot API's own bounds
_MISMATCH = "The signature does not match."
_WRONG_SECRET = "The secret does not match."

HEADERS = frozenset(
    {
        *(b"webhook-id", b"webhook-timestamp", b"webhook-signature", b"x-hub-signature-256", b"x-github-delivery"),
        *(b"x-slack-request-timestamp", b"x-slack-signature", b"stripe-signature", b"x-telegram-bot-api-secret-token"),
    }
)
"""The headers that the schemes read, besides ``authorization``, of which no request may have two."""

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_string = msgspec.json.Decoder(str)


@attrs.frozen(kw_only=True)
class Verified:
    """A request with a valid signature.

    Attributes:
        event_id: The scheme's own id of the event, the same when the sender repeats it: 1 to 256 visible ASCII
            characters. Taken from signed bytes, except for GitHub: see the table above. None if the scheme has none.
    """

    event_id: str | None = None


class Verifier:
    """Verifies requests with the secrets of one hook.

    Args:
        scheme: How its requests are signed.
        secrets: A request may be signed with any of them: during a rotation there are two.
        tolerance_s: The largest difference between the request's time and ours, in seconds, in either direction.

    Raises:
        ValueError: There is no secret, or one of them has a `secret_problem`.
    """

    def __init__(self, scheme: Scheme, secrets: tuple[str, ...], *, tolerance_s: float = 300.0) -> None:
        if not secrets:
            raise ValueError("There is no secret.")
        for secret in secrets:
            if problem := secret_problem(scheme, secret):
                raise ValueError(f"The secret {problem}.")
        self.scheme = scheme
        self.tolerance_s = tolerance_s
        self._keys = [_key(scheme, secret) for secret in secrets]

    def __repr__(self) -> str:
        return f"Verifier({self.scheme}, {len(self._keys)} secrets)"

    def verify(self, headers: Mapping[bytes, bytes], body: bytes, *, now: float) -> Verified:
        """Verifies a request.

        Args:
            headers: The request headers by their lower-case names.
            body: The body as it was received.
            now: Seconds since 1970.

        Raises:
            Unverified: It is not signed with one of the secrets, or its time is too far away.

        >>> github = Verifier("github", ("It's a Secret to Everybody",))
        >>> signature = b"sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
        >>> github.verify({b"x-hub-signature-256": signature, b"x-github-delivery": b"72d3"}, b"Hello, World!", now=0.0)
        Verified(event_id='72d3')
        >>> github.verify({b"x-hub-signature-256": signature}, b"Hello, World?", now=0.0)
        Traceback (most recent call last):
        trigate.errors.Unverified: The signature does not match.
        """
        match self.scheme:
            case "bearer":
                kind, _, given = _header(headers, b"authorization").partition(b" ")
                if kind.lower() != b"bearer" or not _matches([given.strip(b" ")], self._keys):
                    raise Unverified(_WRONG_SECRET)
                return Verified()
            case "telegram":
                if not _matches([_header(headers, b"x-telegram-bot-api-secret-token")], self._keys):
                    raise Unverified(_WRONG_SECRET)
                return Verified()
            case "github":
                signature = _header(headers, b"x-hub-signature-256")
                if not _matches([signature], [b"sha256=" + mac.hex().encode() for mac in self._macs(body)]):
                    raise Unverified(_MISMATCH)
                # Other senders with this scheme (Meta) have no such header.
                return Verified(
                    event_id=_id(headers, b"x-github-delivery") if b"x-github-delivery" in headers else None
                )
            case "standard-webhooks":
                event_id = _id(headers, b"webhook-id")
                if "." in event_id:
                    # The parts are joined by dots: in "a.1.2.x" the end of the id would be ambiguous.
                    raise Unverified("The header webhook-id has a dot in it.")
                timestamp = self._timestamp(_header(headers, b"webhook-timestamp"), now)
                signatures = _header(headers, b"webhook-signature").split(b" ")
                macs = self._macs(b"%b.%b." % (event_id.encode(), timestamp), body)
                if not _matches(signatures, [b"v1," + base64.b64encode(mac) for mac in macs]):
                    raise Unverified(_MISMATCH)
                return Verified(event_id=event_id)
            case "slack":
                timestamp = self._timestamp(_header(headers, b"x-slack-request-timestamp"), now)
                signature = _header(headers, b"x-slack-signature")
                macs = self._macs(b"v0:%b:" % timestamp, body)
                if not _matches([signature], [b"v0=" + mac.hex().encode() for mac in macs]):
                    raise Unverified(_MISMATCH)
                # A slash command has no id, but its signature is over its time, too.
                return Verified(event_id=_id_in(body, "event_id") or signature.decode())
            case "stripe":
                text, signatures = _stripe(_header(headers, b"stripe-signature"))
                timestamp = self._timestamp(text, now)
                macs = self._macs(b"%b." % timestamp, body)
                if not _matches(signatures, [mac.hex().encode() for mac in macs]):
                    raise Unverified(_MISMATCH)
                return Verified(event_id=_id_in(body, "id"))
            case _:
                assert_never(self.scheme)

    def _macs(self, *parts: bytes) -> Iterator[bytes]:
        for key in self._keys:
            mac = hmac.new(key, digestmod=hashlib.sha256)
            for part in parts:
                mac.update(part)
            yield mac.digest()

    def _timestamp(self, text: bytes, now: float) -> bytes:
        if not _TIMESTAMP.fullmatch(text):
            raise Unverified("The timestamp is not a number of seconds since 1970.")
        if abs(now - int(text)) > self.tolerance_s:
            raise Unverified(f"The timestamp is more than {self.tolerance_s:g} s away from this server's clock.")
        return text


def check_unrepeated(repeated: Set[bytes]) -> None:
    """Checks that no header that a scheme reads occurs twice: another program may read the other value.

    Args:
        repeated: The names of the request's headers that occur more than once, in lower case.

    Raises:
        Unverified: One of them is such a header.
    """
    for name in sorted(HEADERS & repeated):
        raise Unverified(f"The header {name.decode()} occurs twice.")


def _header(headers: Mapping[bytes, bytes], name: bytes) -> bytes:
    value = headers.get(name)
    if not value:
        raise Unverified(f"The header {name.decode()} is missing.")
    return value


def _id(headers: Mapping[bytes, bytes], name: bytes) -> str:
    text = _header(headers, name).decode("latin-1")
    if not _ID.fullmatch(text):
        raise Unverified(f"The header {name.decode()} is not an id of 1 to 256 visible ASCII characters.")
    return text


def _stripe(value: bytes) -> tuple[bytes, list[bytes]]:
    """Parses ``t=TIME,v1=HEX,v1=HEX,v0=HEX``; only v1 counts (v0 is a fake signature for test events)."""
    fields = [item.partition(b"=") for item in value.split(b",")]
    timestamps = [text for name, _, text in fields if name == b"t"]
    signatures = [text for name, _, text in fields if name == b"v1"]
    if len(timestamps) != 1 or not signatures:
        raise Unverified("The header stripe-signature does not have one t= and at least one v1=.")
    return timestamps[0], signatures


def _matches(given: Sequence[bytes], expected: Sequence[bytes]) -> bool:
    found = False
    for right in expected:
        for signature in given:
            found |= hmac.compare_digest(right, signature)
    return found


def _texts(body: bytes, *names: str) -> list[str | None]:
    """The strings under these keys of a JSON object; None for a key that is missing, or has no string."""
    found: list[str | None] = []
    try:
        fields = _object.decode(body)
    except (ValueError, RecursionError):
        return [None] * len(names)
    for name in names:
        try:
            found.append(_string.decode(fields[name]))
        except (ValueError, KeyError):
            found.append(None)
    return found


def _id_in(body: bytes, name: str) -> str | None:
    [text] = _texts(body, name)
    return text if text is not None and _ID.fullmatch(text) else None


# -- secrets ----------------------------------------------------------------------------------------------------------


def secret_problem(scheme: Scheme, secret: str) -> str | None:
    """Why a secret cannot be used, as the predicate of a sentence; None if it can be used.

    >>> secret_problem("github", "hunter2")
    'has fewer than 24 bytes'
    >>> secret_problem("standard-webhooks", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    >>> secret_problem("standard-webhooks", "whsec_?")
    'is not base64'
    """
    if not secret:
        return "is empty"
    try:
        key = _key(scheme, secret)
    except UnicodeEncodeError:
        return "is not text in UTF-8"
    except ValueError:
        return "is not base64"
    if scheme == "stripe":  # the prefix of Stripe's keys is not secret
        key = key.removeprefix(_PREFIX.encode())
    if len(key) < MIN_SECRET_BYTES:
        return f"has fewer than {MIN_SECRET_BYTES} bytes"
    if scheme == "telegram" and not _TELEGRAM.fullmatch(secret):
        return "is not what Telegram allows: up to 256 of A-Z, a-z, 0-9, _ and -"
    if scheme == "bearer" and not re.fullmatch(r"[!-~]+", secret):
        return "has characters that a header cannot carry"
    return None


def _key(scheme: Scheme, secret: str) -> bytes:
    """The bytes of the key that a secret encodes.

    Raises:
        ValueError: It is not base64, or not UTF-8.
    """
    if scheme != "standard-webhooks":
        return secret.encode()
    text = secret.removeprefix(_PREFIX)
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)  # the padding is often missing


def sign_standard(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """Returns the value of ``webhook-signature`` for a request that the gateway sends.

    Args:
        secret: A secret of the scheme ``standard-webhooks``.
        message_id: The value of ``webhook-id``; without a dot.
        timestamp: The value of ``webhook-timestamp``, in seconds since 1970.
        body: The request body.

    Raises:
        ValueError: The secret or the id cannot be used.

    >>> secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    >>> sign_standard(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    'v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE='
    """
    if problem := secret_problem("standard-webhooks", secret):
        raise ValueError(f"The secret {problem}.")
    if not _ID.fullmatch(message_id) or "." in message_id:
        raise ValueError("The id is not 1 to 256 visible ASCII characters without a dot.")
    content = b"%b.%d.%b" % (message_id.encode(), timestamp, body)
    mac = hmac.digest(_key("standard-webhooks", secret), content, "sha256")
    return "v1," + base64.b64encode(mac).decode()


# -- challenges -------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Challenge:
    """A request with which a platform verifies the owner of a URL; the answer repeats its text.

    Attributes:
        text: Printable ASCII, at most `MAX_CHALLENGE_BYTES`.
    """

    text: str

    def to_response(self) -> tuple[int, list[Header], bytes]:
        """Status, headers and body. Plain text, never a page that a browser renders: anyone can choose the text."""
        headers = [(b"content-type", b"text/plain"), (b"x-content-type-options", b"nosniff")]
        return 200, headers, self.text.encode()


def challenge(
    scheme: Scheme | None, method: str, query: Mapping[str, str], body: bytes, *, tokens: tuple[str, ...]
) -> Challenge | None:
    """Returns the challenge in a request, if it is one.

    There are two. ``GET ?hub.mode=subscribe`` (PubSubHubbub, Meta) is not signed: it has a token, which is verified
    here. Slack's ``url_verification`` is signed like all requests of Slack, so a POST must be verified *before* this
    function is called.

    Args:
        scheme: The hook's scheme.
        method: The request method.
        query: The decoded query.
        body: The body as it was received.
        tokens: The valid values of ``hub.verify_token``. The token is part of a URL, which is logged on the way, so it
            should not be a signing secret.

    Returns:
        The challenge; None if it is an ordinary request.

    Raises:
        Unverified: The token is not valid.
        BadRequest: The challenge cannot be answered.

    >>> query = {"hub.mode": "subscribe", "hub.challenge": "1158201444", "hub.verify_token": "meatyhamhock"}
    >>> challenge("github", "GET", query, b"", tokens=("meatyhamhock",))
    Challenge(text='1158201444')
    """
    if method == "GET" and query.get("hub.mode") == "subscribe":
        given = query.get("hub.verify_token", "").encode(errors="surrogatepass")
        if not given or not _matches([given], [token.encode(errors="surrogatepass") for token in tokens]):
            raise Unverified("The hub.verify_token does not match.")
        return Challenge(text=_answerable(query.get("hub.challenge"), "hub.challenge"))
    if method == "POST" and scheme == "slack":
        kind, text = _texts(body, "type", "challenge")
        if kind == "url_verification":
            return Challenge(text=_answerable(text, "challenge"))
    return None


def _answerable(text: str | None, param: str) -> str:
    if not text or len(text) > MAX_CHALLENGE_BYTES or not (text.isascii() and text.isprintable()):
        raise BadRequest(f"The challenge is not 1 to {MAX_CHALLENGE_BYTES} printable ASCII characters.", param=param)
    return text
