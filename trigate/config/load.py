"""Locates and reads the configuration file."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from trigate.config.sections import Config, ConfigError
from trigate.config.structure import structure

_PLACE = re.compile(r"\(at line (\d+), column (\d+)\)")
"""In a message of `tomllib`."""


def read(path: str | os.PathLike[str], *, env: Mapping[str, str]) -> Config:
    """Reads a TOML file.

    Raises:
        ConfigError: The file cannot be read, is not TOML, has problems, or names no upstream.
    """
    source = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors write a byte order mark
        data = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(source, (f"cannot be read: {error.strerror or error}",)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(source, (f"is not UTF-8: {error}",)) from None
    except tomllib.TOMLDecodeError as error:
        place = _PLACE.search(str(error))
        at = (int(place[1]), int(place[2])) if place is not None else None
        raise ConfigError(source, (f"is not TOML: {error}",), places=(at,)) from None
    except RecursionError:
        raise ConfigError(source, ("is nested too deeply",)) from None
    try:
        config = structure(data, env=env, source=source)
    except ConfigError as error:
        from trigate.config.positions import place_of, positions  # only for a file with problems

        found = positions(text)
        places = tuple(place_of(problem, found) for problem in error.problems)
        raise ConfigError(source, error.problems, places=places) from None
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
