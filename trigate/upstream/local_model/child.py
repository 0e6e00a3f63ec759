"""The child process of `trigate.upstream.local_model.process`: llama.cpp in OpenAI's dialect on a loopback port.

It is run by path (``python -P child.py '{"gguf": ...}'``) and imports neither `trigate` nor Trio, but only the standard
library and the wheel ``xllamacpp``, so that its start takes no longer than loading the weights.

Its interface:

- argument: the settings as one JSON object (`trigate.upstream.local_model.process.child_command` writes it);
- stdout: one line ``{"port": 12345}`` once it listens, and nothing else;
- stderr: llama.cpp's warnings and errors, and the reason of a failed start (exit status 1);
- stdin: nothing is ever sent. When it closes, the gateway has exited, and this process exits too. The kernel closes it
  as well if the gateway is SIGKILLed. (``PR_SET_PDEATHSIG`` would not do: it is tied to the *thread* that started the
  child, and Trio starts processes from a worker thread that exits after ten idle seconds.)
"""

from __future__ import annotations

import json
import os
import signal
import sys

if sys.platform == "linux":
    import fcntl


def main() -> None:
    """Serves until stdin closes, then exits without waiting for answers that are being generated."""
    settings = json.loads(sys.argv[1])
    _die_when_stdin_closes()
    # stdout is reserved for the announcement. C++ code may print to file descriptor 1 as well: that goes to stderr, so
    # that it is neither read as the announcement nor fills a pipe that the gateway does not read.
    announcement = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    import xllamacpp  # not earlier: the import may print, too

    params = xllamacpp.CommonParams()
    params.model.path = settings["gguf"]
    params.model_alias = [settings["model_id"]]
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_parallel = settings["parallel"]
    params.n_ctx = settings["context_tokens"] * settings["parallel"]
    params.cpuparams.n_threads = settings["threads"]
    params.sampling.temp = settings["temperature"]
    params.sampling.top_p = settings["top_p"]
    params.sampling.penalty_repeat = settings["repeat_penalty"]
    params.n_predict = settings["answer_tokens"]
    params.use_jinja = True  # the chat template that the weights carry
    params.verbosity = 2  # warnings and errors
    params.offline = True
    params.ui = False
    params.endpoint_slots = False  # it would show one local user what another one generates
    params.cors_origins = "http://127.0.0.1"  # the default lets any web page read the answers
    params.sse_ping_interval = -1  # the gateway sends the keep-alives
    params.cache_idle_slots = False
    params.cache_ram_mib = 0  # the default keeps up to 8 GiB of old prompts
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as exc:
        sys.exit(f"llama.cpp could not serve {settings['gguf']}: {exc}")

    with announcement:
        json.dump({"port": int(server.listening_address.rpartition(":")[2])}, announcement)
        announcement.write("\n")
    sys.stdin.buffer.read()  # releases the GIL; the server runs in threads of its own
    os._exit(0)


def _die_when_stdin_closes() -> None:
    """Makes the kernel end this process if stdin closes while the weights are being loaded.

    Loading holds the GIL, for minutes if the file is large, so no Python thread could notice. On Linux, closing the
    other end of a pipe raises SIGIO, which ends a process by default. On other systems, the process exits after
    loading.
    """
    if sys.platform == "linux":
        signal.signal(signal.SIGIO, signal.SIG_DFL)
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


if __name__ == "__main__":
    main()
