"""Converts a parsed TOML table to a section. Pure.

Strictness is deliberate: an unknown key is a mistake, a string is not a number, and ``"yes"`` is not a bool. The types
`Seconds`, `Size`, `Count`, `Port`, `Url` and so on choose the check that a value gets (`trigate.config.checks`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn
from cattrs.v import format_exception

from trigate.config import checks
from trigate.config.key_sections import Factor, Instant, KeyConfig, KeySettings, MicroUsd, Tokens
from trigate.config.report_sections import AlertKind
from trigate.config.reveal import parse_secret
from trigate.config.secrets import Secret
from trigate.config.sections import (
    Action,
    ChannelConfig,
    Count,
    Expression,
    HookConfig,
    HostName,
    Limit,
    ModelConfig,
    Origin,
    Port,
    ProxyUrl,
    Rate,
    Reason,
    Seconds,
    Share,
    Size,
    UpstreamConfig,
    Url,
)

_Section = TypeVar("_Section")
_SUBSCRIPT = re.compile(r"""\[['"]?([^'"\]]*)['"]?\]""")


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=True, forbid_extra_keys=True)
    converter.register_structure_hook(str, checks.exactly(str, "a string"))
    converter.register_structure_hook(bool, checks.exactly(bool, "true or false"))
    converter.register_structure_hook(Seconds, checks.not_negative)
    converter.register_structure_hook(Rate, checks.not_negative)
    converter.register_structure_hook(Size, checks.whole(1, 2**40))
    converter.register_structure_hook(Count, checks.whole(1, 10**6))
    converter.register_structure_hook(Limit, checks.whole(0, 10**6))
    converter.register_structure_hook(Tokens, checks.whole(0, 10**12))
    converter.register_structure_hook(MicroUsd, checks.micro_usd)
    converter.register_structure_hook(Factor, checks.factor)
    converter.register_structure_hook(Instant, checks.instant)
    converter.register_structure_hook(Share, checks.share)
    converter.register_structure_hook(Port, checks.whole(0, 65535))
    converter.register_structure_hook(Url, checks.url)
    converter.register_structure_hook(HostName, checks.host_name)
    converter.register_structure_hook(Origin, checks.origin)
    converter.register_structure_hook(ProxyUrl, checks.proxy)
    converter.register_structure_hook(Secret, parse_secret)
    converter.register_structure_hook_func(lambda kind: getattr(kind, "__origin__", None) is Literal, checks.literal)

    # before the sections, whose functions are made with the hooks that there are
    def strings(value: Any, _: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError("expected an array of strings")
        return tuple(value)

    converter.register_structure_hook_func(lambda kind: kind == tuple[str, ...], strings)

    def items(value: Any, kind: Any) -> tuple[Any, ...]:
        strings(value, kind)
        return tuple(converter.structure(value, list[kind.__args__[0]]))

    def numbers(value: Any, _: Any) -> tuple[float, ...]:
        if not isinstance(value, list):
            raise ValueError(f"expected an array of numbers, got {checks.kind_of(value)}")
        return tuple(checks.not_negative(item, Rate) for item in value)

    converter.register_structure_hook_func(lambda kind: kind == tuple[Rate, ...], numbers)
    item_kinds = (
        *(tuple[HostName, ...], tuple[Origin, ...]),
        *(tuple[Reason, ...], tuple[Action, ...], tuple[AlertKind, ...]),
    )
    converter.register_structure_hook_func(lambda kind: kind in item_kinds, items)

    def register(section: type, **hooks: Callable[[Any, Any], Any]) -> None:
        """Registers a section of which some fields have a check of their own."""
        overrides: dict[str, Any] = {name: cattrs.override(struct_hook=hook) for name, hook in hooks.items()}
        structure: Any = make_dict_structure_fn(section, converter, _cattrs_forbid_extra_keys=True, **overrides)
        converter.register_structure_hook(section, structure)

    converter.register_structure_hook(Expression, checks.expression)
    register(
        UpstreamConfig,
        models=checks.model_list,
        model_info=checks.model_info,
        set=checks.set_fields,
        base_url=checks.base_url,
        api_version=checks.word,
        region=checks.word,
        guardrail=checks.guardrail,
        project=checks.word,
        location=checks.word,
    )
    register(HookConfig, parameters=checks.parameters)
    register(ChannelConfig, parameters=checks.parameters)
    register(KeySettings, metadata=checks.info)
    register(KeyConfig, metadata=checks.info)
    register(ModelConfig, info=checks.info)
    return converter


_converter = _make_converter()


def convert(kind: type[_Section], table: dict[str, Any], path: str, problems: list[str]) -> _Section | None:
    """Converts a table to a section; adds what is wrong to ``problems`` and returns None if it cannot be converted.

    Args:
        kind: The section's class.
        table: The table as `tomllib` gives it.
        path: The path of the table in messages.
    """
    try:
        return _converter.structure(table, kind)
    except (cattrs.BaseValidationError, cattrs.ForbiddenExtraKeysError) as error:
        problems.extend(_conversion_problems(error, path))
        return None


def _explain(error: BaseException, kind: type | None) -> str:
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = [field.name for field in attrs.fields(error.cl)]
        return ", ".join(f"unknown key {name}{checks.did_you_mean(name, known)}" for name in sorted(error.extra_fields))
    if isinstance(error, KeyError):
        return "required, but missing"
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, TypeError | AttributeError):
        return "expected a table"
    return format_exception(error, kind)


def _conversion_problems(error: BaseException, path: str) -> list[str]:
    found = cattrs.transform_error(error, path=path, format_exception=_explain)
    lines = []
    for line in found:
        what, _, where = line.rpartition(" @ ")
        dotted = _SUBSCRIPT.sub(r".\1", where)
        lines.append(f"{dotted}: {what}")
    return lines
