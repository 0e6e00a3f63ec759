"""Judges on its raw bytes whether a webhook request comes from who holds the secret. Pure: the time is an argument.

Rules for whoever edits this:

- The bytes that were received are what is signed. Nothing is decoded, trimmed or put together anew before it is
  compared: the *text* of a signature is compared, not what it encodes, since base64 and hex have several texts for
  the same bytes.
- Every signature is compared with that of every secret, whichever matches, and each in constant time.
- Whatever is missing, doubled or malformed is `Unverified`, and nothing else is raised.

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

Within the 300 s, a copy of a signed request is told from the original by its id alone, which whoever keeps the ids
must do. ``X-GitHub-Delivery`` is the exception: GitHub names it for that purpose, and repeats it when it delivers an
event again, but does not sign it. So it recognises GitHub's own repetitions. It does not recognise an attacker's, who
sends a recorded body and signature under an id of their own: that takes a digest of the body, since the body is all
that they cannot change. Nor can they use the id of another event for a body of their own, as the body is signed.

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
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, assert_never

import attrs
import msgspec

from trigate.errors import BadRequest, Header, Unverified

Scheme = Literal["bearer", "standard-webhooks", "github", "slack", "stripe", "telegram"]

MIN_SECRET_BYTES = 24
"""What Standard Webhooks asks of a secret, and good for the others."""
MAX_CHALLENGE_BYTES = 256

_PREFIX = "whsec_"
_ID = re.compile(r"[!-~]{1,256}")
_TIMESTAMP = re.compile(rb"[0-9]{1,12}")
_TELEGRAM = re.compile(r"[A-Za-z0-9_-]{1,256}")  # the Bot API's own bounds
_MISMATCH = "The signature does not match."
_WRONG_SECRET = "The secret does not match."

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_string = msgspec.json.Decoder(str)


@attrs.frozen(kw_only=True)
class Verified:
    """What is known of a request whose signature holds.

    Attributes:
        event_id: The scheme's own id of the event, the same when the sender repeats it: 1 to 256 visible ASCII
            characters. Taken from signed bytes, but for GitHub's: see the table above. None where there is none.
    """

    event_id: str | None = None


class Verifier:
    """Knows the secrets of one hook.

    Args:
        scheme: How its requests are signed.
        secrets: Any of them may have signed: during a rotation there are two.
        tolerance_s: How far the time of a request may be from ours, in seconds, either way and inclusive.

    Raises:
        ValueError: There is no secret, or one that has a `secret_problem`.
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
        """Judges a request.

        Args:
            headers: By lower-case name.
            body: As it was received.
            now: Seconds since 1970.

        Raises:
            Unverified: It is not from who holds a secret, or it is not from now.

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
                # Others who sign as GitHub does (Meta) have no such header.
                return Verified(
                    event_id=_id(headers, b"x-github-delivery") if b"x-github-delivery" in headers else None
                )
            case "standard-webhooks":
                event_id = _id(headers, b"webhook-id")
                if "." in event_id:
                    # The parts are joined by dots: of "a.1.2.x" nobody can say which part is the id.
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
                return Verified(event_id=_id_in(body, "event_id"))
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
    """Takes ``t=TIME,v1=HEX,v1=HEX,v0=HEX`` apart; only v1 counts (v0 is a fake one, for test events)."""
    fields = [item.partition(b"=") for item in value.split(b",")]
    timestamps = [text for name, _, text in fields if name == b"t"]
    signatures = [text for name, _, text in fields if name == b"v1"]
    if len(timestamps) != 1 or not signatures:
        raise Unverified("The header stripe-signature does not have one t= and at least one v1=.")
    return timestamps[0], signatures


def _matches(given: Sequence[bytes], expected: Sequence[bytes]) -> bool:
    found = False
    for one in expected:
        for other in given:
            found |= hmac.compare_digest(one, other)
    return found


def _texts(body: bytes, *names: str) -> list[str | None]:
    """The strings under keys of a JSON object; None for what is not there, or is no string."""
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
    """Why a secret cannot be used, as the predicate of a sentence; None if it can.

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
    if scheme == "stripe":  # the prefix is a part of Stripe's keys, and no secret
        key = key.removeprefix(_PREFIX.encode())
    if len(key) < MIN_SECRET_BYTES:
        return f"has fewer than {MIN_SECRET_BYTES} bytes"
    if scheme == "telegram" and not _TELEGRAM.fullmatch(secret):
        return "is not what Telegram allows: up to 256 of A-Z, a-z, 0-9, _ and -"
    if scheme == "bearer" and not re.fullmatch(r"[!-~]+", secret):
        return "has characters that cannot stand in a header"
    return None


def _key(scheme: Scheme, secret: str) -> bytes:
    """The bytes that a secret stands for.

    Raises:
        ValueError: It stands for none.
    """
    if scheme != "standard-webhooks":
        return secret.encode()
    text = secret.removeprefix(_PREFIX)
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)  # the padding is often left off


def sign_standard(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """Makes the value of ``webhook-signature`` for a request of our own.

    Args:
        secret: As for the scheme ``standard-webhooks``.
        message_id: The value of ``webhook-id``; without a dot.
        timestamp: That of ``webhook-timestamp``, in seconds since 1970.
        body: What is sent.

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
    """A question by which a platform finds out whether a URL is its owner's; it is answered with what it brought.

    Attributes:
        text: Printable ASCII, at most `MAX_CHALLENGE_BYTES`.
    """

    text: str

    def to_response(self) -> tuple[int, list[Header], bytes]:
        """Status, headers and body. Nothing that a browser would take for a page: anybody could have put it there."""
        headers = [(b"content-type", b"text/plain"), (b"x-content-type-options", b"nosniff")]
        return 200, headers, self.text.encode()


def challenge(
    scheme: Scheme | None, method: str, query: Mapping[str, str], body: bytes, *, tokens: tuple[str, ...]
) -> Challenge | None:
    """Looks whether a request is a challenge.

    There are two. ``GET ?hub.mode=subscribe`` (PubSubHubbub, Meta) is not signed: it brings a token, which is judged
    here. Slack's ``url_verification`` is signed like everything that Slack sends, so a POST is verified *before* it
    is looked at here.

    Args:
        scheme: The hook's.
        method: The request's.
        query: Its query, decoded.
        body: As it was received.
        tokens: What ``hub.verify_token`` may be. It stands in a URL, and so in logs along the way: better not a secret
            that signs.

    Returns:
        What to answer; None if it is an ordinary request.

    Raises:
        Unverified: The token is none of them.
        BadRequest: The challenge is not one that can be answered.

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
