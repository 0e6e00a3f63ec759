"""Where problems of a configuration are: the line and the column."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trigate.config.load import read
from trigate.config.positions import positions
from trigate.config.sections import ConfigError

DOCUMENT = '''# [not.a.header]
top = 1
[server]
host = "a # no comment = \\" "   # one
text = """
fake = 1
"""
raw = \'\'\'[x]\'\'\'
[models."a.b"] # a header with a quoted key
targets = [ "up/x", # the first
    "up/y" ]
info = { a = 1, "b c" = { d = [1, 2] } }
when = 2026-12-31T00:00:00Z
x . y = true
[[list]]
a = 1
[[list]]
b = 2
[list.c]
'''


def _paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:  # Any: TOML
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _paths(each, (*path, str(key)))


def test_positions() -> None:
    """Every key and element has one, whatever stands in texts and comments."""
    found = positions(DOCUMENT)
    assert set(found) == set(_paths(tomllib.loads(DOCUMENT)))
    assert found["server",] == (3, 1)
    assert found["server", "raw"] == (8, 1)
    assert found["models", "a.b", "targets", "1"] == (11, 5)
    assert found["models", "a.b", "info", "b c", "d", "1"] == (12, 35)
    assert found["models", "a.b", "x", "y"] == (14, 1)
    assert (found["list", "0"], found["list", "1"], found["list", "1", "c"]) == ((15, 1), (17, 1), (19, 1))


@given(st.text(alphabet="[]{}=.,#\"'\\ \nab1", max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_ends(text: str) -> None:
    """Any text is read to its end, without an error; one that is TOML has the position of every key."""
    found = positions(text)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    assert set(_paths(document)) <= set(found)


def _lines(directory: Path, text: str) -> list[str]:
    path = directory / "t.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read(path, env={})
    return [line.removeprefix(f"{directory}/") for line in caught.value.lines]


def test_problems_have_places(tmp_path: Path) -> None:
    """Each problem of a file begins with the file, the line and the column, and suggests the nearest name."""
    lines = _lines(
        tmp_path,
        """[server]
port = "x"
hots = "a"
[upstreams.qwen]
base_url = "http://a.example/v1"
modles = ["x"]
  kind = "opanai"
[models]
default = { targets = ["qwen/x",
  "qwin/y"] }
"a.b" = {}
[upstraems.x]
""",
    )
    assert [line.partition(": ")[0] for line in lines] == [
        "t.toml:12:1",
        "t.toml:2:1",
        "t.toml:3:1",
        "t.toml:7:3",
        "t.toml:6:1",
        "t.toml:10:3",
        "t.toml:11:1",
    ]
    for line, meant in zip(lines, ["upstreams", None, "host", "openai", "models", "qwen", None], strict=True):
        assert meant is None or line.endswith(f"; did you mean {meant}?"), line


def test_what_is_not_toml_has_a_place(tmp_path: Path) -> None:
    """So has a mistake in the file's syntax."""
    [line] = _lines(tmp_path, "[server]\nport = = 1\n")
    assert line.startswith("t.toml:2:8: is not TOML: ")


def test_a_missing_file_has_none(tmp_path: Path) -> None:
    """A file that cannot be read has no place."""
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "none.toml", env={})
    assert caught.value.lines == [f"{tmp_path}/none.toml: cannot be read: No such file or directory"]
