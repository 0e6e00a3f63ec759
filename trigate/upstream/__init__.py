"""One provider: its slots, connections, requests and replies; and the generation of all that one configuration names.

Read `upstream` first: `Upstream.open` is the only way to a reply. Below it, `reply` decodes, `pool` keeps connections
and exchanges a request on one, `response_parser` parses, `connect` opens sockets; `transport` gives the pool `httpx2`'s
interface. Beside it, `generation` opens all upstreams, with transports from `factory`, and `model_list` keeps their
models up to date; `auth` proves to providers who sends a request; `discovery` makes a configuration where there is
none; `echo` and `local_model` are embedded upstreams.

This package must not know of exchanges, clients, sessions or the gateway.

Checkpoints: a function of this package is none where the kernel took the bytes at once, a slot was free, or the answer
had been received already, since a checkpoint for each piece would cost more than the rest. Every wait for bytes of a
socket is one, which bounds this: a reader gets at most one received piece between two of them. A compressed piece is
inflated in steps of at most 1 MiB, whose number the reader's size limit bounds, or the client that they are sent to.
"""
