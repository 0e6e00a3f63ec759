"""The configuration: one frozen value, read from TOML and the environment, with every problem reported at once. Pure.

The package knows no server and no upstream. Read first `sections` (what can be configured), then `structure` (from a
parsed document to a `Config`). `converter` and `checks` validate values, `secrets` and `reveal` look secrets up, and
`load` reads the file.

**Units:** they are in the names: ``_s`` seconds, ``_bytes`` bytes, ``_tokens`` tokens, ``_per_s`` per second.
"""
