"""The addresses of services that have one in each region. Pure."""

from __future__ import annotations


def base_url_of(region: str) -> str:
    """Returns the address of Bedrock in a region of AWS.

    >>> base_url_of("eu-central-1"), base_url_of("cn-north-1")
    ('https://bedrock-runtime.eu-central-1.amazonaws.com', 'https://bedrock-runtime.cn-north-1.amazonaws.com.cn')
    """
    return f"https://bedrock-runtime.{region}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}"
