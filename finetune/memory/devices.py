"""Readings of this machine's NVIDIA GPUs through NVML."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

# Compute capabilities. Before Ampere, runs use float16 and memory-efficient attention.
AMPERE = (8, 0)
MIN_UNSLOTH_CAPABILITY = (7, 0)


class NoDriver(Exception):
    """NVML is not available on this machine; the message says why."""


@dataclass(frozen=True)
class Gpu:
    """One reading of one GPU. Memory in GB (10^9 bytes); None where the GPU does not report. status: "ok" or "lost"."""

    index: int
    name: str
    status: str = "ok"
    memory_used_gb: float | None = None
    memory_free_gb: float | None = None
    memory_total_gb: float | None = None
    utilization_percent: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    capability: tuple[int, int] | None = None

    @property
    def has_bf16(self) -> bool | None:
        return None if self.capability is None else self.capability >= AMPERE

    has_flash_attention = has_bf16


class Driver:
    """An open connection to NVML. Use `open_driver`."""

    def __init__(self, nvml: ModuleType):
        self.nvml = nvml
        self.names: dict[int, str] = {}

    @property
    def version(self) -> str:
        return self.nvml.nvmlSystemGetDriverVersion()

    @property
    def cuda_version(self) -> str:
        """The newest CUDA version that this driver supports."""
        number = self._optional(self.nvml.nvmlSystemGetCudaDriverVersion_v2)
        return "unknown" if number is None else f"{number // 1000}.{number % 1000 // 10}"

    def gpus(self) -> list[Gpu]:
        """One reading of every GPU. A GPU that vanishes stays in the list as "lost" until it answers again."""
        try:
            count = self.nvml.nvmlDeviceGetCount()
        except self.nvml.NVMLError:
            count = 0
        return [self._read(index) for index in range(max(count, len(self.names)))]

    def _read(self, index: int) -> Gpu:
        nvml = self.nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            self.names[index] = nvml.nvmlDeviceGetName(handle)
            memory = self._optional(nvml.nvmlDeviceGetMemoryInfo, handle)
            rates = self._optional(nvml.nvmlDeviceGetUtilizationRates, handle)
            power = self._optional(nvml.nvmlDeviceGetPowerUsage, handle)
            return Gpu(
                index=index,
                name=self.names[index],
                memory_used_gb=round(memory.used / 1e9, 3) if memory else None,
                memory_free_gb=round(memory.free / 1e9, 3) if memory else None,
                memory_total_gb=round(memory.total / 1e9, 3) if memory else None,
                utilization_percent=rates.gpu if rates else None,
                temperature_c=self._optional(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
                power_w=power / 1000 if power is not None else None,
                capability=self._optional(nvml.nvmlDeviceGetCudaComputeCapability, handle),
            )
        except nvml.NVMLError:
            # It fell off the bus or its driver is being reset: NVML finds it again only after being reopened.
            self._reopen()
            return Gpu(index=index, name=self.names.setdefault(index, f"GPU {index}"), status="lost")

    def _optional(self, query: Callable[..., Any], *arguments: Any) -> Any:
        """The answer, None where this GPU, driver or system has none (laptop power, WSL, shared memory)."""
        nvml = self.nvml
        try:
            answer = query(*arguments)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission, nvml.NVMLError_FunctionNotFound):
            return None
        return tuple(answer) if isinstance(answer, list) else answer

    def _reopen(self) -> None:
        with contextlib.suppress(self.nvml.NVMLError):
            self.nvml.nvmlShutdown()
        with contextlib.suppress(self.nvml.NVMLError):
            self.nvml.nvmlInit()


@contextlib.contextmanager
def open_driver() -> Iterator[Driver]:
    """Connect to NVML. Raises NoDriver where there is no usable driver, ImportError when nvidia-ml-py is missing."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        raise NoDriver("there is no NVIDIA driver on this machine") from None
    except pynvml.NVMLError_DriverNotLoaded:
        raise NoDriver("an NVIDIA driver is installed but not loaded; load it or restart the machine") from None
    except pynvml.NVMLError as error:
        raise NoDriver(f"the NVIDIA driver does not answer: {error}") from None
    try:
        yield Driver(pynvml)
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
