"""vLLM, imported once and forked for each server. Runs with the Python of vLLM's environment, not with this project's.

Reads a line of JSON for each server: {"arguments": of `vllm`, "folder": to start in, "log": file}; answers with the
process id, which is also that of the server's process group. At the end of its input it kills the last server.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys

# Imported by the server, its engine and its worker; each would take a quarter of a minute for it.
MODULES = (
    "vllm.entrypoints.cli.main", "vllm.entrypoints.openai.api_server", "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama", "vllm.lora.models",
    "xgrammar",
)  # fmt: skip


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no reply
    import vllm.utils.system_utils as system

    # The CPU platform asks for new interpreters because OpenMP's threads do not survive a fork; there is one thread.
    system.get_mp_context = lambda: multiprocessing.get_context("fork")
    for name in MODULES:
        with contextlib.suppress(ModuleNotFoundError):  # modules move between versions
            importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    pid = 0
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            serve(**json.loads(line))
        with contextlib.suppress(OSError):  # the child does it as well: whoever comes first
            os.setpgid(pid, pid)
        print(pid, file=replies, flush=True)
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def serve(arguments: list[str], folder: str, log: str) -> None:
    """Become `vllm ARGUMENTS`."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
        os.dup2(descriptor, number)
    sys.argv = ["vllm", *arguments]
    code = 1
    try:
        from vllm.entrypoints.cli.main import main as vllm

        vllm()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
