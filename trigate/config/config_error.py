"""The error of a configuration that cannot be used."""

from __future__ import annotations


class ConfigError(Exception):
    """The configuration cannot be used.

    Args:
        source: Where it came from, as users know it (a path, ``TRIGATE_API_KEY``).
        problems: One line each, ``path: what is wrong``.
        places: The line and the column of each problem in the source, both from 1; None = unknown. Empty = all are.
    """

    def __init__(
        self, source: str, problems: tuple[str, ...], *, places: tuple[tuple[int, int] | None, ...] = ()
    ) -> None:
        self.source = source
        self.problems = problems
        self.places = places or (None,) * len(problems)
        super().__init__(f"{source}: " + "; ".join(problems))

    @property
    def lines(self) -> list[str]:
        """Each problem with its source and place, in the form that editors and terminals make a link of.

        >>> ConfigError("a.toml", ("server: x", "models: y"), places=((3, 1), None)).lines
        ['a.toml:3:1: server: x', 'a.toml: models: y']
        """
        return [
            f"{self.source}:{place[0]}:{place[1]}: {problem}" if place is not None else f"{self.source}: {problem}"
            for problem, place in zip(self.problems, self.places, strict=True)
        ]
