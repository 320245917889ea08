"""Hidden states and logits of models in plain Transformers, in a process that never imports Unsloth.

    python -m tests.plain_states FOLDER DTYPE ...

writes FOLDER/plain-DTYPE.pt beside each model's files: {"ids", "states": one tensor for each layer, "logits"}.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def states(model: Any, ids: list[int]) -> dict[str, Any]:
    """Outputs for one row, in float32."""
    import torch

    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return {
        "ids": ids,
        "states": [state[0].float() for state in output.hidden_states],
        "logits": output.logits[0].float(),
    }


def row(config: Any) -> list[int]:
    """Some ids, among them the padding token's and the last one that has an embedding."""
    special = {config.pad_token_id, config.eos_token_id, config.bos_token_id, config.vocab_size - 1} - {None}
    return [17, 301, 5, 44, 9, *sorted(special), 28, 77, 12, *range(100, 130)]


def main() -> int:
    import torch
    from transformers import AutoModelForCausalLM

    for folder, dtype in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager")
        torch.save(states(model.eval(), row(model.config.get_text_config())), Path(folder) / f"plain-{dtype}.pt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
