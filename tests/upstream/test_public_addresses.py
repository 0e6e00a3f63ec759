"""Which addresses are public: one of each class, and the bounds of the ranges."""

from __future__ import annotations

import pytest

from trigate.upstream.public_addresses import why_not_public

NOT_PUBLIC = {
    "unspecified": ("0.0.0.0", "0.255.255.255", "::", "::ffff:0.0.0.0"),
    "loopback": ("127.0.0.1", "127.255.255.255", "::1", "::ffff:127.0.0.1", "2002:7f00:1::", "64:ff9b::127.0.0.1"),
    "private": (
        *("10.0.0.0", "10.255.255.255", "172.16.0.0", "172.31.255.255", "192.168.0.0", "192.168.255.255"),
        *("fc00::", "fd00:ec2::254", "fdff:ffff::1", "fec0::1", "::ffff:10.1.2.3", "2002:c0a8:101::1"),
    ),
    "link-local": (
        *("169.254.0.0", "169.254.169.254", "169.254.255.255", "fe80::1", "fe80::1%eth0", "febf::1"),
        *("::ffff:169.254.169.254", "2002:a9fe:a9fe::1", "64:ff9b::a9fe:a9fe"),
    ),
    "shared by a carrier's customers": ("100.64.0.0", "100.100.100.200", "100.127.255.255", "::ffff:100.64.0.1"),
    "multicast": ("224.0.0.1", "239.255.255.255", "ff02::1"),
    "reserved": (
        *("192.0.0.192", "192.88.99.1", "240.0.0.1", "255.255.255.255"),
        *("::127.0.0.1", "64:ff9b:1::1", "100::1", "2001::1", "4000::1"),
    ),
    "for documentation": ("192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"),
    "for benchmarks": ("198.18.0.1", "198.19.255.255"),
    "of a cloud's host": ("168.63.129.16",),
}
PUBLIC = (
    *("1.0.0.0", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0"),
    *("169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0", "192.167.255.255", "192.169.0.0"),
    *("168.63.129.15", "223.255.255.255", "2000::1", "2001:200::1", "2606:4700:4700::1111", "3ffe::1"),
    *("::ffff:1.1.1.1", "64:ff9b::1.1.1.1", "2002:101:101::1"),
)


@pytest.mark.parametrize(("kind", "address"), [(kind, each) for kind, all_ in NOT_PUBLIC.items() for each in all_])
def test_what_is_not_public(kind: str, address: str) -> None:
    """Each special range is refused from its first to its last address, in every notation."""
    assert why_not_public(address) == kind


@pytest.mark.parametrize("address", PUBLIC)
def test_what_is_public(address: str) -> None:
    """The addresses beside those ranges are public."""
    assert why_not_public(address) is None


@pytest.mark.parametrize("text", ["", "localhost", "127.1", "0x7f000001", "1.2.3.4.5"])
def test_what_is_no_address(text: str) -> None:
    """Anything but an IP address is an error: a name has to be resolved first."""
    with pytest.raises(ValueError, match="does not appear to be"):
        why_not_public(text)
