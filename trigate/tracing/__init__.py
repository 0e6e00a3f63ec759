"""Traces: which trace a call belongs to, and the export of its spans by OpenTelemetry's protocol (OTLP over HTTP).

`context` reads and writes the headers of W3C Trace Context; it is pure. `tracer` keeps the spans of calls that have
ended, in a bounded queue, until a thread has sent them. `otlp` is the only module that imports OpenTelemetry, and is
imported only if traces are switched on.

The package knows spans, and not what they are of: `exchange.spans` makes those of a call.
"""
