"""Transports and the certificate authorities that they trust."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx2
import pytest
import trustme

from trigate.config import structure as configuration
from trigate.config.sections import ConfigError, UpstreamConfig
from trigate.upstream.factory import TrustStore, http_transport
from trigate.upstream.generation import open_generation


def _config(base_url: str) -> UpstreamConfig:
    table = {"upstreams": {"u": {"base_url": base_url, "models": ["m"]}}}
    return configuration.structure(table, env={}, source="test").upstreams["u"]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[ssl.SSLContext]:
    """Every TLS context that is loaded during the test."""
    loaded: list[ssl.SSLContext] = []

    def load() -> ssl.SSLContext:
        loaded.append(ssl.create_default_context())
        return loaded[-1]

    monkeypatch.setattr(httpx2, "create_ssl_context", load)
    return loaded


def test_trust_is_loaded_once_and_when_needed(loads: list[ssl.SSLContext]) -> None:
    """Only a transport that needs TLS loads the authorities, and transports with one store load them once."""
    trust = TrustStore()
    http_transport("a", _config("http://127.0.0.1:1/v1"), trust=trust)
    assert (loads, repr(trust)) == ([], "<TrustStore>")
    for name in ("b", "c"):
        http_transport(name, _config("https://127.0.0.1:1/v1"), trust=trust)
    assert loads == [trust.context()]
    assert repr(trust) == "<TrustStore loaded>"


async def test_each_generation_reads_the_authorities_again(loads: list[ssl.SSLContext]) -> None:
    """A reload opens another generation, and with it the authorities are read again."""
    table = {"upstreams": {"u": {"base_url": "https://127.0.0.1:1/v1", "models": ["m"]}}}
    config = configuration.structure(table, env={}, source="test")
    async with open_generation(config) as first, open_generation(config) as second:
        assert [first.trust.context(), second.trust.context()] == loads
    assert len(loads) == 2


def test_authorities_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreadable bundle is an error of the configuration, and is tried again at the next call."""
    bundle = tmp_path / "authorities.pem"
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    trust = TrustStore()
    with pytest.raises(ConfigError, match="SSL_CERT_FILE: cannot be used: No such file"):
        http_transport("u", _config("https://127.0.0.1:1/v1"), trust=trust)
    trustme.CA().cert_pem.write_to_path(str(bundle))
    assert len(trust.context().get_ca_certs()) == 1
