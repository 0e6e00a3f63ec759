"""The command line. It knows every other package, and none knows it; read `commands` first.

`commands` has the commands except `serve`, which is in `serve`. `client` sends requests to a running gateway.
`status_view` makes the tables of `trigate status`, and `status_watch` draws them on a terminal. `configuration` reads
the configuration for `serve` and `check`, and `failure` is how a command fails.

Import from the modules: this package imports nothing, so that `trigate --help` stays quick.
"""
