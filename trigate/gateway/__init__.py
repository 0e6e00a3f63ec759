"""The composition root: opens every service and gives each what it uses.

It uses every service, and must not use HTTP servers or the command line. Read `gateway` first. `reload` replaces the
configuration in use, and `drain` is the server's control of the shutdown.
"""

from trigate.gateway.gateway import Gateway, open_gateway

__all__ = ["Gateway", "open_gateway"]
