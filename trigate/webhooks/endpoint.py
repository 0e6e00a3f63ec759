"""``POST /hooks/NAME``: the checks of a request, in order, from the socket to its run.

The order is part of the security of the endpoint: a check that costs more, or reveals more, comes later.

1. The name: a hook (else 404), or a channel whose platform calls.
2. ``?token=`` is refused, because URLs are logged.
3. The rate limit, before anything is read or computed for a client that exceeds it.
4. A gateway key or a bearer secret, which need no body.
5. The body, up to its size limit.
6. The signature, over the bytes as received.
7. The platform's challenge is answered.
8. Only now the bytes are decoded (`payload`): the filter, the expressions, the action, the prompt.
9. The run is accepted: it is stored under its idempotency key, or an older run with this key is found.
10. The run is executed, in this request or in the background.

Steps 1 to 4 are here (`Hooks.check_head`); the application reads the body (5); steps 6 to 10 are in `calls`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from urllib.parse import parse_qsl

import trio

from trigate import signatures
from trigate.channels.adapter import Adapter
from trigate.concurrency.rate_limiter import RateLimiter
from trigate.config import checks
from trigate.config.sections import Config, HookConfig
from trigate.errors import (
    BadRequest,
    MethodNotAllowed,
    NotFound,
    RateLimited,
    UnsupportedMediaType,
    Unverified,
)
from trigate.keys.errors import HookNotAllowed
from trigate.keys.key import Key
from trigate.runs.service import Runs
from trigate.signatures import Verifier
from trigate.upstream.generation import Generations
from trigate.webhooks import payload
from trigate.webhooks.calls import HookCall, HookHead, MessageCall, PlatformCall

_MAX_NAME_CHARS = 64


class Hooks:
    """The webhooks of the current configuration.

    Verifiers hold secrets. They are made when a request first needs them, and live as long as the configuration:
    `apply` drops those of the previous one.

    Args:
        runs: Accepts and executes the messages.
        generations: Gives the configuration.
        channel_adapter: Returns the running adapter of a channel by its name; None = the channel is not running.
    """

    def __init__(
        self, *, runs: Runs, generations: Generations, channel_adapter: Callable[[str], Adapter | None]
    ) -> None:
        self._runs = runs
        self._generations = generations
        self._channel_adapter = channel_adapter
        self._rates = RateLimiter()
        self._config: Config
        self._verifiers: dict[str, Verifier]  # by the name of the hook
        self.apply()

    def __repr__(self) -> str:
        return f"<Hooks of {self._config.source}, {len(self._verifiers)} verifiers>"

    def apply(self) -> None:
        """Follows a changed configuration, and drops the secrets of the previous one. Synchronous."""
        self._config = self._generations.config
        self._verifiers = {}

    def check_head(self, head: HookHead) -> HookCall:
        """Checks a request by its head alone. Returns the call whose body is to be read.

        Raises:
            NotFound: There is no such hook, or it is disabled.
            MethodNotAllowed: The request is neither a message nor a challenge.
            BadRequest: There is a token in the URL.
            RateLimited: The client has exceeded the rate of the hook.
            Unauthenticated, Forbidden, Unverified: The key or the bearer secret is missing or wrong.
            HookNotAllowed: The key may not call the hook.
            UnsupportedMediaType: The request is authenticated by a key and is not JSON.
        """
        name = head.name
        query = dict(parse_qsl(head.query.decode("latin-1"), keep_blank_values=True))
        adapter = self._adapter(name)
        hook = HookConfig() if adapter is not None else find(name, self._config)
        if head.method != "POST" and not (head.method == "GET" and "hub.mode" in query):
            if head.method == "GET" and hook.verify_token is not None:
                raise BadRequest("The challenge of a platform has hub.mode in its query.", param="hub.mode")
            allowed = ("POST",) if hook.verify_token is None else ("GET", "POST")
            raise MethodNotAllowed(head.method, f"/hooks/{name}", allowed=allowed)
        if "token" in query:
            raise BadRequest(
                "A token in the URL is not accepted, because URLs are logged. Send it in a header.", param="token"
            )
        self._limit_rate(head, hook)
        verifier = self._verifier(name, hook)
        if adapter is not None or verifier is not None:
            signatures.check_unrepeated(head.repeated)
        if adapter is not None:
            return PlatformCall(adapter, head, hook)
        owner = f"hook:{name}"
        if verifier is None:
            owner = _allowed(head.authorize(), name).name
            _check_json(head)  # another site's page can send a form without a CORS preflight, but not JSON
        elif verifier.scheme == "bearer":
            verifier.verify(head.headers, b"", now=time.time())
        return MessageCall(self._runs, head, hook, verifier, owner, query)

    def readers(self, name: str, headers: Mapping[bytes, bytes], authorize: Callable[[], Key]) -> set[str] | None:
        """The owners whose runs of a hook the sender of a request may read: the owner of its gateway key, and the hook
        itself, which owns the runs that its own verification let in; None = all owners, for the admin. The secret of a
        hook with verification ``bearer`` opens only the runs of the hook. Any gateway key opens those of a channel.

        Runs stay readable after their hook or channel has been removed.

        Args:
            headers: By lower-case name.
            authorize: As `HookHead.authorize`.

        Raises:
            Unauthenticated, Forbidden, HookNotAllowed: As `check_head`.
        """
        hook = (self._config.hooks or {}).get(name)
        verifier = self._verifier(name, hook) if hook is not None else None
        if verifier is not None and verifier.scheme == "bearer":
            try:
                verifier.verify(headers, b"", now=time.time())
            except Unverified:
                pass  # the header may hold a gateway key
            else:
                return {f"hook:{name}"}
        key = _allowed(authorize(), name)
        if key.is_admin:
            return None
        return {key.name, f"hook:{name}", f"channel:{name}"}

    def _adapter(self, name: str) -> Adapter | None:
        """The adapter of the channel whose platform calls ``/hooks/NAME``; None = there is none, or it polls."""
        channel = self._config.channels.get(name)
        if channel is None or (channel.type == "telegram" and channel.mode != "webhook"):
            return None
        return self._channel_adapter(name)

    def _verifier(self, name: str, hook: HookConfig) -> Verifier | None:
        """The verifier of a hook's requests; None = they need a gateway key."""
        if hook.verification == "key":
            return None
        verifier = self._verifiers.get(name)
        if verifier is None:
            secrets = tuple(secret.literal or "" for secret in hook.secrets)
            verifier = self._verifiers[name] = Verifier(hook.verification, secrets, tolerance_s=hook.tolerance_s)
        return verifier

    def _limit_rate(self, head: HookHead, hook: HookConfig) -> None:
        if hook.rate_per_s:
            wait_s = self._rates.take(
                f"{head.name} {head.client}",
                rate_per_s=hook.rate_per_s,
                burst=hook.burst,
                now=trio.current_time(),
            )
            if wait_s:
                raise RateLimited(
                    f"More than {hook.rate_per_s:g} requests a second to {head.name}.", retry_after_s=wait_s
                )


def find(name: str, config: Config) -> HookConfig:
    """The configuration of a hook. Without a table ``[hooks]``, every valid name has the defaults.

    Raises:
        NotFound: There is no such hook, or it is disabled.
    """
    if config.hooks is None:
        known = len(name) <= _MAX_NAME_CHARS and checks.NAME.match(name) and name not in config.channels
        hook = HookConfig() if known else None
    else:
        hook = config.hooks.get(name)
    if hook is None or not hook.enabled:
        raise NotFound(f"There is no hook {name[:_MAX_NAME_CHARS]!r}.")
    return hook


def _allowed(key: Key, hook: str) -> Key:
    if not key.may_call_hook(hook):
        raise HookNotAllowed(hook)
    return key


def _check_json(head: HookHead) -> None:
    kind = payload.media_type(head.headers.get(b"content-type", b""))
    if head.method == "POST" and not payload.is_json(kind):
        raise UnsupportedMediaType(f"Content-Type must be application/json; got {kind or 'none'}.")
