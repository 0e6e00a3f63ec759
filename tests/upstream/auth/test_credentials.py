"""Credentials that expire: who fetches them, when, and what a call gets meanwhile."""

from __future__ import annotations

import math
import threading
from collections.abc import AsyncIterator, Callable

import attrs
import httpx2
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.logs import Logs
from trigate.concurrency.notify import open_service
from trigate.config import structure as configuration
from trigate.errors import GatewayError, Unavailable
from trigate.upstream.auth import BearerToken, Credentials, CredentialsError, Fetched
from trigate.upstream.auth import credentials as module
from trigate.upstream.upstream import Upstream


@attrs.define
class Provider:
    """Gives out tokens that are valid for an hour, each with its number; ``gate`` holds a fetch up."""

    now: float = 1000.0
    life_s: float = 3600.0
    fetches: int = 0
    fails_with: Exception | None = None
    gate: threading.Event | None = None

    def fetch(self) -> Fetched[str]:
        self.fetches += 1
        if self.gate is not None:
            self.gate.wait(5)
        if self.fails_with is not None:
            raise self.fails_with
        token = f"token-{self.fetches}"
        return Fetched(token, self.now + self.life_s, (token,))

    def credentials(self) -> Credentials[str]:
        return Credentials(self.fetch, upstream="cloud", now=lambda: self.now)


@pytest.fixture
def provider() -> Provider:
    return Provider()


@pytest.fixture
async def held(provider: Provider) -> AsyncIterator[Credentials[str]]:
    credentials = provider.credentials()
    async with open_service(credentials.run):
        yield credentials


async def _wait_for(condition: Callable[[], bool]) -> None:
    """Waits for a thread."""
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110  # a thread sets it
            await trio.sleep(0.001)


async def test_calls_share_one_fetch(provider: Provider, held: Credentials[str]) -> None:
    """All calls that find no credential wait for the same fetch; later ones find it."""
    found = []

    async def get() -> None:
        found.append(await held.get())

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(get)
    assert found == ["token-1"] * 10
    assert await held.get() == "token-1"
    assert provider.fetches == 1


async def test_a_cancelled_call_stops_no_fetch(provider: Provider, held: Credentials[str]) -> None:
    """The call that began a fetch may be cancelled: the others get its result."""
    provider.gate = threading.Event()
    with trio.CancelScope() as first:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(held.get)
            await _wait_for(lambda: provider.fetches == 1)
            first.cancel()
    provider.gate.set()
    assert await held.get() == "token-1"
    assert provider.fetches == 1


async def test_a_credential_is_renewed_before_its_end(provider: Provider, held: Credentials[str]) -> None:
    """Near its end it is still used, and its successor is fetched beside the calls."""
    await held.get()
    provider.now += 3600 - module.RENEW_BEFORE_S + 1
    provider.gate = threading.Event()
    with trio.fail_after(5):
        assert [await held.get(), await held.get()] == ["token-1", "token-1"]
    await _wait_for(lambda: provider.fetches == 2)
    provider.gate.set()
    await _wait_for(lambda: not held._is_fetching)
    assert await held.get() == "token-2"
    assert provider.fetches == 2


async def test_an_expired_credential_is_not_sent(provider: Provider, held: Credentials[str]) -> None:
    """After its end, a call waits for the next one."""
    await held.get()
    provider.now += 3600 - module.UNUSED_BEFORE_S
    assert await held.get() == "token-2"


async def test_a_failure_is_an_error_that_says_why(provider: Provider, held: Credentials[str], logs: Logs) -> None:
    """A call that finds no credential gets the reason, and may go to the next target; the log has it once. For a while,
    no further fetch is tried."""
    provider.fails_with = CredentialsError("run `az login`")
    for _ in range(2):
        with pytest.raises(Unavailable) as caught:
            await held.get()
        assert caught.value.message == "The upstream cloud has no credentials: run `az login`."
        assert (caught.value.status, caught.value.retryable) == (503, True)
    assert provider.fetches == 1
    provider.now += module.RETRY_S
    with pytest.raises(Unavailable):
        await held.get()
    assert provider.fetches == 2
    assert [entry["error"] for entry in logs.named("credentials_unavailable")] == ["run `az login`."]
    provider.fails_with = None
    provider.now += module.RETRY_S
    assert await held.get() == "token-3"


async def test_a_failed_renewal_costs_no_call(provider: Provider, held: Credentials[str]) -> None:
    """While the old credential is valid, calls use it."""
    await held.get()
    provider.now += 3600 - module.RENEW_BEFORE_S + 1
    provider.fails_with = OSError("no route")
    assert await held.get() == "token-1"
    await _wait_for(lambda: held._failure is not None)
    assert await held.get() == "token-1"
    assert provider.fetches == 2


async def test_credentials_that_have_expired_already_are_an_error(provider: Provider, held: Credentials[str]) -> None:
    """A library whose clock or cache is wrong makes no loop of fetches."""
    provider.life_s = 0.0
    with pytest.raises(Unavailable, match="have expired"):
        await held.get()
    assert provider.fetches == 1


async def test_a_fetch_that_hangs_is_given_up(
    provider: Provider, held: Credentials[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error after a time, and no second fetch begins beside it."""
    monkeypatch.setattr(module, "TIMEOUT_S", 0.01)
    provider.gate = threading.Event()
    with pytest.raises(Unavailable, match=r"within 0\.01 s"):
        await held.get()
    provider.now += module.RETRY_S
    with pytest.raises(Unavailable):
        await held.get()
    assert provider.fetches == 1
    provider.gate.set()


async def test_a_refused_credential_is_renewed(provider: Provider, held: Credentials[str]) -> None:
    """A provider that refuses it before its end has revoked it; but no faster than once a minute."""
    await held.get()
    held.note_refused()
    assert await held.get() == "token-1"
    await wait_all_tasks_blocked()
    assert provider.fetches == 1
    provider.now += 61
    held.note_refused()
    assert await held.get() == "token-1"
    await _wait_for(lambda: provider.fetches == 2 and not held._is_fetching)
    assert await held.get() == "token-2"


async def test_an_upstream_sends_the_token_and_hides_it(provider: Provider, held: Credentials[str]) -> None:
    """Each request has the token; a provider that quotes it puts it into no message."""
    requests = []

    async def answer(request: httpx2.Request) -> httpx2.Response:
        await trio.lowlevel.checkpoint()
        requests.append(request)
        return httpx2.Response(401, json={"error": {"message": f"bad: {request.headers['authorization']}"}})

    table = {"base_url": "http://cloud.invalid/v1"}
    config = configuration.structure({"upstreams": {"cloud": table}}, env={}, source="test")
    upstream = Upstream("cloud", config, httpx2.MockTransport(answer), auth=BearerToken(held))
    async with upstream.open("POST", "/chat/completions", b"{}") as reply:
        error = await upstream.error_of(reply)
    assert requests[0].headers["authorization"] == "Bearer token-1"
    assert error.message == "bad: Bearer [redacted]"


async def test_without_a_token_nothing_is_sent(provider: Provider, held: Credentials[str]) -> None:
    """The call fails before a connection, with the slot released."""
    provider.fails_with = CredentialsError("no identity")

    async def answer(request: httpx2.Request) -> httpx2.Response:
        raise AssertionError

    table = {"base_url": "http://cloud.invalid/v1"}
    config = configuration.structure({"upstreams": {"cloud": table}}, env={}, source="test")
    upstream = Upstream("cloud", config, httpx2.MockTransport(answer), auth=BearerToken(held))
    with pytest.raises(GatewayError, match="no identity"):
        async with upstream.open("POST", "/chat/completions", b"{}"):
            pass
    assert upstream.in_flight == 0


def test_an_endless_credential_is_never_renewed() -> None:
    """One without an end is valid until it is refused."""
    credentials = Credentials(lambda: Fetched("key"), upstream="cloud", now=lambda: 0.0)
    assert credentials._take(Fetched("key", math.inf)) is None
    assert credentials._renew_at == math.inf
