"""Ray, started for one sweep on this machine, or the cluster at --address; and the options of a sweep."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from finetune.errors import UserError, require
from finetune.packages import ROOT

log = logging.getLogger("sandwich")
HANGUP = {signal.SIGHUP} if hasattr(signal, "SIGHUP") else set()  # a closed terminal; Windows has no such signal
OBJECT_STORE_BYTES = 256 << 20  # chunks of files pass through it, never complete models
CODE = {"finetune", "formats", "train_lora.py"}  # what a node needs of this checkout


@dataclass(frozen=True)
class SweepOptions:
    """The flags of sweep_lora.py of the same names.

    interval: seconds between two looks at a run's log. patience: seconds that a run has for its last step and its
    checkpoint when it is told to stop. hang_minutes: a run that neither logs nor prints for so long is ended and tried
    again (0: never). force: a run continues from its checkpoint although package versions differ.
    """

    address: str | None = None
    gpus_per_run: float | None = None
    cpus_per_run: float | None = None
    transport: str = "auto"
    scratch: str | None = None
    retries: int = 2
    command: tuple[str, ...] = ()
    patience: float = 120.0
    interval: float = 1.0
    hang_minutes: float = 60.0
    force: bool = False


def require_ray() -> None:
    """UserError where Ray is not installed; does not import it, which takes seconds."""
    require("a sweep", "ray")


@contextlib.contextmanager
def ray_session(options: SweepOptions) -> Iterator[ModuleType]:
    """Yield the module `ray`, connected; a Ray that was started here is shut down at the end.

    Raises UserError when Ray is not installed or the cluster cannot be reached.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    own = options.address is None
    before = dict(os.environ)
    if own:
        # Ray's ports accept work only with this session's token, and listen on 127.0.0.1 alone. Ray replaces that by
        # an address that other machines reach where it allows clusters; this variable, read at import, forbids them.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        import ray
    except ImportError:
        require("a sweep", "ray")
        raise
    arguments = {"logging_level": "ERROR", "log_to_driver": False}
    if own:
        arguments |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES,
                      "_node_ip_address": "127.0.0.1"}  # fmt: skip
    else:
        if options.address.startswith("ray://"):
            raise UserError("--address ray://…: start the sweep on a machine of the cluster, with --address auto")
        _check_reachable(options.address)
        others = [f"/{path.name}" for path in ROOT.iterdir() if path.name not in CODE]
        code = {"working_dir": str(ROOT), "excludes": [*others, "__pycache__"]}
        arguments |= {"address": options.address, "runtime_env": code}
    try:
        try:
            with defer_ctrl_c():
                ray.init(**arguments)
        except (OSError, RuntimeError, ValueError) as error:  # ValueError: not an address
            where = f"the cluster at {options.address}" if options.address else "Ray on this machine"
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if own and isinstance(error, OSError):  # the path of a socket is limited to 107 bytes
                reason += "; set RAY_TMPDIR to a writable folder with a short name"
            raise UserError(f"cannot start {where}: {reason}") from error
        yield ray
    finally:
        ray.shutdown()
        if own:
            os.environ.clear()
            os.environ.update(before)


def _check_reachable(address: str) -> None:
    """UserError where nothing listens at host:port; Ray itself would retry for many minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot reach a cluster at {address}: {error}; check --address, or ray start it"
            ) from error


@contextlib.contextmanager
def defer_ctrl_c() -> Iterator[None]:
    """Raise a Ctrl-C only at the end of the block, as Ray crashes (segmentation fault) when interrupted at its start.

    SIGHUP is blocked: processes inherit the mask, so Ray's survive a closed terminal and the sweep can stop its runs.
    """
    received = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    if HANGUP:
        signal.pthread_sigmask(signal.SIG_BLOCK, HANGUP)
    try:
        yield
    finally:
        if HANGUP:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANGUP)
        signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt


def resources_per_run(ray: ModuleType, options: SweepOptions) -> tuple[float, float]:
    """(GPUs, CPUs) for each run: one GPU where the cluster has any, else all cores of its smallest node.

    Raises UserError when no machine has enough; a cluster may still grow, so there it is a warning.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = options.gpus_per_run, options.cpus_per_run
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU") for node in nodes) else 0.0
    if cpus is None:
        available = [node.get("CPU", 0) for node in nodes if node.get("CPU", 0) >= 1]
        cpus = 1.0 if gpus or not available else float(min(available))
    if not any(node.get("GPU", 0) >= gpus and node.get("CPU", 0) >= cpus for node in nodes):
        largest = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)), default={})
        text = (f"no machine has {gpus:g} GPUs and {cpus:g} CPUs for a run; the largest has {largest.get('GPU', 0):g} "
                f"and {largest.get('CPU', 0):g} (--gpus_per_run, --cpus_per_run)")  # fmt: skip
        if options.address is None:
            raise UserError(text)
        log.warning("%s; waiting for one to join", text)
    return gpus, cpus
