"""Which hosts `NO_PROXY` exempts from the proxy of the environment. Pure.

There is no standard. These are the rules on which curl (from 7.86) and Go (`golang.org/x/net/http/httpproxy`) agree,
and where they differ, the one that exempts more:

* Entries are separated by commas or white space. Letter case and a dot at the end of a name do not matter.
* ``*`` exempts every host.
* ``example.com`` and ``.example.com`` exempt that host and all its subdomains; ``*.example.com`` its subdomains.
* ``10.0.0.1`` and ``::1``, with or without brackets, exempt that address; ``10.0.0.0/8`` and ``fd00::/8`` every address
  in the range. They apply to URLs that have an address: names are not resolved.
* A port after any of them (``example.com:8080``, ``[::1]:8080``) restricts the entry to it.

**Source:** curl's documentation of ``CURLOPT_NOPROXY``; the documentation of `httpproxy.Config`.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import re

_PORT = re.compile(r"(.*):(\d{1,5})", re.DOTALL)


def is_exempt(host: str, port: int, no_proxy: str) -> bool:
    """Whether a value of ``NO_PROXY`` exempts a host.

    Args:
        host: A name or an address, without brackets.
        port: The port of the URL, or that of its scheme.

    >>> [is_exempt(host, 443, "example.com, 10.0.0.0/8") for host in ("a.example.com", "10.1.2.3", "notexample.com")]
    [True, True, False]
    """
    name = host.lower().rstrip(".")
    address = _address(name)
    return any(_matches(entry, name, address, port) for entry in re.split(r"[,\s]+", no_proxy.lower()) if entry)


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _matches(entry: str, name: str, address: _Address | None, port: int) -> bool:
    # The colons of an IPv6 address are not before a port, unless it has brackets.
    if (found := _PORT.fullmatch(entry)) is not None and (":" not in found[1] or found[1].endswith("]")):
        if int(found[2]) != port:
            return False
        entry = found[1]
    if entry == "*":
        return True
    bare = entry.strip("[]").rstrip(".")
    if address is not None:
        try:
            network = ipaddress.ip_network(bare.replace("]", ""), strict=False)
        except ValueError:
            return False
        return address in network
    if "*" in bare:
        return fnmatch.fnmatchcase(name, bare)
    domain = bare.lstrip(".")
    return bool(domain) and (name == domain or name.endswith(f".{domain}"))


def _address(text: str) -> _Address | None:
    """The address that a text is; of an IPv4 address in IPv6, the former. None = it is a name."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
