"""The configuration: one frozen tree of sections, read from TOML and the environment."""
