"""`trigate usage` and `trigate exchanges`: what a running gateway was used for, and what happened to a call."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import click

from trigate.cli.failure import CommandFailed
from trigate.cli.running_gateway import ask, failures_reported, not_a_gateway, url_option

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_BARS = "▁▂▃▄▅▆▇█"
_MAX_CHARS = 40


def _report_options(command: Any) -> Any:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the gateway's answer, as JSON."),
        click.option("--model", help="Only calls of this model."),
        click.option("--key", "name", metavar="NAME", help="Only calls with the key of this name."),
        click.option("--to", "before", metavar="TIME", help="Until when: a date (that day included) or a time."),
        click.option("--from", "since", metavar="TIME", help="From when on: a date, or a time of ISO 8601, of UTC."),
        click.option("--last", metavar="TIME", help="Only the last time: 90m, 24h, 7d, 2w."),
        click.option(
            "--api-key",
            "secret",
            envvar=["TRIGATE_ADMIN_KEY", "TRIGATE_API_KEY"],
            help="The admin's key, or one that sees its own calls.  [env: TRIGATE_ADMIN_KEY, TRIGATE_API_KEY]",
        ),
        url_option,
    ):
        command = option(command)
    return command


def since_of(last: str, now: float) -> str:
    """Returns when the last so many minutes, hours, … began, as ISO 8601.

    >>> since_of("90m", 5400.0), since_of("7d", 604800.0)
    ('1970-01-01T00:00:00Z', '1970-01-01T00:00:00Z')

    Raises:
        click.UsageError: It is not a number and a unit.
    """
    found = re.fullmatch(r"(\d{1,6})([smhdw])", last.strip())
    if found is None:
        raise click.UsageError("--last must be a number and s, m, h, d or w, as in 24h.")
    at = max(0.0, now - int(found[1]) * _UNITS_S[found[2]])
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def sparkline(values: Sequence[float]) -> str:
    """Draws values as bars, of which the highest has the full height.

    >>> sparkline([0, 1, 4, 8]), sparkline([0, 0]), sparkline([])
    ('▁▂▅█', '▁▁', '')
    """
    top = max(values, default=0) or 1
    return "".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in values)


def _asked(last: str | None, **given: str | None) -> dict[str, str]:
    """The parameters of the request."""
    import time

    if last is not None:
        if given["from"] is not None:
            raise click.UsageError("--last cannot be combined with --from.")
        given["from"] = since_of(last, time.time())
    return {name: value for name, value in given.items() if value is not None}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table. Its first column is aligned to the left, numbers to the right."""
    from trigate.cli.status_view import printable

    shown = [[printable(cell, _MAX_CHARS) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    numeric = [all(row[at][:1].isdigit() or row[at] in ("-", "") for row in shown[1:]) for at in range(len(head))]
    for row in shown:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


@click.command()
@_report_options
@click.option(
    "--by",
    default="key,model",
    show_default=True,
    help="Of each row: some of key, group, model, target, upstream, hour, day, month, tag; empty = the sum alone.",
)
@click.option("--csv", "as_csv", is_flag=True, help="Print the table as CSV.")
def usage(
    url: str,
    secret: str | None,
    last: str | None,
    since: str | None,
    before: str | None,
    name: str | None,
    model: str | None,
    as_json: bool,
    by: str,
    as_csv: bool,
) -> None:
    """Show what a running gateway was used for: calls, tokens, cost and times, of the last 30 days."""
    if as_json and as_csv:
        raise click.UsageError("--json cannot be combined with --csv.")
    asked = _asked(last, **{"from": since, "to": before, "key": name, "model": model})
    grouped = {**asked, **({"group_by": by} if by else {})}
    if as_csv:
        click.echo(_text(url, secret, f"/v1/usage?{urlencode({**grouped, 'format': 'csv'})}"), nl=False)
        return
    if as_json:
        [body] = ask(url, secret, f"/v1/usage?{urlencode(grouped)}")
        click.echo(json.dumps(body, indent=2, ensure_ascii=False))
        return
    paths = (f"/v1/usage?{urlencode(asking)}" for asking in (grouped, {**asked, "group_by": "day"}))
    body, days = ask(url, secret, *paths)
    if body.get("object") != "usage":
        raise not_a_gateway(url)
    columns: list[str] = body["group_by"]
    rows = sorted(body["data"], key=lambda row: [row[each] for each in columns if each in ("month", "day", "hour")])
    head = ("calls", "failed", "prompt", "cached", "output", "cost $", "p50 s", "p95 s", "first p50", "first p95")
    total = dict.fromkeys(columns, "") | body["total"] | ({columns[0]: "total"} if columns else {})
    _table(
        (*columns, *head),
        [_usage_row(columns, row) for row in (*rows, total)],
    )
    if unpriced := body["total"]["unpriced_calls"]:
        click.echo(f"{unpriced} calls without a known price are not in the cost.")
    by_day = {row["day"]: row for row in days["data"]}
    if len(by_day) > 1:
        dates = _dates(min(by_day), max(by_day))
        for what, field in (("calls", "calls"), ("cost", "cost_usd")):
            values = [float(by_day[date][field]) if date in by_day else 0.0 for date in dates]
            if any(values):
                click.echo(f"{what} per day, {dates[0]} to {dates[-1]}: {sparkline(values)}")


def _usage_row(columns: Sequence[str], row: Mapping[str, Any]) -> list[str]:
    counts = ("calls", "failed", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_usd")
    times = ("duration_p50_s", "duration_p95_s", "first_content_p50_s", "first_content_p95_s")
    return [
        *[str(row[column]) or "-" for column in columns],
        *[str(row[count]) for count in counts],
        *[_seconds(row[each]) for each in times],
    ]


def _dates(first: str, last: str) -> list[str]:
    """Returns every date from one to another; of many, the last 60."""
    end = datetime.date.fromisoformat(last)
    days = (end - datetime.date.fromisoformat(first)).days
    return [str(end - datetime.timedelta(days=before)) for before in range(min(days, 59), -1, -1)]


def _text(url: str, secret: str | None, path: str) -> str:
    import httpx2

    from trigate.cli import client

    with (
        failures_reported(),
        httpx2.Client(**client.client_settings(url, secret)) as http,
        client.translated_errors(url),
    ):
        response = http.get(path)
        if response.status_code != 200:
            raise client.RequestFailed(client.message_of(response))
        return response.text


@click.command()
@_report_options
@click.argument("identity", metavar="[ID]", required=False)
@click.option("--outcome", help="Only those that ended so: complete, cancelled, lost, or an error code.")
@click.option("--failed", is_flag=True, help="Only those that failed.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="How many.")
def exchanges(
    url: str,
    secret: str | None,
    last: str | None,
    since: str | None,
    before: str | None,
    name: str | None,
    model: str | None,
    as_json: bool,
    identity: str | None,
    outcome: str | None,
    failed: bool,
    limit: int,
) -> None:
    """Show the last calls that have ended, or those with the id ID (of the request, or of the exchange) in detail."""
    asked = _asked(
        last,
        **{
            "from": since,
            "to": before,
            "key": name,
            "model": model,
            "id": identity,
            "outcome": outcome,
            "failed": "true" if failed else None,
            "limit": str(limit),
        },
    )
    [body] = ask(url, secret, f"/v1/exchanges?{urlencode(asked)}")
    if as_json:
        click.echo(json.dumps(body, indent=2, ensure_ascii=False))
        return
    if body.get("object") != "list":
        raise not_a_gateway(url)
    rows: list[dict[str, Any]] = body["data"]
    if identity is not None and not rows:
        raise CommandFailed(f"no exchange that has ended has the id {identity!r}.")
    if identity is not None:
        for row in rows:
            _show(row)
        return
    head = ("started (UTC)", "request id", "key", "model", "target", "outcome", "status", "seconds", "tokens", "cost $")
    _table(head, [_exchange_row(row) for row in rows])
    if body["has_more"]:
        click.echo(f"There are more than {limit}: --limit, --last, --from and --to choose others.")


def _exchange_row(row: Mapping[str, Any]) -> list[str]:
    tokens = "-" if row["prompt_tokens"] is None else f"{row['prompt_tokens']}+{row['completion_tokens']}"
    return [
        row["started_at"][:19].replace("T", " "),
        row["request_id"],
        row["key"] or "-",
        row["model"],
        row["target"] or "-",
        row["outcome"],
        str(row["status"] or "-"),
        _seconds(row["duration_s"]),
        tokens,
        row["cost_usd"] or "-",
    ]


def _show(row: Mapping[str, Any]) -> None:
    """Prints one exchange with its attempts."""
    from trigate.cli.status_view import printable

    for name, value in row.items():
        if name != "attempts" and value not in (None, ""):
            click.echo(f"{name}: {printable(str(value))}")
    for number, attempt in enumerate(row["attempts"], 1):
        told = ", ".join(f"{name} {printable(str(value))}" for name, value in attempt.items() if value is not None)
        click.echo(f"attempt {number}: {told}")
    click.echo("")
