"""The composition root: opens every service and gives each what it uses.

It knows every service, and must not know HTTP servers or the command line. Read `gateway` first; `reload` replaces the
configuration in use, and `drain` is how a server ends the gateway's work.
"""

from trigate.gateway.gateway import Gateway, open_gateway

__all__ = ["Gateway", "open_gateway"]
