"""Signatures: AWS's own test vectors, and what a signature covers."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

import pytest

from trigate.upstream.auth.sigv4 import Keys, signed_headers

NOW = datetime(2015, 8, 30, 12, 36, tzinfo=UTC)
SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
TOKEN = "6e86291e8372ff2a2260956d9b8aae1d763fbf315fa00fa31553b73ebf194267"
LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
HOST = {"host": "example.amazonaws.com"}
EMPTY = hashlib.sha256(b"").hexdigest()
FORM = b"Param1=value1"


# Source: the directory tests/aws-signing-test-suite/v4 of awslabs/aws-c-auth
@pytest.mark.parametrize(
    ("path", "token", "signature"),
    [
        ("/example space/", None, "652487583200325589f1fba4c7e578f72c47cb61beeca81406b39ddec1366741"),
        ("/ሴ", None, "8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85"),
        (f"/-._~{LETTERS}", None, "07ef7494c76fa4850883e2b006601f940f8a34d404d0cfa977f52a65bbf5f24f"),
        (
            "/?Param2=value2&Param1=value1",
            None,
            "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
        ),
        ("/?ሴ=bar", None, "2cdec8eed098649ff3a119c94853b13c643bcf08f8b0a1d91e12c9027818dd04"),
        ("/", TOKEN, "07ec1639c89043aa0e3e2de82b96708f198cceab042d4a97044c66dd9f74e7f8"),
    ],
)
def test_a_vector_without_a_body(path: str, token: str | None, signature: str) -> None:
    """The signature is the published one."""
    found = signed_headers(
        Keys("AKIDEXAMPLE", SECRET, token),
        method="GET",
        path=path,
        headers=HOST,
        body_hash=EMPTY,
        region="us-east-1",
        service="service",
        now=NOW,
    )
    names = "host;x-amz-date" + (";x-amz-security-token" if token else "")
    assert found["x-amz-date"] == "20150830T123600Z"
    assert found.get("x-amz-security-token") == token
    assert found["authorization"] == (
        "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, "
        f"SignedHeaders={names}, Signature={signature}"
    )


def test_a_vector_with_a_body() -> None:
    """The body counts by its hash, and further fields are signed if they are given."""
    body_hash = hashlib.sha256(FORM).hexdigest()
    found = signed_headers(
        Keys("AKIDEXAMPLE", SECRET),
        method="POST",
        path="/",
        headers={
            **HOST,
            "content-length": str(len(FORM)),
            "content-type": "application/x-www-form-urlencoded",
            "x-amz-content-sha256": body_hash,
        },
        body_hash=body_hash,
        region="us-east-1",
        service="service",
        now=NOW,
    )
    assert found["authorization"].endswith("d3875051da38690788ef43de4db0d8f280229d82040bfac253562e56c3f20e0b")


def test_the_secret_stays_here() -> None:
    """No header and no representation has the secret key."""
    keys = Keys("AKIDEXAMPLE", SECRET, TOKEN)
    found = signed_headers(
        keys, method="GET", path="/", headers=HOST, body_hash=EMPTY, region="r", service="s", now=NOW
    )
    assert SECRET not in repr(keys) + repr(found)
    assert TOKEN not in repr(keys)
