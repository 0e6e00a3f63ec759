"""Classifies IP addresses: which ones are public, and what the others are. Pure.

The list of non-public networks is kept here. The properties of `ipaddress` are not used, since they have changed from
one release of Python to the next.

**Source:** IANA's registries of special-purpose addresses for IPv4 and IPv6 (RFC 6890 and its amendments), and of the
IPv6 address space. IPv6 addresses that embed an IPv4 address: RFC 4291 (IPv4-mapped), RFC 3056 (6to4), RFC 6052
(NAT64).
"""

from __future__ import annotations

import ipaddress

_NOT_PUBLIC_4 = {
    ipaddress.IPv4Network(network): kind
    for network, kind in {
        "0.0.0.0/8": "unspecified",
        "10.0.0.0/8": "private",
        "100.64.0.0/10": "shared by a carrier's customers",
        "127.0.0.0/8": "loopback",
        "169.254.0.0/16": "link-local",
        "172.16.0.0/12": "private",
        "192.0.0.0/24": "reserved",
        "192.0.2.0/24": "for documentation",
        "192.88.99.0/24": "reserved",
        "192.168.0.0/16": "private",
        "198.18.0.0/15": "for benchmarks",
        "198.51.100.0/24": "for documentation",
        "203.0.113.0/24": "for documentation",
        "224.0.0.0/4": "multicast",
        "240.0.0.0/4": "reserved",
        # Azure: in a public range, but each virtual machine reaches its own host there
        "168.63.129.16/32": "of a cloud's host",
    }.items()
}
_NOT_PUBLIC_6 = {
    ipaddress.IPv6Network(network): kind
    for network, kind in {
        "::/128": "unspecified",
        "::1/128": "loopback",
        "fc00::/7": "private",
        "fe80::/10": "link-local",
        "fec0::/10": "private",
        "ff00::/8": "multicast",
        # within the public range
        "2001::/23": "reserved",  # includes Teredo
        "2001:db8::/32": "for documentation",
        "3fff::/20": "for documentation",
    }.items()
}
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")
"""The only range from which IANA has assigned unicast networks so far."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def why_not_public(address: str) -> str | None:
    """Returns the kind of a non-public address; None for a public one.

    An IPv6 address that embeds an IPv4 address is classified by the embedded address.

    >>> [why_not_public(address) for address in ("127.0.0.1", "::ffff:169.254.169.254", "fd00:ec2::254", "1.1.1.1")]
    ['loopback', 'link-local', 'private', None]

    Raises:
        ValueError: The text is not an IP address.
    """
    parsed = ipaddress.ip_address(address.partition("%")[0])  # the interface of a link-local address follows "%"
    if isinstance(parsed, ipaddress.IPv4Address):
        return _kind_4(parsed)
    embedded = _embedded_ipv4(parsed)
    if embedded is not None:
        return _kind_4(embedded)
    for network, kind in _NOT_PUBLIC_6.items():
        if parsed in network:
            return kind
    return None if parsed in _PUBLIC_6 else "reserved"


def _kind_4(address: ipaddress.IPv4Address) -> str | None:
    return next((kind for network, kind in _NOT_PUBLIC_4.items() if address in network), None)


def _embedded_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour
