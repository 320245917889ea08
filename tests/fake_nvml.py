"""A fake pynvml for machines without a GPU: handles, structures, error codes, lost GPUs.

The error classes are those of the real package.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml as real


@dataclass
class FakeGpu:
    """One GPU; `readings` are its used bytes, one per reading, the last repeated. None: the GPU is lost."""

    name: str = "NVIDIA GeForce RTX 3060"
    total: int = 12 * 2**30
    capability: tuple[int, int] = (8, 6)
    readings: list[int | None] = field(default_factory=lambda: [2**30])
    without: tuple[str, ...] = ()  # calls that this GPU does not support
    asked: int = -1


class FakeNvml:
    """Replaces the module `pynvml`; names other than functions come from the real one."""

    def __init__(self, *gpus: FakeGpu, init_error: int | None = None):
        self.gpus, self.init_error, self.opened = gpus, init_error, 0
        self.inits = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvml"):
            raise AssertionError(f"the fake has no {name}")
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
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> tuple[str, int]:
        self._open()
        if not 0 <= index < len(self.gpus):
            raise real.NVMLError(real.NVML_ERROR_INVALID_ARGUMENT)
        gpu = self.gpus[index]
        gpu.asked += 1
        return ("handle", index)

    def nvmlDeviceGetName(self, handle) -> str:
        return self._of(handle, "name").name

    def nvmlDeviceGetMemoryInfo(self, handle) -> Any:
        gpu = self._of(handle, "memory")
        used = self._reading(gpu)
        return SimpleNamespace(total=gpu.total, used=used, free=gpu.total - used)

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

    def _of(self, handle, call: str) -> FakeGpu:
        self._open()
        gpu = self.gpus[handle[1]]
        if self._reading(gpu) is None:
            raise real.NVMLError(real.NVML_ERROR_GPU_IS_LOST)
        if call in gpu.without:
            raise real.NVMLError(real.NVML_ERROR_NOT_SUPPORTED)
        return gpu

    def _reading(self, gpu: FakeGpu) -> int | None:
        return gpu.readings[min(max(gpu.asked, 0), len(gpu.readings) - 1)]
