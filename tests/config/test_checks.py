"""`trigate.config.checks`: the grammar of hosts and origins, which keeps foreign pages out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trigate.config.checks import host_of, host_of_origin, is_loopback

NOT_A_HOST = [
    "127.0.0.1%2eevil.example",
    "127.0.0.1%25.evil.example",
    "127.0.0.1%evil.example",
    "localhost%00.evil.example",
    "evil.example\\@localhost",
    "evil.example@localhost",
    "localhost@evil.example",
    "localhost:80@evil.example",
    "localhost/evil.example",
    "localhost\\evil.example",
    "localhost?evil.example",
    "localhost#evil.example",
    "localhost,evil.example",
    "localhost evil.example",
    "localhost:80:80",
    "localhost:65536",
    "localhost:8a",
    "localhost:-1",
    "localhost:+1",
    "localhost:\uff11",
    "localhost.evil.example\x00",
    "localhost\t",
    " localhost",
    "loc\u0430lhost",
    "lo\u017fcalhost",
    "[::1",
    "::1",
    "[::1%25lo]",
    "[::1%lo]",
    "[127.0.0.1]",
    "[::1]evil.example",
    "evil.example[::1]",
    "[v1.a]",
    "..localhost",
    ".localhost",
    "-a.localhost",
    "a-.localhost",
    "a..localhost",
    "localhost..",
    "a" * 64 + ".localhost",
    "a." * 130 + "localhost",
    "",
    ":80",
    "*",
]
NOT_A_LOOPBACK = [
    *("127.0.0.1.evil.example", "localhost.evil.example", "evil.example", "127.1", "2130706433", "0x7f.0.0.1"),
    *("0177.0.0.1", "0.0.0.0", "[::]", "[::ffff:10.0.0.1]", "127.0.0.256", "xlocalhost"),
]
LOOPBACK = [
    *(
        "localhost",
        "LOCALHOST:18888",
        "localhost.",
        "localhost:",
        "app.localhost:3000",
        "127.0.0.1",
        "127.9.9.9:1",
        "127.0.0.1.",
    ),
    *("[::1]", "[::1]:18888", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]:80", "my_app.localhost"),
]


@pytest.mark.parametrize("text", NOT_A_HOST)
def test_what_is_not_a_host(text: str) -> None:
    """It has none, neither as a ``Host`` nor in an ``Origin``."""
    assert host_of(text) is None
    assert host_of_origin(f"http://{text}") is None


@pytest.mark.parametrize("text", NOT_A_LOOPBACK)
def test_hosts_of_elsewhere(text: str) -> None:
    """They are hosts, and not this machine."""
    host = host_of(text)
    assert host is not None
    assert not is_loopback(host)


@pytest.mark.parametrize("text", LOOPBACK)
def test_this_machine(text: str) -> None:
    """Its names and addresses in all spellings that browsers send."""
    host = host_of(text)
    assert host is not None
    assert is_loopback(host)
    assert host_of_origin(f"http://{text}") == host


@pytest.mark.parametrize(
    "text",
    [
        *("null", "", "localhost", "//localhost", "http:localhost", "http:/localhost", "http:///localhost"),
        *("http://localhost/", "http://localhost?", "http://localhost http://localhost", "ht tp://localhost"),
        *("1http://localhost", "http\x00://localhost", "http://localhost://evil.example", "javascript:localhost"),
    ],
)
def test_what_is_not_an_origin(text: str) -> None:
    """It has no host."""
    assert host_of_origin(text) is None


@pytest.mark.parametrize(
    "text",
    ["app://obsidian.md", "chrome-extension://abcdefghijklmnop", "vscode-webview://0123abcd", "https://a.example:8443"],
)
def test_origins_of_applications(text: str) -> None:
    """Embedded browsers have schemes of their own."""
    assert host_of_origin(text) == text.partition("://")[2].removesuffix(":8443")


@given(st.text() | st.text("loca.hst127:[]%@/\\", max_size=12))
def test_any_text_is_judged(text: str) -> None:
    """A host is in lower case, without what separates it from a port, and is its own host."""
    host = host_of(text)
    if host is not None:
        assert host == host.lower()
        assert not set(host) & set("[]%@/\\ ")
        assert host_of(f"[{host}]" if ":" in host else host) == host
