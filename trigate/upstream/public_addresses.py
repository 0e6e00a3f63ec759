"""Which addresses of the internet protocol are public, and what the others are. Pure.

What is not public is a list of its own here, and not `ipaddress`'s properties: those have changed from one release of
Python to the next.

**Source:** IANA's registries of special-purpose addresses for IPv4 and IPv6 (RFC 6890 and what it was amended by), and
of IPv6 address space. Addresses in which another one is written: RFC 4291 (IPv4-mapped), RFC 3056 (6to4), RFC 6052
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
        # Azure: of a public range, and yet the host's own, from every virtual machine
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
        # within what is public
        "2001::/23": "reserved",  # also Teredo
        "2001:db8::/32": "for documentation",
        "3fff::/20": "for documentation",
    }.items()
}
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")
"""All that is given to networks so far."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def why_not_public(address: str) -> str | None:
    """What an address is that is not public; None if it is.

    An IPv6 address in which an IPv4 address is written is what that one is.

    >>> [why_not_public(address) for address in ("127.0.0.1", "::ffff:169.254.169.254", "fd00:ec2::254", "1.1.1.1")]
    ['loopback', 'link-local', 'private', None]

    Raises:
        ValueError: It is none.
    """
    parsed = ipaddress.ip_address(address.partition("%")[0])  # behind it, the interface of a link-local one
    if isinstance(parsed, ipaddress.IPv4Address):
        return _kind_4(parsed)
    inner = _written_in(parsed)
    if inner is not None:
        return _kind_4(inner)
    for network, kind in _NOT_PUBLIC_6.items():
        if parsed in network:
            return kind
    return None if parsed in _PUBLIC_6 else "reserved"


def _kind_4(address: ipaddress.IPv4Address) -> str | None:
    return next((kind for network, kind in _NOT_PUBLIC_4.items() if address in network), None)


def _written_in(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour
