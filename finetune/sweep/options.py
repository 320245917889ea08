"""How a sweep is to run; what is to be run is in grid.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """The flags of sweep_lora.py of the same names. interval: seconds between two looks at a run's log; patience:
    seconds that a run has for its last step and its checkpoint when it is told to stop; hang_minutes: a run
    that neither logs nor prints for so long is ended and tried again (0: never).
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
