"""Newer prices, from a URL or a file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.support.gateway import OpenApp, Served, make_config
from tests.support.logs import Logs
from tests.support.provider import Pause, Provider, Say, answers, completion, open_socket_provider
from trigate.config.key_sections import PriceTableConfig
from trigate.config.sections import ConfigError
from trigate.gateway import price_refresh
from trigate.gateway.price_refresh import RETRY_S, PriceRefresh
from trigate.openai.answer import Usage
from trigate.upstream.generation import Generation, Generations
from trigate.workers.membership import Workers


def data(rate: float) -> bytes:
    """A table whose only model costs this much per million tokens of the prompt."""
    model = {"id": "m", "match": {"equals": "m"}, "prices": {"input_mtok": rate, "output_mtok": 0}}
    return json.dumps([{"id": "p", "api_pattern": r"http://up\.invalid", "models": [model]}]).encode()


def config(**section: Any) -> Any:
    return make_config(price_table=section) if section else make_config()


async def until(holds: Callable[[], bool]) -> None:
    """Waits until something holds."""
    with trio.fail_after(5):
        while not holds():  # noqa: ASYNC110 -- it is no event of the test
            await trio.sleep(0.005)


async def prices_of(served: Served) -> Any:
    return (await served.client.ask("GET", "/status")).json["prices"]


# -- through the gateway ----------------------------------------------------------------------------------------------


async def test_prices_of_a_url(open_app: OpenApp, logs: Logs) -> None:
    """They are read at the start; a call then costs what they say. The status says where they are from."""
    async with (
        open_socket_provider(answers(data(7))) as (source, base_url),
        open_app(config(url=f"{base_url}/data.json"), Provider(answers(completion("Hi")))) as served,
    ):
        await until(lambda: bool(logs.named("prices_refreshed")))
        assert source.calls[0].headers["accept-encoding"] == "identity"
        call = await served.client.chat(stream=False).wait()
        assert call.header("x-trigate-cost-usd") == f"0.{7 * call.json['usage']['prompt_tokens']:06d}"
        prices = await prices_of(served)
        assert prices["source"].startswith(f"{base_url}/data.json (")
        assert (prices["refresh_error"], prices["unknown"]) == (None, [])
        assert prices["refreshed_at"].startswith("20")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (answers(b"no", status=404), "the server answered 404"),
        (answers(b"<html>"), "malformed"),
        (answers(b"[]"), "it has no models"),
        (answers(data(1), headers={"content-encoding": "gzip"}), "compressed"),
        (answers(gzip.compress(data(1))), "JSON is malformed"),
        (answers(data(1) + b" " * 10_000), "more than 2000 bytes"),
        ((Pause(9), Say(data(1))), "it took too long"),
    ],
    ids=["404", "no JSON", "empty", "compressed", "bytes", "too much", "too slow"],
)
async def test_bad_data_changes_nothing(
    open_app: OpenApp, logs: Logs, monkeypatch: pytest.MonkeyPatch, script: Any, reason: str
) -> None:
    """The prices of the release stay, and the log and the status say why."""
    monkeypatch.setattr(price_refresh, "MAX_BYTES", 2000)
    monkeypatch.setattr(price_refresh, "READ_S", 0.1)
    async with (
        open_socket_provider(script) as (_, base_url),
        open_app(config(url=f"{base_url}/data.json"), Provider()) as served,
    ):
        await until(lambda: bool(logs.named("prices_not_refreshed")))
        [event] = logs.named("prices_not_refreshed")
        assert reason in event["error"]
        prices = await prices_of(served)
        assert prices["source"].startswith("genai-prices ")
        assert (prices["refresh_error"], prices["refreshed_at"]) == (event["error"], None)


async def test_nothing_is_read_by_default(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """The status has the prices of the release, and no refresh."""
    async with open_app(config(), Provider()) as served:
        await trio.sleep(120)
        prices = await prices_of(served)
        assert (prices["refresh_error"], prices["refreshed_at"]) == (None, None)


@pytest.mark.parametrize(
    "section", [{"url": "http://a.invalid/x", "file": "x"}, {"interval_s": 5}, {"url": "x"}, {"file": 1}]
)
def test_a_wrong_section(section: dict[str, Any]) -> None:
    """It is refused."""
    with pytest.raises(ConfigError, match=r"price_table\."):
        config(**section)


# -- the service alone ------------------------------------------------------------------------------------------------


class Peers(Workers):
    """Workers that notify each other at once."""

    def __init__(self, peers: list[Peers]) -> None:
        self.listeners: list[Callable[[bytes], None]] = []
        self.peers = peers
        peers.append(self)

    def __repr__(self) -> str:
        return "<Peers>"

    def on_notify(self, topic: str, callback: Callable[[bytes], None]) -> None:
        assert topic == "prices"
        self.listeners.append(callback)

    def notify(self, topic: str, body: bytes = b"") -> None:
        for peer in self.peers:
            for listener in peer.listeners if peer is not self else ():
                listener(body)


class Source:
    """A source that can change, and fail. It knows when it was read."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.error: Exception | None = None
        self.read_at: list[float] = []

    async def read(self, config: PriceTableConfig) -> bytes:
        await trio.lowlevel.checkpoint()
        self.read_at.append(round(trio.current_time()))
        if self.error is not None:
            raise self.error
        return data(self.rate)


def generations_of(config: Any) -> Generations:
    return Generations(Generation(config, {}, None))  # type: ignore[arg-type]  # it opens no connection


def rate_of(generations: Generations) -> float | None:
    price = generations.current.prices.price("up", "m", 0)
    return price.cost(Usage(1, 0)) if price is not None else None


SECTION = {"file": "prices.json", "interval_s": 600}


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual time does not wait for threads, so there are none."""

    async def run_here(work: Callable[[], Any]) -> Any:
        await trio.lowlevel.checkpoint()
        return work()

    monkeypatch.setattr(trio.to_thread, "run_sync", run_here)


async def test_when_they_are_read(
    no_threads: None, autojump_clock: MockClock, nursery: trio.Nursery, logs: Logs
) -> None:
    """At the start, at each reload, and after each interval; after a failure sooner, and then ever later. A reason is
    logged once."""
    source, generations = Source(1), generations_of(config(**SECTION))
    refresh = PriceRefresh(generations, Peers([]), source.read)
    nursery.start_soon(refresh.run)
    start = round(trio.current_time())
    refresh.apply(generations.config.price_table)
    await trio.sleep(1250)
    refresh.apply(generations.config.price_table)
    source.error = OSError("no network")
    await trio.sleep(3000)
    assert [at - start for at in source.read_at] == [0, 600, 1200, 1250, 1310, 1430, 1670, 2150, 2750, 3350, 3950]
    assert rate_of(generations) == 1
    assert (refresh.error, len(logs.named("prices_not_refreshed"))) == ("no network", 1)
    source.error, source.rate = None, 2
    await trio.sleep(600)
    assert (rate_of(generations), refresh.error) == (2, None)


async def test_a_reload_keeps_what_was_read(nursery: trio.Nursery, tmp_path: Path) -> None:
    """The next generation has the newer prices from its first call on, and the file is read again. Without the section,
    the prices of the release hold."""
    file = tmp_path / "prices.json"
    file.write_bytes(data(1))
    first = config(file=str(file))
    generations = generations_of(first)
    refresh = PriceRefresh(generations, Peers([]))
    nursery.start_soon(refresh.run)
    refresh.apply(first.price_table)
    await until(lambda: rate_of(generations) == 1)
    file.write_bytes(data(2))
    generations.replace(Generation(first, {}, None))  # type: ignore[arg-type]
    assert rate_of(generations) is None
    refresh.apply(first.price_table)
    assert rate_of(generations) == 1
    await until(lambda: rate_of(generations) == 2)
    generations.replace(Generation(config(), {}, None))  # type: ignore[arg-type]
    refresh.apply(config().price_table)
    assert rate_of(generations) is None
    assert refresh.refreshed_at is None


@pytest.mark.usefixtures("no_threads")
async def test_workers_end_up_with_the_same(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """One that reads other data than before notifies the others, which read as well, long before their interval is
    over; and a source that changes at each read does not make them read all the time."""
    sources, peers, all_generations, refreshes = [Source(1), Source(1), Source(1)], list[Peers](), [], []
    for source in sources:
        generations = generations_of(config(**SECTION))
        refresh = PriceRefresh(generations, Peers(peers), source.read)
        nursery.start_soon(refresh.run)
        refresh.apply(generations.config.price_table)
        all_generations.append(generations)
        refreshes.append(refresh)
        await trio.sleep(100)
    for source in sources:
        source.rate = 2
    refreshes[1].apply(all_generations[1].config.price_table)
    await trio.sleep(5)
    assert [rate_of(each) for each in all_generations] == [2, 2, 2]
    read = [len(source.read_at) for source in sources]
    for number, source in enumerate(sources):
        source.rate = 10 + number
    refreshes[0].apply(all_generations[0].config.price_table)
    await trio.sleep(RETRY_S - 10)
    assert all(len(source.read_at) - before <= 2 for source, before in zip(sources, read, strict=True))


async def test_a_defect_does_not_end_it(
    no_threads: None, autojump_clock: MockClock, nursery: trio.Nursery, logs: Logs
) -> None:
    """It is logged with its traceback, and the data is read again after a minute."""
    source, generations = Source(1), generations_of(config(**SECTION))
    source.error = RuntimeError("a defect")
    refresh = PriceRefresh(generations, Peers([]), source.read)
    nursery.start_soon(refresh.run)
    refresh.apply(generations.config.price_table)
    await trio.sleep(1)
    logs.expect_error("prices_refresh_crashed")
    source.error = None
    await trio.sleep(RETRY_S)
    assert rate_of(generations) == 1
