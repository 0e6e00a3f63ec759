"""Where each value of a TOML document stands: `tomllib` does not say it. Pure.

The scanner reads a document that `tomllib` has accepted, so it checks nothing: it only has to find where keys, values
and elements begin. A document that it does not understand has fewer positions, never an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

Path = tuple[str, ...]
"""The keys that lead to a value; an element of an array has its index."""

_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'''"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'''',
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}#\r\n]+")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_ESCAPED = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r"}


def positions(text: str) -> Mapping[Path, tuple[int, int]]:
    """Returns the line and the column of every key, header and element, both from 1.

    >>> found = positions('[a."b.c"]\\nx = [1, {y = "]"}]\\nz.w = 2')
    >>> found["a", "b.c"], found["a", "b.c", "x"], found["a", "b.c", "x", "1", "y"], found["a", "b.c", "z", "w"]
    ((1, 1), (2, 1), (2, 10), (3, 1))
    """
    scanner = _Scanner(text)
    scanner.read_document()
    found: dict[Path, tuple[int, int]] = {}
    starts = [0, *(match.end() for match in re.finditer(r"\n", text))]
    line = 0
    for path, at in sorted(scanner.found.items(), key=lambda item: item[1]):
        while line + 1 < len(starts) and starts[line + 1] <= at:
            line += 1
        found[path] = (line + 1, at - starts[line] + 1)
    return found


def place_of(problem: str, found: Mapping[Path, tuple[int, int]]) -> tuple[int, int] | None:
    """Returns where the value is that a problem is about: that of the longest known path at its beginning.

    Args:
        problem: ``path: what is wrong``, with dots between the keys of the path.

    >>> found = positions('[server]\\nport = "x"\\nhots = 1\\n[models."a.b"]')
    >>> place_of("server.port: expected an integer", found), place_of("server: unknown key hots; did you ...", found)
    ((2, 1), (3, 1))
    >>> place_of("models.a.b.targets: required, but missing", found), place_of("nonsense: ...", found)
    ((4, 1), None)
    """
    best: Path = ()
    for path in found:
        dotted = ".".join(path)
        if problem.startswith((f"{dotted}:", f"{dotted}.")) and len(dotted) > len(".".join(best)):
            best = path
        table = ".".join(path[:-1])
        if re.match(re.escape(f"{table}: unknown key {path[-1]}") + r"(?:[;,]|$)", problem):
            return found[path]
    return found.get(best)


class _Scanner:
    """Reads a document from its beginning to its end.

    Attributes:
        found: The offset of each key, header and element, by its path.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self.found: dict[Path, int] = {}
        self._arrays: dict[Path, int] = {}

    def read_document(self) -> None:
        table: Path = ()
        while self._skip_space():
            start = self._at
            if self._text[start] == "[":
                is_array = self._text.startswith("[[", start)
                self._at += 2 if is_array else 1
                table = self._resolved(self._key())
                if is_array:
                    index = self._arrays[table] = self._arrays.get(table, -1) + 1
                    self._note(table, start)
                    table = (*table, str(index))
                self._note(table, start)
                self._at = self._end_of_line()
            else:
                self._pair(table)
            if self._at == start:  # not understood
                self._at = self._end_of_line() + 1

    def _resolved(self, path: Path) -> Path:
        """A header's path, with the index of the last element behind each array of tables."""
        resolved: Path = ()
        for key in path[:-1]:
            resolved = (*resolved, key)
            if resolved in self._arrays:
                resolved = (*resolved, str(self._arrays[resolved]))
        return (*resolved, *path[-1:])

    def _note(self, path: Path, at: int) -> None:
        for end in range(1, len(path) + 1):
            self.found.setdefault(path[:end], at)

    def _skip_space(self) -> bool:
        """Goes to the next thing; whether there is one."""
        found = _SPACE.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return self._at < len(self._text)

    def _end_of_line(self) -> int:
        end = self._text.find("\n", self._at)
        return end if end >= 0 else len(self._text)

    def _key(self) -> Path:
        """Reads a key, with its dots."""
        parts: list[str] = []
        while self._skip_space():
            if found := _BARE.match(self._text, self._at):
                parts.append(found[0])
            elif found := _STRING.match(self._text, self._at):
                parts.append(_value_of(found[0]))
            else:
                break
            self._at = found.end()
            self._skip_space()
            if not self._text.startswith(".", self._at):
                break
            self._at += 1
        return tuple(parts)

    def _pair(self, table: Path) -> None:
        start = self._at
        path = (*table, *self._key())
        self._note(path, start)
        if self._skip_space() and self._text[self._at] == "=":
            self._at += 1
            self._skip_space()
            self._value(path)

    def _value(self, path: Path) -> None:
        if found := _STRING.match(self._text, self._at):
            self._at = found.end()
        elif self._text.startswith("[", self._at):
            self._elements(path, "]")
        elif self._text.startswith("{", self._at):
            self._elements(path, "}")
        elif found := _SCALAR.match(self._text, self._at):
            self._at = found.end()

    def _elements(self, path: Path, end: str) -> None:
        """Reads an array or an inline table."""
        self._at += 1
        index = 0
        while self._skip_space() and self._text[self._at] != end:
            start = self._at
            if end == "}":
                self._pair(path)
            else:
                self._note((*path, str(index)), start)
                self._value((*path, str(index)))
                index += 1
            self._skip_space()
            if self._text.startswith(",", self._at):
                self._at += 1
            elif self._at == start:  # not understood
                return
        self._at += 1


def _value_of(quoted: str) -> str:
    """The text of a quoted key.

    >>> _value_of("'a\\\\'"), _value_of('"a\\\\tb\\\\u00e9"')
    ('a\\\\', 'a\\tbé')
    """
    if quoted[0] == "'":
        return quoted[1:-1]
    return _ESCAPE.sub(
        lambda found: chr(int(found[1] or found[2], 16)) if found[3] is None else _ESCAPED.get(found[3], found[3]),
        quoted[1:-1],
    )
