"""The keys of the gateway: those of the configuration and those that are made at run time, and what each may do.

Knows nothing of: HTTP, calls. Read `keys.key` first, then `keys.service`.
"""
