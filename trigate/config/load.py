"""Locates and reads the configuration file."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

from trigate.config.sections import Config, ConfigError
from trigate.config.structure import structure


def read(path: str | os.PathLike[str], *, env: Mapping[str, str]) -> Config:
    """Reads a TOML file.

    Raises:
        ConfigError: The file cannot be read, is not TOML, has problems, or names no upstream.
    """
    source = os.fspath(path)
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except OSError as error:
        raise ConfigError(source, (f"cannot be read: {error.strerror or error}",)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(source, (f"is not UTF-8: {error}",)) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(source, (f"is not TOML: {error}",)) from None
    except RecursionError:
        raise ConfigError(source, ("is nested too deeply",)) from None
    config = structure(data, env=env, source=source)
    if not config.upstreams:
        raise ConfigError(
            source,
            (
                "upstreams: there are none. Add [upstreams.NAME] with its base_url, or remove the file: then Trigate "
                "uses the providers and model servers that it finds",
            ),
        )
    return config


def locate(env: Mapping[str, str]) -> Path | None:
    """Finds the configuration file: ``TRIGATE_CONFIG``, else ``./trigate.toml``, else none (which means discovery)."""
    if env.get("TRIGATE_CONFIG"):
        return Path(env["TRIGATE_CONFIG"])
    here = Path("trigate.toml")
    return here if here.exists() else None
