"""The child process of `trigate.upstream.local_model.process`: llama.cpp in OpenAI's dialect on a loopback port.

Run by path (``python -P child.py '{"gguf": ...}'``), it imports neither `trigate` nor
Trio: only the standard library and the wheel ``xllamacpp``, so it starts in the time that the
weights need.

What it says and hears:

- argument: the settings as one JSON object (`trigate.upstream.local_model.process.child_command` writes it);
- stdout: one line ``{"port": 12345}`` once it listens, and nothing else;
- stderr: llama.cpp's warnings and errors, and why it could not start (exit status 1);
- stdin: a leash. Nothing is ever sent; when it closes, the gateway is gone, and so is this process.
  A gateway that is SIGKILLed closes it too. (``PR_SET_PDEATHSIG`` would not do: it is tied to the
  *thread* that started the child, and Trio starts processes from a worker thread that ends when it
  has been idle for ten seconds.)
"""

from __future__ import annotations

import json
import os
import signal
import sys

if sys.platform == "linux":
    import fcntl


def main() -> None:
    """Serves until stdin closes; ends the process without waiting for what is being generated."""
    settings = json.loads(sys.argv[1])
    _die_when_stdin_closes()
    # stdout is for the one line; what C++ code may print there must neither be taken for it nor
    # fill a pipe that nobody reads
    announcement = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    import xllamacpp  # here, because it may print as well

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
    params.endpoint_slots = False  # it would tell one local user what another one is generating
    params.cors_origins = "http://127.0.0.1"  # the default lets every web page read the answers
    params.sse_ping_interval = -1  # keep-alives are the gateway's business
    params.cache_idle_slots = False
    params.cache_ram_mib = 0  # by default up to 8 GiB of old prompts are kept
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as exc:
        sys.exit(f"llama.cpp could not serve {settings['gguf']}: {exc}")

    with announcement:
        json.dump({"port": int(server.listening_address.rpartition(":")[2])}, announcement)
        announcement.write("\n")
    sys.stdin.buffer.read()  # lets go of the GIL; the server has threads of its own
    os._exit(0)


def _die_when_stdin_closes() -> None:
    """Has the kernel kill this process when the leash goes while the weights are being loaded.

    Loading holds the GIL, for minutes if the file is large, so no Python thread could notice. On
    Linux the close of a pipe's other end raises SIGIO, which ends a process by default. Elsewhere
    it is noticed after loading.
    """
    if sys.platform == "linux":
        signal.signal(signal.SIGIO, signal.SIG_DFL)
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


if __name__ == "__main__":
    main()
