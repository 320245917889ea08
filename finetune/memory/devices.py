"""What the NVIDIA driver says about the cards of this machine, through NVML."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from finetune.errors import UserError

BF16_FROM = FLASH_FROM = (8, 0)  # compute capability: Ampere. Older cards run float16 and memory-efficient attention.
UNSLOTH_FROM = (7, 0)


class NoDriver(Exception):
    """NVML cannot be asked on this machine; the text says why in plain words."""


@dataclass(frozen=True)
class Card:
    """One reading of one card. Memory in GB (10^9 bytes); None where the card does not tell. status: "ok" or "lost"."""

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
    def bf16(self) -> bool | None:
        return None if self.capability is None else self.capability >= BF16_FROM

    @property
    def flash(self) -> bool | None:
        return None if self.capability is None else self.capability >= FLASH_FROM

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Driver:
    """An open connection to NVML. Use `open_driver`."""

    def __init__(self, nvml: ModuleType):
        self.nvml = nvml
        self.names: dict[int, str] = {}

    @property
    def version(self) -> str:
        return _text(self.nvml.nvmlSystemGetDriverVersion())

    @property
    def cuda_version(self) -> str:
        """The newest CUDA this driver can run."""
        number = self._optional(self.nvml.nvmlSystemGetCudaDriverVersion_v2)
        return "unknown" if number is None else f"{number // 1000}.{number % 1000 // 10}"

    def cards(self) -> list[Card]:
        """One reading of every card. A card that vanished stays in the list as "lost" until it answers again."""
        try:
            count = self.nvml.nvmlDeviceGetCount()
        except self.nvml.NVMLError:
            count = 0
        return [self._read(index) for index in range(max(count, len(self.names)))]

    def _read(self, index: int) -> Card:
        nvml = self.nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            self.names[index] = _text(nvml.nvmlDeviceGetName(handle))
            # Asked of every card alike; a card that is lost fails here.
            memory = self._optional(nvml.nvmlDeviceGetMemoryInfo, handle)
            rates = self._optional(nvml.nvmlDeviceGetUtilizationRates, handle)
            power = self._optional(nvml.nvmlDeviceGetPowerUsage, handle)
            return Card(
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
            # Fallen off the bus, or its driver is being reset: NVML has to be opened anew to see it again.
            self._reopen()
            return Card(index=index, name=self.names.setdefault(index, f"GPU {index}"), status="lost")

    def _optional(self, ask: Any, *arguments: Any) -> Any:
        """The answer, None where this card, driver or system has none (power of laptops, WSL, shared memory)."""
        nvml = self.nvml
        try:
            answer = ask(*arguments)
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
    """Connect to NVML. Raises NoDriver where there is no usable driver, UserError when nvidia-ml-py is missing."""
    try:
        import pynvml
    except ImportError as error:
        raise UserError("the package nvidia-ml-py is missing; run: pip install -r requirements_lora.txt") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        raise NoDriver("there is no NVIDIA driver on this machine") from None
    except pynvml.NVMLError_DriverNotLoaded:
        raise NoDriver("an NVIDIA driver is installed but not loaded; restart the machine or load it") from None
    except pynvml.NVMLError as error:
        raise NoDriver(f"the NVIDIA driver does not answer: {error}") from None
    try:
        yield Driver(pynvml)
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
