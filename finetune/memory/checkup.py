"""`gpu_memory.py check`: the driver, the GPUs, and how large a model each can train."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune.memory.devices import MIN_UNSLOTH_CAPABILITY, Gpu, NoDriver, open_driver
from finetune.memory.plan import USABLE_SHARE, command_line, suggest
from finetune.memory.sizes import sizes_of_billions
from finetune.memory.tables import new_table

COMMON_SIZES_BILLIONS = (0.5, 1.5, 3.0, 7.0, 8.0, 14.0, 32.0, 70.0)
MAX_SHARE_USED_BY_OTHERS = 0.15  # beyond it the report says so


def print_checkup(console: Console) -> None:
    """Print the driver, the GPUs and a verdict. A machine without a GPU is not an error."""
    try:
        with open_driver() as driver:
            gpus = driver.gpus()
            version, cuda = driver.version, driver.cuda_version
    except NoDriver as reason:
        print_without_gpu(console, str(reason))
        return
    if not gpus:
        print_without_gpu(console, "the NVIDIA driver finds no GPU")
        return
    console.print(f"Driver {version}, CUDA up to {cuda}", highlight=False)
    console.print(gpus_table(gpus))
    for gpu in gpus:
        for line in verdict(gpu):
            console.print(line, highlight=False, soft_wrap=True)
    console.print("Whether the installed torch can use them: python train_lora.py --doctor", highlight=False)


def print_without_gpu(console: Console, reason: str) -> None:
    import psutil

    memory = psutil.virtual_memory()
    console.print(
        f"No GPU can be used here: {reason}.\nTraining runs on the CPU ({memory.available / 1e9:.1f} of "
        f"{memory.total / 1e9:.1f} GB memory free), practical up to about 0.5 B parameters. Memory of a model: "
        "python gpu_memory.py estimate --model MODEL --device cpu --quantization 16bit --dtype float32",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def gpus_table(gpus: list[Gpu]) -> Table:
    table = new_table(("GPU", "memory", "free", "compute", "bfloat16", "flash attention"))

    def yes_no(value: bool | None) -> str:
        return "unknown" if value is None else "yes" if value else "no"

    def size(value: float | None) -> str:
        return "unknown" if value is None else f"{value:.1f} GB"

    for gpu in gpus:
        compute = ".".join(map(str, gpu.capability)) if gpu.capability else "unknown"
        table.add_row(escape(f"{gpu.index} {gpu.name}"), size(gpu.memory_total_gb), size(gpu.memory_free_gb), compute,
                      yes_no(gpu.has_bf16), yes_no(gpu.has_flash_attention))  # fmt: skip
    return table


def verdict(gpu: Gpu) -> list[str]:
    """What this GPU can train, and what limits it."""
    name = f"GPU {gpu.index}"
    if gpu.status == "lost":
        return [f"{name} does not answer: it fell off the bus or its driver is being reset; restart the machine."]
    if gpu.memory_total_gb is None or gpu.memory_free_gb is None or gpu.memory_used_gb is None:
        return [f"{name} does not report its memory (it shares it with the system, or the driver hides it)."]
    lines = []
    if gpu.capability and gpu.capability < MIN_UNSLOTH_CAPABILITY:
        lines.append(f"{name} is too old for Unsloth's kernels: they need compute capability 7.0.")
    elif gpu.has_bf16 is False:
        lines.append(f"{name} has no bfloat16: runs use float16 and memory-efficient attention, and are slower.")
    gpu_gb = min(gpu.memory_total_gb * 1e9, gpu.memory_free_gb * 1e9 / USABLE_SHARE) / 2**30
    suggestions = {billions: suggest(sizes_of_billions(billions), gpu_gb) for billions in COMMON_SIZES_BILLIONS}
    fitting = {billions: one for billions, one in suggestions.items() if one[0].fits}
    if fitting:
        largest = max(fitting)
        lines.append(f"{name} can now train models of up to about {largest:g} B parameters; that size with:")
        lines.append(f"  {command_line(fitting[largest][1])}")
        in_16_bit = [billions for billions, (plan, _) in fitting.items() if not plan.workload.load_in_4bit]
        if in_16_bit:
            lines.append(
                f"Models of up to about {max(in_16_bit):g} B fit with 16-bit weights and rows of 4,096 tokens."
            )
    else:
        lines.append(f"{name} has too little free memory for a model of {COMMON_SIZES_BILLIONS[0]:g} B parameters.")
    if gpu.memory_used_gb > MAX_SHARE_USED_BY_OTHERS * gpu.memory_total_gb:
        lines.append(f"Other programs use {gpu.memory_used_gb:.1f} GB of it; close them for more room (nvidia-smi).")
    return lines
