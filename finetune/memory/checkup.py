"""`gpu_memory.py check`: the driver, the cards, and in plain words what they are good for."""

from __future__ import annotations

from importlib import metadata

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune.memory.advice import USABLE, flag_words, suggest
from finetune.memory.devices import UNSLOTH_FROM, Card, NoDriver, open_driver
from finetune.memory.sizes import sizes_of_billions

# Sizes that open models come in, in billions of parameters.
COMMON_SIZES = (0.5, 1.5, 3.0, 7.0, 8.0, 14.0, 32.0, 70.0)


def print_checkup(console: Console) -> None:
    """Print what the driver says and a verdict. Nothing of it is an error: a machine without a card trains too."""
    try:
        with open_driver() as driver:
            cards = driver.cards()
            version, cuda = driver.version, driver.cuda_version
    except NoDriver as reason:
        without_card(console, str(reason))
        return
    if not cards:
        without_card(console, "the NVIDIA driver sees no GPU")
        return
    console.print(f"Driver {version}, CUDA up to {cuda}; torch: {torch_build()}", highlight=False)
    console.print(cards_table(cards))
    for card in cards:
        for line in verdict(card):
            console.print(line, highlight=False, soft_wrap=True)
    if torch_build() == "CPU build":
        console.print("The cards stay idle: the installed torch is a CPU build. See: python train_lora.py --doctor")


def without_card(console: Console, reason: str) -> None:
    import psutil

    memory = psutil.virtual_memory()
    console.print(
        f"No GPU can be used here: {reason}.\nTraining runs on the CPU, with {memory.available / 1e9:.1f} of "
        f"{memory.total / 1e9:.1f} GB memory free: fit for models up to about 0.5 B parameters. What a model needs: "
        "python gpu_memory.py estimate --model MODEL --device cpu --quantization 16bit --dtype float32",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def torch_build() -> str:
    """What the installed torch was built for, by its version's suffix; importing it would take seconds."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "not installed"
    local = version.partition("+")[2]
    return "CPU build" if local == "cpu" else f"{version}, CUDA" if not local or local.startswith("cu") else version


def cards_table(cards: list[Card]) -> Table:
    table = Table()
    for column in ("card", "memory", "free", "compute", "bfloat16", "flash attention"):
        table.add_column(column)

    def known(value: bool | None) -> str:
        return "unknown" if value is None else "yes" if value else "no"

    for card in cards:
        compute = ".".join(map(str, card.capability)) if card.capability else "unknown"
        total = "unknown" if card.memory_total_gb is None else f"{card.memory_total_gb:.1f} GB"
        free = "unknown" if card.memory_free_gb is None else f"{card.memory_free_gb:.1f} GB"
        table.add_row(escape(f"{card.index} {card.name}"), total, free, compute, known(card.bf16), known(card.flash))
    return table


def verdict(card: Card) -> list[str]:
    """What this card is good for, and what is in the way."""
    name = f"Card {card.index}"
    if card.status == "lost":
        return [f"{name} does not answer: it fell off the bus or its driver is being reset; restart the machine."]
    if card.memory_total_gb is None:
        return [f"{name} does not tell its memory (it shares it with the system, or the driver hides it)."]
    lines = []
    if card.capability and card.capability < UNSLOTH_FROM:
        lines.append(f"{name} is too old for Unsloth's kernels: they need compute capability 7.0.")
    elif card.bf16 is False:
        lines.append(f"{name} has no bfloat16: runs use float16 and memory-efficient attention, and are slower.")
    card_gb = min(card.memory_total_gb * 1e9, card.memory_free_gb * 1e9 / USABLE) / 2**30
    fitting = [b for b in COMMON_SIZES if suggest(sizes_of_billions(b), card_gb).plan is not None]
    if fitting:
        best = suggest(sizes_of_billions(fitting[-1]), card_gb)
        lines.append(f"{name} can now train models of up to about {fitting[-1]:g} B parameters; that size with:")
        lines.append(f"  {flag_words(best.flags)}")
        roomy = [b for b in fitting if not suggest(sizes_of_billions(b), card_gb).plan.load_in_4bit]
        if roomy:
            lines.append(f"Up to about {roomy[-1]:g} B it has room for 16-bit weights and rows of 4,096 tokens.")
    else:
        lines.append(f"{name} has too little free memory for a model of {COMMON_SIZES[0]:g} B parameters.")
    if card.memory_used_gb > 0.15 * card.memory_total_gb:
        lines.append(f"Other programs hold {card.memory_used_gb:.1f} GB of it; close them for more room (nvidia-smi).")
    return lines
