"""Upstreams of kind ``vertex`` with the credentials of Google's own library, and a scripted token endpoint."""

from __future__ import annotations

import base64
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.dialects.gemini import chunk, decoded, parts_of
from tests.support.gateway import OpenApp, Served, make_config
from tests.support.provider import Provider, Say, answers
from trigate.upstream.auth import CredentialsError, google_adc

pytestmark = pytest.mark.slow

USAGE = {"promptTokenCount": 9, "candidatesTokenCount": 2, "totalTokenCount": 11}
SCRIPT = (Say(chunk({"text": "Hi"}, finish="STOP", usageMetadata=USAGE)),)
PLACE = "/v1/projects/p/locations/europe-west4/publishers/google"
PRIVATE = rsa.generate_private_key(public_exponent=65537, key_size=2048)


class TokenServer(HTTPServer):
    """The token endpoint. It checks each assertion, and numbers its tokens."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/token"
        self.tokens = 0
        self.refuses = False


class _Handler(BaseHTTPRequestHandler):
    server: TokenServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
        signed, _, signature = form["assertion"][0].rpartition(".")
        PRIVATE.public_key().verify(_unpadded(signature), signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        claims = json.loads(_unpadded(signed.partition(".")[2]))
        assert claims["scope"] == "https://www.googleapis.com/auth/cloud-platform"
        assert claims["iss"] == "gateway@p.iam.gserviceaccount.com"
        self.server.tokens += 1
        body: dict[str, Any] = {"access_token": f"token-{self.server.tokens}-of-google", "expires_in": 3600}
        if self.server.refuses:
            body = {"error": "invalid_grant", "error_description": "Invalid JWT Signature."}
        data = json.dumps(body).encode()
        self.send_response(400 if self.server.refuses else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _unpadded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


@pytest.fixture
def token_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TokenServer]:
    """A token endpoint, and a service account whose tokens it gives."""
    pytest.importorskip("google.auth", reason="the library of requirements-test.lock is not installed")
    with TokenServer() as server:
        account = {
            "type": "service_account",
            "project_id": "p",
            "private_key_id": "k",
            "client_email": "gateway@p.iam.gserviceaccount.com",
            "token_uri": server.url,
            "private_key": PRIVATE.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ).decode(),
        }
        path = tmp_path / "account.json"
        path.write_text(json.dumps(account), encoding="utf-8")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def vertex(**fields: Any) -> Any:  # Any: a Config
    """A configuration with one upstream."""
    own = {"kind": "vertex", "project": "p", "location": "europe-west4", "models": ["gemini-3-flash"], **fields}
    return make_config({"up": {name: value for name, value in own.items() if value is not None}})


async def ask(served: Served) -> Any:  # Any: a ClientCall
    """Makes a streamed call in Gemini's format."""
    body = {"contents": [{"parts": [{"text": "Hi"}]}]}
    path = "/v1beta/models/up/gemini-3-flash:streamGenerateContent?alt=sse"
    return await served.client.start("POST", path, body).wait()


async def test_a_service_account(open_app: OpenApp, token_server: TokenServer) -> None:
    """Calls have a token, which is fetched once, and again after it was refused; no message shows it."""
    async with open_app(vertex(), Provider(SCRIPT)) as served:
        for _ in range(2):
            call = await ask(served)
            assert parts_of(decoded(call.body)) == [{"text": "Hi"}]
        provider = served.providers["up"]
        for sent in provider.calls:
            assert sent.target == f"{PLACE}/models/gemini-3-flash:streamGenerateContent?alt=sse"
            assert sent.headers["host"] == "europe-west4-aiplatform.googleapis.com"
            assert sent.headers["authorization"] == "Bearer token-1-of-google"
            assert "x-goog-api-key" not in sent.headers
        assert token_server.tokens == 1
        told = {"error": {"code": 401, "message": "not token-1-of-google", "status": "UNAUTHENTICATED"}}
        provider.play(answers(msgspec.json.encode(told), status=401))
        call = await ask(served)
        assert (call.status, call.error["message"]) == (401, "not [redacted]")
        assert served.settled[0].usage[:2] == (9, 2)


async def test_a_service_account_that_is_refused(open_app: OpenApp, token_server: TokenServer) -> None:
    """The error says why, and nothing is sent to the upstream."""
    token_server.refuses = True
    async with open_app(vertex(), Provider(SCRIPT)) as served:
        call = await ask(served)
        assert (call.status, call.error["status"]) == (503, "UNAVAILABLE")
        assert "invalid_grant" in call.error["message"]
        assert not served.providers["up"].calls


async def test_a_key(open_app: OpenApp) -> None:
    """In express mode, the key tells the project."""
    config = vertex(api_key="secret-of-google", project=None, location=None)
    async with open_app(config, Provider(SCRIPT)) as served:
        await ask(served)
        [sent] = served.providers["up"].calls
        assert sent.target.startswith("/v1/publishers/google/models/gemini-3-flash:")
        assert (sent.headers["host"], sent.headers["x-goog-api-key"]) == (
            "aiplatform.googleapis.com",
            "secret-of-google",
        )


async def test_without_the_library(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install, and nothing is sent."""
    monkeypatch.setitem(sys.modules, "google.auth", None)
    with pytest.raises(CredentialsError, match=r"install trigate\[vertex\]"):
        google_adc.fetch_token()
    async with open_app(vertex(), Provider(SCRIPT)) as served:
        call = await ask(served)
        assert call.status == 503
        assert "install trigate[vertex]" in call.error["message"]
        assert not served.providers["up"].calls
