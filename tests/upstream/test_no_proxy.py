"""NO_PROXY means what it means to curl and to Go."""

from __future__ import annotations

import pytest

from trigate.config import structure as configuration
from trigate.upstream.factory import http_transport
from trigate.upstream.no_proxy import is_exempt
from trigate.upstream.transport import SocketTransport


@pytest.mark.parametrize(
    ("no_proxy", "exempt", "others"),
    [
        ("", [], ["a.example"]),
        ("*", ["a.example", "10.0.0.1", "::1"], []),
        ("b.example, *", ["a.example"], []),
        ("example.com", ["example.com", "EXAMPLE.com", "example.com.", "a.b.example.com"], ["notexample.com", "com"]),
        ("Example.COM.", ["example.com", "a.example.com"], ["example.com.org"]),
        (".example.com", ["example.com", "a.example.com"], ["notexample.com"]),
        ("*.example.com", ["a.example.com", "a.b.example.com"], ["example.com", "notexample.com"]),
        ("x.example,example.com", ["x.example", "example.com"], ["y.example"]),
        ("x.example example.com\tz.example", ["x.example", "example.com", "z.example"], ["y.example"]),
        (" , ,x.example,, ", ["x.example"], ["", "y.example"]),
        (".", [], ["a.example"]),
        ("10.0.0.1", ["10.0.0.1"], ["10.0.0.10", "110.0.0.1", "a.10.0.0.1.example"]),
        ("10.0.0.0/8", ["10.0.0.1", "10.255.255.255"], ["11.0.0.1", "10.example"]),
        ("10.1.2.3/8", ["10.9.9.9"], ["11.0.0.1"]),
        ("192.168.1.0/30,fd00::/8", ["192.168.1.3", "fd12::1"], ["192.168.1.4", "fe80::1"]),
        ("10.0.0.0/33,10.0.0.0/x,10.0.0.0/", [], ["10.0.0.1"]),
        ("2001:db8::1", ["2001:db8::1", "2001:0db8:0::1"], ["2001:db8::2"]),
        ("[2001:db8::1]", ["2001:db8::1"], ["2001:db8::2"]),
        ("[2001:db8::1]:443", ["2001:db8::1"], []),
        ("[2001:db8::1]:8443", [], ["2001:db8::1"]),
        ("10.0.0.1", ["::ffff:10.0.0.1"], []),
        ("example.com:443", ["example.com", "a.example.com"], ["notexample.com"]),
        ("example.com:8443", [], ["example.com"]),
        ("10.0.0.0/8:443", ["10.0.0.1"], ["11.0.0.1"]),
        ("*:443", ["a.example"], []),
        ("*:80", [], ["a.example"]),
        ("http://example.com", [], ["example.com"]),
    ],
)
def test_each_entry(no_proxy: str, exempt: list[str], others: list[str]) -> None:
    """What each form of an entry exempts at port 443, and what it does not."""
    assert [host for host in [*exempt, *others] if is_exempt(host, 443, no_proxy)] == exempt


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment without any proxy."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("base_url", "is_direct"),
    [
        ("http://10.1.2.3/v1", True),
        ("http://llm.corp.example:8000/v1", True),
        ("http://llm.corp.example:9000/v1", False),
        ("http://[fd00::5]:8000/v1", True),
        ("http://api.example/v1", False),
        ("http://127.0.0.1:8000/v1", True),
    ],
)
def test_the_transport_of_an_upstream(proxies: pytest.MonkeyPatch, base_url: str, is_direct: bool) -> None:
    """An upstream that is exempt, or on this machine, is reached directly, and every other one through the proxy."""
    proxies.setenv("HTTP_PROXY", "http://proxy.example:3128")
    proxies.setenv("NO_PROXY", "10.0.0.0/8,corp.example:8000,fd00::/8")
    table = {"upstreams": {"u": {"base_url": base_url, "models": ["m"]}}}
    upstream = configuration.structure(table, env={}, source="test").upstreams["u"]
    assert isinstance(http_transport("u", upstream), SocketTransport) == is_direct
