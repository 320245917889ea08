"""A pynvml that answers as NVML does, for machines without a card: handles, structures, return codes, lost cards.

The error classes are the real package's own, so that a `except` of a name that does not exist would fail here too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml as real


@dataclass
class FakeCard:
    """One card; `readings` are its used bytes, one per reading, the last repeated. None: the card is lost then."""

    name: str = "NVIDIA GeForce RTX 3060"
    total: int = 12 * 2**30
    capability: tuple[int, int] = (8, 6)
    readings: list[int | None] = field(default_factory=lambda: [2**30])
    without: tuple[str, ...] = ()  # calls that this card does not support
    asked: int = -1


class FakeNvml:
    """Stands in for the module `pynvml`; everything it does not imitate comes from the real one."""

    def __init__(self, *cards: FakeCard, init_error: int | None = None):
        self.cards, self.init_error, self.opened = cards, init_error, 0
        self.inits = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvml"):
            raise AssertionError(f"the fake does not imitate {name}")
        return getattr(real, name)

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise real.NVMLError(self.init_error)
        self.opened += 1
        self.inits += 1

    def nvmlShutdown(self) -> None:
        self._open()
        self.opened -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        self._open()
        return "580.82.07"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        self._open()
        return 13000

    def nvmlDeviceGetCount(self) -> int:
        self._open()
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> tuple[str, int]:
        self._open()
        if not 0 <= index < len(self.cards):
            raise real.NVMLError(real.NVML_ERROR_INVALID_ARGUMENT)
        card = self.cards[index]
        card.asked += 1
        return ("handle", index)

    def nvmlDeviceGetName(self, handle) -> str:
        return self._of(handle, "name").name

    def nvmlDeviceGetMemoryInfo(self, handle) -> Any:
        card = self._of(handle, "memory")
        used = self._reading(card)
        return SimpleNamespace(total=card.total, used=used, free=card.total - used)

    def nvmlDeviceGetUtilizationRates(self, handle) -> Any:
        self._of(handle, "utilization")
        return SimpleNamespace(gpu=87, memory=40)

    def nvmlDeviceGetPowerUsage(self, handle) -> int:
        self._of(handle, "power")
        return 151_300  # milliwatts

    def nvmlDeviceGetTemperature(self, handle, sensor) -> int:
        assert sensor == real.NVML_TEMPERATURE_GPU
        self._of(handle, "temperature")
        return 64

    def nvmlDeviceGetCudaComputeCapability(self, handle) -> tuple[int, int]:
        return self._of(handle, "capability").capability

    def _open(self) -> None:
        if not self.opened:
            raise real.NVMLError(real.NVML_ERROR_UNINITIALIZED)

    def _of(self, handle, call: str) -> FakeCard:
        self._open()
        card = self.cards[handle[1]]
        if self._reading(card) is None:
            raise real.NVMLError(real.NVML_ERROR_GPU_IS_LOST)
        if call in card.without:
            raise real.NVMLError(real.NVML_ERROR_NOT_SUPPORTED)
        return card

    def _reading(self, card: FakeCard) -> int | None:
        return card.readings[min(max(card.asked, 0), len(card.readings) - 1)]
