"""What the official SDKs make of the refusals of keys, limits and budgets: the exception, how often they try, and what
they read from the headers.

The tests of the TypeScript SDKs are in ``node/refusals.test.mjs``.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import httpx2
import openai
import pytest

from tests.support import processes
from tests.support.processes import environment, run_gateway
from tests.support.scripted_upstream import open_upstream, wait_closed

anthropic: Any = pytest.importorskip("anthropic", reason="the SDK of requirements-test.lock is not installed")

pytestmark = pytest.mark.slow

ADMIN = "the admin's key, which nobody guesses"
ROOM = Path(__file__).parents[1] / "node"
FILE = ROOM / "refusals.test.mjs"
NODE = shutil.which("node")
NODE_TESTS = re.findall(r'^test\("(.+)",', FILE.read_text(encoding="utf-8"), re.M)
MESSAGES: Any = [{"role": "user", "content": "Hello"}]
FIRST = """
[keys.{name}-{client}]
secret = "{name}-{client}"
"""
# each client has keys of its own, so that the tests are independent of each other
KEYS = {
    "free": "",
    "chooser": 'models = ["mock/hello*"]',
    "late": "expires_at = 2026-01-01T00:00:00Z",
    "rate": "rpm = 30",
    "patient": "rpm = 60",
    "tokens": "tpm = 30",
    "single": "max_exchanges = 1",
    "poor": 'budget_usd = "0.000060"\nbudget_period = "month"',
    "warned": 'budget_usd = 1\nsoft_budget_usd = "0.000001"',
    "grouped": 'group = "poor-{client}"',
}
GROUPS = """
[groups.poor-{client}]
budgets = {{ day = "0.000060" }}
"""
CLIENTS = ("openai", "anthropic", "node")


def configuration(upstream: str) -> str:
    """Each kind of key for each client; a call of `MESSAGES` costs 7 + 2 × 4 = 15 micro-dollars."""
    parts = [
        f"""
[models.busy]
targets = ["mock/endless.busy"]
max_exchanges = 1
[prices."mock/*"]
input_usd = 1
output_usd = 2
[admin]
key = "{ADMIN}"
"""
    ]
    for client in CLIENTS:
        parts.append(GROUPS.format(client=client))
        for name, settings in KEYS.items():
            parts.append(FIRST.format(name=name, client=client) + settings.format(client=client))
    return processes.configuration(upstream, more="\n".join(parts))


@attrs.frozen
class Urls:
    """The URLs of the gateway and of the scripted upstream, without ``/v1``."""

    gateway: str
    upstream: str


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Urls]:
    """A gateway with all keys, in front of the scripted upstream."""
    directory = tmp_path_factory.mktemp("gateway")
    with open_upstream() as upstream, run_gateway(configuration(upstream), directory) as gateway:
        yield Urls(gateway.url, upstream)
        assert gateway.process.poll() is None, gateway.log()
        errors = [line for line in gateway.log().splitlines() if "[error" in line or "Traceback" in line]
        assert errors == [], gateway.log()


@attrs.define(eq=False)
class Wire:
    """Counts the requests of an SDK, and keeps the head of the last answer."""

    requests: int = 0
    headers: httpx2.Headers = attrs.field(factory=httpx2.Headers)

    def client(self) -> httpx2.Client:
        """An HTTP client that counts here."""

        def count(_: httpx2.Request) -> None:
            self.requests += 1

        def keep(response: httpx2.Response) -> None:
            self.headers = response.headers

        return httpx2.Client(trust_env=False, event_hooks={"request": [count], "response": [keep]}, timeout=60)


Ask = Callable[..., Any]


@contextlib.contextmanager
def _openai(urls: Urls, key: str, wire: Wire, max_retries: int) -> Iterator[Ask]:
    with openai.OpenAI(
        base_url=f"{urls.gateway}/v1", api_key=f"{key}-openai", http_client=wire.client(), max_retries=max_retries
    ) as client:

        def ask(model: str = "mock/hello", **more: Any) -> Any:
            return client.chat.completions.create(model=model, messages=MESSAGES, **{"max_tokens": 4, **more})

        yield ask


@contextlib.contextmanager
def _anthropic(urls: Urls, key: str, wire: Wire, max_retries: int) -> Iterator[Ask]:
    with anthropic.Anthropic(
        base_url=urls.gateway, api_key=f"{key}-anthropic", http_client=wire.client(), max_retries=max_retries
    ) as client:

        def ask(model: str = "mock/hello", **more: Any) -> Any:
            return client.messages.create(model=model, messages=MESSAGES, **{"max_tokens": 4, **more})

        yield ask


@attrs.frozen
class Sdk:
    """An official SDK.

    Attributes:
        module: Its exceptions.
        open: Opens a client: the URLs, a name in `KEYS`, what counts, how often to try again.
    """

    name: str
    module: Any
    open: Callable[[Urls, str, Wire, int], contextlib.AbstractContextManager[Ask]]

    def code(self, error: Any) -> str:
        """The code of an error (OpenAI's format), or its type (Anthropic's)."""
        return str(error.code if self.name == "openai" else error.body["error"]["type"])

    def message(self, error: Any) -> str:
        """What an error says."""
        return str((error.body if self.name == "openai" else error.body["error"])["message"])


@pytest.fixture(params=["openai", "anthropic"])
def sdk(request: pytest.FixtureRequest) -> Sdk:
    """Each SDK in turn."""
    if request.param == "openai":
        return Sdk("openai", openai, _openai)
    return Sdk("anthropic", anthropic, _anthropic)


def _refusal(ask: Callable[[], Any], kind: type[Exception]) -> Any:
    """Expects a call to raise exactly this class of error, and returns the error."""
    with pytest.raises(kind) as caught:
        ask()
    assert type(caught.value) is kind
    return caught.value


def _refusal_within(calls: int, ask: Callable[[], Any], kind: type[Exception]) -> Any:
    """Calls until a call is refused, so many times at most, and returns the error."""
    refusals: list[Exception] = []
    while not refusals:
        assert calls > 0, "every call was allowed"
        calls -= 1
        try:
            ask()
        except kind as error:
            refusals.append(error)
    assert type(refusals[0]) is kind
    return refusals[0]


def test_an_unknown_and_an_expired_key(urls: Urls, sdk: Sdk) -> None:
    """Both are an AuthenticationError after one request, and cannot be told from each other."""
    said = set()
    for key in ("nobody", "late"):
        wire = Wire()
        with sdk.open(urls, key, wire, 2) as ask:
            error = _refusal(ask, sdk.module.AuthenticationError)
        assert wire.requests == 1
        assert sdk.code(error) == ("invalid_api_key" if sdk.name == "openai" else "authentication_error")
        said.add(sdk.message(error))
    assert len(said) == 1, said


def test_a_model_that_the_key_may_not_use(urls: Urls, sdk: Sdk) -> None:
    """It is a PermissionDeniedError after one request; the key's own models answer."""
    wire = Wire()
    with sdk.open(urls, "chooser", wire, 2) as ask:
        error = _refusal(lambda: ask(model="mock/endless"), sdk.module.PermissionDeniedError)
        assert wire.requests == 1
        assert sdk.code(error) == ("model_not_allowed" if sdk.name == "openai" else "permission_error")
        assert "mock/endless" in sdk.message(error)
        ask()


def test_the_models_of_a_key(urls: Urls) -> None:
    """Only those that the key may use are listed, and the others are not retrieved."""
    with openai.OpenAI(base_url=f"{urls.gateway}/v1", api_key="chooser-openai") as client:
        listed = {model.id for model in client.models.list()}
        assert listed == {"mock/hello", "hello", "default"}  # the short ids are of the same target
        _refusal(lambda: client.models.retrieve("mock/endless"), openai.NotFoundError)


def test_the_routes_of_the_admin(urls: Urls) -> None:
    """Another key gets a PermissionDeniedError at /v1/keys."""
    with openai.OpenAI(base_url=f"{urls.gateway}/v1", api_key="free-openai") as client:
        _refusal(lambda: client.get("/keys", cast_to=object), openai.PermissionDeniedError)
        assert client.with_options(api_key=ADMIN).get("/keys", cast_to=object)


def test_requests_per_minute(urls: Urls, sdk: Sdk) -> None:
    """Every answer says what is left. The call over the limit is a RateLimitError that names the limit and the key, and
    says when to come back."""
    wire = Wire()
    with sdk.open(urls, "rate", wire, 0) as ask:
        ask()
        if sdk.name == "openai":
            assert wire.headers["x-ratelimit-limit-requests"] == "30"
            assert int(wire.headers["x-ratelimit-remaining-requests"]) in (28, 29)
            assert re.fullmatch(r"(\d+m)?\d+(\.\d+)?s|\d+ms", wire.headers["x-ratelimit-reset-requests"])
        else:
            assert wire.headers["anthropic-ratelimit-requests-limit"] == "30"
            assert int(wire.headers["anthropic-ratelimit-requests-remaining"]) in (28, 29)
            reset = datetime.datetime.fromisoformat(wire.headers["anthropic-ratelimit-requests-reset"])
            assert abs(reset.timestamp() - time.time()) < 120
        error = _refusal_within(40, ask, sdk.module.RateLimitError)
    assert sdk.code(error) == ("rate_limit_exceeded" if sdk.name == "openai" else "rate_limit_error")
    assert f"rate-{sdk.name}" in sdk.message(error)
    assert "30" in sdk.message(error)
    assert 0 < int(wire.headers["retry-after-ms"]) <= 2000
    assert 1 <= int(wire.headers["retry-after"]) <= 2
    assert wire.headers.get("x-should-retry") != "false"


def test_an_sdk_waits(urls: Urls, sdk: Sdk) -> None:
    """It tries a call over the rate again after as long as the refusal said, and the call succeeds."""
    wire = Wire()
    with sdk.open(urls, "patient", wire, 2) as ask:
        for number in range(1, 90):
            ask()
            if wire.requests > number:
                break
        assert wire.requests == number + 1, "nothing was refused, or more than once"


def test_tokens_per_minute(urls: Urls, sdk: Sdk) -> None:
    """They are counted as the provider reports them; beyond the limit a call is a RateLimitError with a time."""
    wire = Wire()
    with sdk.open(urls, "tokens", wire, 0) as ask:
        error = _refusal_within(6, ask, sdk.module.RateLimitError)
    assert sdk.code(error) == ("tokens_exceeded" if sdk.name == "openai" else "rate_limit_error")
    assert 1 <= int(wire.headers["retry-after"]) <= 60
    limit = "x-ratelimit-limit-tokens" if sdk.name == "openai" else "anthropic-ratelimit-tokens-limit"
    assert wire.headers[limit] == "30"


def test_exchanges_in_flight(urls: Urls, sdk: Sdk) -> None:
    """A second call beside a stream is a RateLimitError; when the stream's client has left, it is served."""
    wire = Wire()
    with sdk.open(urls, "single", wire, 0) as ask:
        stream = ask(model=f"mock/endless.{sdk.name}-single", stream=True)
        next(iter(stream))
        error = _refusal(ask, sdk.module.RateLimitError)
        assert sdk.code(error) == ("concurrency_exceeded" if sdk.name == "openai" else "rate_limit_error")
        assert f"single-{sdk.name}" in sdk.message(error)
        stream.close()
        wait_closed(urls.upstream, f"endless.{sdk.name}-single")
        ask()


def test_exchanges_in_flight_of_a_model(urls: Urls) -> None:
    """The limit of a model holds for all keys."""
    wire = Wire()
    with _openai(urls, "free", wire, 0) as ask:
        stream = ask(model="busy", stream=True)
        next(iter(stream))
        with _anthropic(urls, "free", Wire(), 0) as other:
            error = _refusal(lambda: other(model="busy"), anthropic.RateLimitError)
            assert "busy" in str(error)
        ask()
        stream.close()


@pytest.mark.parametrize("key", ["poor", "grouped"])
def test_a_budget(urls: Urls, sdk: Sdk, key: str) -> None:
    """A call beyond it is a RateLimitError after one request, however often the SDK would try."""
    wire = Wire()
    with sdk.open(urls, key, wire, 2) as ask:
        error = _refusal_within(6, ask, sdk.module.RateLimitError)
        wire.requests = 0
        _refusal(ask, sdk.module.RateLimitError)
    assert wire.requests == 1
    assert wire.headers["x-should-retry"] == "false"
    assert sdk.code(error) == ("insufficient_quota" if sdk.name == "openai" else "billing_error")
    assert f"poor-{sdk.name}" in sdk.message(error)  # the key, or its group
    if sdk.name == "openai":
        assert error.type == "insufficient_quota"
        assert int(wire.headers["retry-after"]) > 0
    else:
        unified = {name for name in wire.headers if name.startswith("anthropic-ratelimit-unified-")}
        assert "anthropic-ratelimit-unified-status" in unified
        assert "anthropic-ratelimit-unified-reset" in unified
        assert wire.headers["anthropic-ratelimit-unified-status"] == "rejected"


def test_the_cost_of_an_answer(urls: Urls, sdk: Sdk) -> None:
    """A plain answer says what it cost; a key with a soft budget gets a warning beyond it."""
    wire = Wire()
    with sdk.open(urls, "warned", wire, 0) as ask:
        ask()
        assert float(wire.headers["x-trigate-cost-usd"]) == 0.000015
        ask()
    warnings = [value for name, value in wire.headers.items() if "budget" in name]
    assert warnings, dict(wire.headers)


def test_a_stream_counts_as_reported(urls: Urls) -> None:
    """A stream that did not ask for usage costs what the provider counted, and has no chunk of usage."""
    with openai.OpenAI(base_url=f"{urls.gateway}/v1", api_key="warned-openai") as client:
        model = "mock/hello.counted"
        chunks = list(client.chat.completions.create(model=model, messages=MESSAGES, stream=True, max_tokens=4))
        assert [chunk for chunk in chunks if chunk.usage or not chunk.choices] == []
        rows: Any = client.get("/exchanges?model=mock/hello.counted", cast_to=object)
        [row] = rows["data"]
        assert (row["prompt_tokens"], row["completion_tokens"], row["counted"]) == (7, 4, False)


# -- TypeScript -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(urls: Urls) -> str:
    """The TAP report of Node's test runner on the file."""
    if NODE is None or not (ROOM / "node_modules/@anthropic-ai").exists():
        pytest.skip("needs Node and the packages of tests/node (./scripts/test installs them where Node is)")
    done = subprocess.run(
        [NODE, "--test", "--test-reporter=tap", FILE],
        env=environment(GATEWAY=urls.gateway),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    return done.stdout + done.stderr


def test_node_file_has_tests() -> None:
    """The list of names here is the list of tests in the file."""
    assert len(NODE_TESTS) == len(set(NODE_TESTS)) == FILE.read_text(encoding="utf-8").count("\ntest(") > 4


@pytest.mark.parametrize("name", NODE_TESTS)
def test_typescript(name: str, report: str) -> None:
    """The SDK's test of that name passes."""
    assert re.search(rf"^\s*ok \d+ - {re.escape(name)}$", report, re.M), report
