"""`trigate keys`: administers the keys of a running gateway."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import click

from trigate.cli.failure import CommandFailed
from trigate.cli.running_gateway import ask, not_a_gateway, url_option

_PERIODS = ("day", "week", "month", "total")


@click.group()
def keys() -> None:
    """Make, list, change, rotate and revoke keys of a running gateway, with its admin's key."""


def _admin_options(command: Any) -> Any:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the gateway's answer, as JSON."),
        click.option("--admin-key", envvar="TRIGATE_ADMIN_KEY", help="The admin's key.  [env: TRIGATE_ADMIN_KEY]"),
        url_option,
    ):
        command = option(command)
    return command


def _setting_options(command: Callable[..., None]) -> Any:
    for option in (
        click.option("--metadata", metavar="JSON", help="Anything to remember with the key: a JSON object."),
        click.option("--hook", "hooks", multiple=True, help="A webhook that it may call; * is any text. Repeatable."),
        click.option("--expires-at", metavar="TIME", help="When it expires, as 2026-12-31 or 2026-12-31T12:00:00Z."),
        click.option("--tag", "tags", multiple=True, help="A word under which its use is reported. Repeatable."),
        click.option("--priority", type=int, help="In the queue of the gateway, a higher one goes first."),
        click.option("--soft-budget-usd", metavar="USD", help="From which spending on a warning is given."),
        click.option("--budget-period", type=click.Choice(_PERIODS), help="The time that the budget is for."),
        click.option("--budget-usd", metavar="USD", help="What may be spent in one period."),
        click.option("--max-exchanges", type=int, help="Calls in flight."),
        click.option("--tpm", type=int, help="Tokens per minute."),
        click.option("--rpm", type=int, help="Calls per minute."),
        click.option("--group", help="Its group, of those in the configuration."),
        click.option("--model", "models", multiple=True, help="A model that it may use; * is any text. Repeatable."),
    ):
        command = option(command)
    return command


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that the command line has, as the gateway takes them."""
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None and value != ()}
    if "metadata" in settings:
        try:
            settings["metadata"] = json.loads(given["metadata"])
        except ValueError as error:
            raise click.UsageError(f"--metadata is not JSON: {error}.") from None
    return settings


def _ask(url: str, key: str | None, path: str, method: str = "GET", body: Any = None) -> dict[str, Any]:  # Any: JSON
    if not key:
        raise CommandFailed("needs the admin's key: set TRIGATE_ADMIN_KEY, or pass --admin-key.")
    [found] = ask(url, key, path, method=method, body=body)
    if found.get("object") not in ("key", "list"):
        raise not_a_gateway(url)
    return found


def _path(key: str, then: str = "") -> str:
    return f"/v1/keys/{quote(key, safe='')}{then}"


def _show(key: dict[str, Any], *, as_json: bool) -> None:
    """Prints a key; its secret alone on the last line."""
    if as_json:
        click.echo(json.dumps(key, indent=2, ensure_ascii=False))
        return
    click.echo(_line(key))
    for name, value in key["settings"].items():
        click.echo(f"  {name}: {json.dumps(value, ensure_ascii=True)}")
    if key["old_secret_until"] is not None:
        click.echo(f"  the old secret is valid until {_time(key['old_secret_until'])}")
    if "secret" in key:
        click.echo("The secret, which is not shown again:")
        click.echo(key["secret"])


def _line(key: dict[str, Any]) -> str:
    from trigate.cli.status_view import printable

    state = f"revoked {_time(key['revoked_at'])}" if key["revoked_at"] is not None else "active"
    return (
        f"{printable(key['name'])}  {key['id']}  {key['secret_begins_with']}…  made {_time(key['created_at'])}  {state}"
    )


def _time(seconds: float) -> str:
    import datetime

    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@keys.command("create")
@click.argument("name")
@_setting_options
@_admin_options
def create(name: str, url: str, admin_key: str | None, as_json: bool, **settings: Any) -> None:  # Any: options
    """Make the key NAME, and print its secret, which is shown only now."""
    _show(_ask(url, admin_key, "/v1/keys", "POST", {"name": name, **_settings(settings)}), as_json=as_json)


@keys.command("list")
@_admin_options
def list_(url: str, admin_key: str | None, as_json: bool) -> None:
    """List the keys, the newest first, those that are revoked included."""
    rows: list[dict[str, Any]] = []
    path = "/v1/keys?limit=1000"
    while True:
        page = _ask(url, admin_key, path)
        rows += page["data"]
        if not page["has_more"]:
            break
        path = f"/v1/keys?limit=1000&after={rows[-1]['id']}"
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for row in rows:
        click.echo(_line(row))


@keys.command("show")
@click.argument("key")
@_admin_options
def show(key: str, url: str, admin_key: str | None, as_json: bool) -> None:
    """Show KEY, a name or an id, with its settings."""
    _show(_ask(url, admin_key, _path(key)), as_json=as_json)


@keys.command("update")
@click.argument("key")
@_setting_options
@click.option("--unset", multiple=True, metavar="SETTING", help="A setting to remove, such as rpm. Repeatable.")
@_admin_options
def update(key: str, unset: tuple[str, ...], url: str, admin_key: str | None, as_json: bool, **settings: Any) -> None:
    """Change settings of KEY, a name or an id."""
    changes = {**_settings(settings), **dict.fromkeys(unset)}
    if not changes:
        raise click.UsageError("there is nothing to change.")
    _show(_ask(url, admin_key, _path(key), "PATCH", changes), as_json=as_json)


@keys.command("rotate")
@click.argument("key")
@click.option(
    "--overlap-s",
    type=float,
    default=0.0,
    show_default=True,
    help="Seconds for which the old secret stays valid.",
)
@_admin_options
def rotate(key: str, overlap_s: float, url: str, admin_key: str | None, as_json: bool) -> None:
    """Give KEY, a name or an id, another secret, and print it."""
    _show(_ask(url, admin_key, _path(key, "/rotate"), "POST", {"overlap_s": overlap_s}), as_json=as_json)


@keys.command("revoke")
@click.argument("key")
@_admin_options
def revoke(key: str, url: str, admin_key: str | None, as_json: bool) -> None:
    """Revoke KEY, a name or an id, for good; its streams in flight end with an error."""
    _show(_ask(url, admin_key, _path(key), "DELETE"), as_json=as_json)
