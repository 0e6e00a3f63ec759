"""The log of contents: off, by key, redacted, bounded."""

from __future__ import annotations

import glob
import json
import os
import stat
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.support.asgi_client import chat
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.logs import Logs
from tests.support.provider import Provider, Say, answers, content, says
from trigate.config.report_sections import ContentLogConfig
from trigate.config.sections import ConfigError
from trigate.config.values import Size
from trigate.keys.key import ANYBODY
from trigate.ledger.content_log import ContentLog, open_content_log
from trigate.store.records import ExchangeRecord


def lines(directory: Path) -> list[dict[str, Any]]:
    """The entries of all files, the oldest first."""
    return [
        json.loads(line)
        for path in sorted(directory.glob("content-*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


async def written(directory: Path, count: int) -> list[dict[str, Any]]:
    """The entries, once there are as many."""
    with trio.fail_after(5):
        while len(lines(directory)) < count:  # noqa: ASYNC110 - the writer tells nobody
            await trio.sleep(0.01)
    return lines(directory)


async def _call(served: Served, key: str = "", **more: Any) -> None:
    headers = {"authorization": f"Bearer key-of-{key}"} if key else {}
    await served.client.start("POST", "/v1/chat/completions", chat(**more), headers=headers).wait()


async def test_contents_of_keys_that_want_it(open_app: OpenApp, tmp_path: Path) -> None:
    """The request and the answer, of the keys that are logged only; a secret that is spread over events is redacted."""
    config = make_config(
        keys={"ada": {"secret": "key-of-ada", "content_log": True}, "ben": "key-of-ben"},
        content_log={"directory": str(tmp_path / "log"), "redact": ["sk-[a-z]+"]},
    )
    provider = Provider(says("my sk-", "abc", " ok"), says("b"), answers(b'{"error":{"message":"sk-x"}}', status=400))
    async with open_app(config, provider) as served:
        await _call(served, "ada", messages=[{"role": "user", "content": "is sk-secret known?"}])
        await _call(served, "ben")
        await _call(served, "ada")
        good, bad = await written(tmp_path / "log", 2)
    assert good["request"]["messages"] == [{"role": "user", "content": "is [redacted] known?"}]
    assert good["answer"] == {"content": "my [redacted] ok"}
    assert (good["key"], good["outcome"], good["target"]) == ("ada", "complete", "up/m")
    assert (bad["answer"], bad["outcome"], bad["status"]) == (None, "upstream_rejected", 400)
    [path] = (tmp_path / "log").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_a_gateway_without_keys(open_app: OpenApp, tmp_path: Path) -> None:
    """All calls are logged, those that are cut as well; also JSON answers."""
    answer = b'{"choices":[{"message":{"role":"assistant","content":"hi"},"finish_reason":"stop"}]}'
    provider = Provider(answers(answer), (Say(content("a")),))
    async with open_app(make_config(content_log={"directory": str(tmp_path)}), provider) as served:
        await _call(served, stream=False)
        await _call(served)
        whole, cut = await written(tmp_path, 2)
    assert whole["answer"]["choices"][0]["message"]["content"] == "hi"
    assert (cut["answer"]["content"], cut["outcome"]) == ("a", "upstream_truncated")


async def test_it_is_off(open_app: OpenApp, autojump_clock: MockClock) -> None:
    """By default, nothing is noted."""
    async with open_app(make_config(), Provider(says("a"))) as served:
        await _call(served)
        [exchange] = served.settled
        assert exchange.content is None


def _record(number: int) -> ExchangeRecord:
    return ExchangeRecord(
        id=f"ex_{number}", request_id="r", owner="", worker="w", endpoint="/e", model="m", stream=True, started_at=1.0
    )


def _add(contents: ContentLog, number: int, request: bytes) -> None:
    answer = contents.answer_for(ANYBODY)
    assert answer is not None
    contents.add(_record(number), request, answer)


async def test_bounds(tmp_path: Path) -> None:
    """Of a long request, the beginning is kept; the oldest files are deleted, by size and by age."""
    settings = ContentLogConfig(directory=str(tmp_path), entry_bytes=Size(20), max_bytes=Size(3000))
    async with open_content_log() as contents:
        contents.apply(settings)
        for number in range(40):
            _add(contents, number, b'{"text":"%s"}' % (b"x" * 500))
            while contents._waiting:  # noqa: ASYNC110 - the writer tells nobody
                await trio.sleep(0.0005)
    entries = lines(tmp_path)
    assert entries[-1]["request"] == {"beginning": '{"text":"xxxxxxxxxxx', "bytes": 511}
    assert entries[-1]["id"] == "ex_39"
    files = glob.glob(f"{tmp_path}/*")
    assert sum(map(os.path.getsize, files)) < 4000
    for path in files:
        os.utime(path, (1.0, 1.0))
    async with open_content_log() as contents:
        contents.apply(attrs.evolve(settings, max_bytes=Size(100_000)))
        _add(contents, 50, b"{}")
    assert [entry["id"] for entry in lines(tmp_path)] == ["ex_50"]


async def test_a_directory_that_cannot_be_used(tmp_path: Path, logs: Logs) -> None:
    """Entries are dropped, and the log says so."""
    logs.expect_error("contents_dropped")
    (tmp_path / "file").write_text("")
    async with open_content_log() as contents:
        contents.apply(ContentLogConfig(directory=str(tmp_path / "file")))
        _add(contents, 1, b"{}")
    [event] = logs.named("contents_dropped")
    assert event["count"] == 1


def test_a_pattern_that_is_none() -> None:
    """The configuration is refused."""
    with pytest.raises(ConfigError, match=r"content_log\.redact: '\(' is no regular expression"):
        make_config(content_log={"directory": "x", "redact": ["("]})
