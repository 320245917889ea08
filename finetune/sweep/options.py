"""How a sweep is to run; what is to be run is in grid.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """The flags of sweep_lora.py of the same names. interval: seconds between two looks at a run's log; patience:
    seconds that a run has for its last step and its checkpoint when it is told to stop.
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
