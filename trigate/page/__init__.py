"""The page at ``GET /``: what flows through the gateway, its history, use and keys, and a playground.

The page is a client of the HTTP API like any other: it has no rights of its own, and asks for a key where the gateway
has keys. It is plain HTML, CSS and ES modules in `static`, which browsers load as they are: nothing is built, and
nothing is loaded from elsewhere. `assets` reads the files; `trigate.asgi.routes.page` serves them. The package knows
nothing of the gateway.

The rules for the scripts:

* Texts of clients, models and errors are set by ``textContent`` or as attributes, never parsed as HTML. The page's
  policy (`assets.POLICY`) forbids the rest: no inline script or style, and no sink that parses HTML.
* The key is in a variable of `api.js`. Nothing is stored in the browser, and there are no cookies.
* Lists are bounded, and a list that is shown again keeps its elements, so that the focus stays where it was.
"""
