"""What an upstream's configuration changes in the requests that are sent to it: top-level fields of their bodies. Pure.

It is applied to the body of a request for text as it is about to be sent, in whichever format that is. A body in which
nothing is to be changed stays as it is, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import msgspec

from trigate.config.sections import UpstreamConfig
from trigate.openai.raw_json import decode_any, join_fields, split_fields

_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""How the formats call the most tokens of an answer."""
_NO_TEXT = (
    *("/embeddings", "/embed", ":embedContent", ":batchEmbedContents", "/moderations", "/rerank"),
    *("/audio/speech", "/images/generations", "/count_tokens", "/input_tokens", ":countTokens"),
)
"""How the paths end at which no text is asked for. A field of a request for text may be an error there."""


@attrs.frozen(kw_only=True)
class BodyEdits:
    """The edits of one upstream.

    Attributes:
        drop: The names of fields that are left out.
        rename: The names of fields that get another name. One whose new name the body has already is left out.
        set: Fields that every body has, each as JSON; they replace the client's own.
        clamps: Whether the most tokens of an answer are lowered to what the model can give.
    """

    drop: tuple[str, ...] = ()
    rename: Mapping[str, str] = attrs.field(factory=dict)
    set: Mapping[str, msgspec.Raw] = attrs.field(factory=dict)
    clamps: bool = False

    def apply(self, body: bytes, path: str, *, max_tokens: int | None = None) -> tuple[bytes, tuple[str, ...]]:
        """Edits a body.

        Args:
            body: A JSON object. Anything else is not edited.
            path: Where it is sent. Only requests for text are edited.
            max_tokens: The most tokens that the model can give; None = unknown.

        Returns:
            The body, and the names of the fields that were left out.

        >>> edits = BodyEdits(drop=("seed",), rename={"max_tokens": "max_completion_tokens"}, clamps=True)
        >>> edits.apply(b'{"model":"m","seed":1,"max_tokens":9000,"top_p":1.0}', "/responses", max_tokens=4096)
        (b'{"model":"m","max_completion_tokens":4096,"top_p":1.0}', ('seed',))
        >>> edits.apply(b'{ "model" : "m" }', "/responses"), edits.apply(b'{"seed":1}', "/v1/embeddings?x=1")
        ((b'{ "model" : "m" }', ()), (b'{"seed":1}', ()))
        """
        if not body.startswith(b"{") or path.partition("?")[0].endswith(_NO_TEXT):
            return body, ()
        fields = split_fields(body)
        edited: dict[str, msgspec.Raw] = {}
        dropped = []
        for name, value in fields.items():
            new = self.rename.get(name, name)
            if name in self.drop or (new != name and new in fields):
                dropped.append(name)
            else:
                edited[new] = value
        edited |= self.set
        if self.clamps and max_tokens is not None:
            for name in _LIMITS:
                given = decode_any(bytes(edited[name])) if name in edited else None
                if type(given) is int and given > max_tokens:
                    edited[name] = msgspec.Raw(b"%d" % max_tokens)
        if edited == fields and not dropped:
            return body, ()
        return join_fields(edited), tuple(dropped)


def edits_of(config: UpstreamConfig) -> BodyEdits | None:
    """Returns the edits of an upstream; None = nothing is changed.

    >>> edits_of(UpstreamConfig()), edits_of(UpstreamConfig(set={"seed": 4})).set["seed"] == msgspec.Raw(b"4")
    (None, True)
    """
    if not (config.drop or config.rename or config.set or config.clamp_max_tokens):
        return None
    values = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in config.set.items()}
    return BodyEdits(drop=config.drop, rename=config.rename, set=values, clamps=config.clamp_max_tokens)
