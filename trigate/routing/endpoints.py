"""Finds the targets of a request where its path decides, too: which upstreams serve it. Pure.

The rules for a request that is passed through, in this order:

1. an upstream that has the objects which the request names, or that the client names (``x-trigate-upstream``);
2. the upstreams of the model that the request names, as for a call;
3. the upstreams that serve the path, in their order. A request for something new goes to one that is down only after
   all others. Any other request (for a list, or an object that is not known) goes to the first, whatever its state: the
   next one has other objects.
"""

from __future__ import annotations

from collections.abc import Mapping

from trigate.errors import BadRequest, NotFound, Unavailable, UnknownModel
from trigate.routing.routes import Aliases, Known, Target, closest, plan


def call_targets(
    path: str,
    model: str,
    *,
    also: str,
    aliases: Aliases,
    upstreams: Mapping[str, Known],
) -> tuple[Target, ...]:
    """Returns the targets of a call, where ``endpoints`` narrows what an upstream serves; at least one.

    Args:
        also: Another path that serves such a call as well, since it can be translated.

    Raises:
        NotFound: No upstream of the model serves the path.
        UnknownModel, Unavailable: As `routes.plan`.
    """
    serving = {name: known for name, known in upstreams.items() if known.serves(path) or known.serves(also)}
    if not serving:
        raise NotFound(f"No upstream serves /v1{path}.")
    is_chosen = model == "default" and model not in aliases.exact
    found = plan(model, aliases=aliases, upstreams=serving if is_chosen else upstreams)
    targets = tuple(target for target in found if target.upstream in serving)
    if not targets:
        raise NotFound(f"No upstream of the model {model[:200]!r} serves /v1{path}.")
    return targets


def passed_targets(
    path: str,
    *,
    model: str | None,
    upstream: str | None,
    is_new: bool,
    aliases: Aliases,
    upstreams: Mapping[str, Known],
) -> tuple[Target, ...]:
    """Returns the targets of a request, in the order in which to try them; at least one.

    Args:
        path: Below ``/v1``, with ``{id}`` in place of an id.
        model: The model id that the client named; None = it named none. The targets have no model then.
        upstream: The only upstream that may serve the request; None = any may.
        is_new: It asks for something new.

    Raises:
        NotFound: There is no such upstream, or none serves the path.
        UnknownModel: The model id is not known, or not at this upstream.
        Unavailable: The upstreams are disabled.
    """
    if upstream is not None and upstream not in upstreams:
        near = closest(upstream, upstreams)
        hint = f" Closest: {', '.join(near)}." if near else ""
        raise NotFound(f"There is no upstream {upstream[:200]!r} (x-trigate-upstream).{hint}")
    serving = {name: known for name, known in upstreams.items() if known.passes and known.serves(path)}
    if not serving:
        raise NotFound(f"No upstream serves /v1{path}.")
    if upstream is not None and upstream not in serving:
        raise NotFound(f"The upstream {upstream} does not serve /v1{path}.")
    if model is None:
        found = _without_model(path, [upstream] if upstream is not None else list(serving), serving)
        return tuple(sorted(found, key=lambda each: serving[each.upstream].down is not None)) if is_new else found[:1]
    if upstream is not None and aliases.find(model, upstreams) is None:
        if model == "default" and (chosen := serving[upstream].default_model) is not None:
            return _without_model(path, [upstream], serving, model=chosen)
        if Target.parse(model).upstream not in upstreams:  # it is an id of that upstream
            return _without_model(path, [upstream], serving, model=model)
    found = plan(model, aliases=aliases, upstreams=upstreams)
    targets = tuple(target for target in found if target.upstream in serving)
    if not targets:
        raise NotFound(f"No upstream of the model {model[:200]!r} serves /v1{path}.")
    if upstream is None:
        return targets
    own = tuple(target for target in targets if target.upstream == upstream)
    if not own:
        raise UnknownModel(model, reason=f"It is not one of the upstream {upstream}, which the request has to go to.")
    return own


def _without_model(
    path: str, names: list[str], upstreams: Mapping[str, Known], *, model: str = ""
) -> tuple[Target, ...]:
    usable = [name for name in names if upstreams[name].unusable is None]
    if not usable:
        reasons = "; ".join(f"{name}: {upstreams[name].unusable}" for name in names)
        raise Unavailable(f"The upstreams that serve /v1{path} are disabled ({reasons}).", status=503)
    return tuple(Target(name, model) for name in usable)


def only_upstream(found: Mapping[str, str]) -> str | None:
    """Returns the upstream that has all objects of a request; None = the request names no object.

    Args:
        found: The upstream of each object, by its id.

    Raises:
        BadRequest: They are at several upstreams.
    """
    upstreams = dict.fromkeys(found.values())
    if len(upstreams) > 1:
        named = ", ".join(f"{object_id} at {upstream}" for object_id, upstream in list(found.items())[:10])
        raise BadRequest(f"The objects of this request are at several upstreams: {named}.")
    return next(iter(upstreams), None)
