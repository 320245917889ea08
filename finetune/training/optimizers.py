"""Names of optimizers."""

from __future__ import annotations

import difflib

from finetune.errors import UserError


def check_optimizer(name: str) -> None:
    """UserError when Transformers knows no optimizer of that name."""
    from transformers.training_args import OptimizerNames

    known = [optimizer.value for optimizer in OptimizerNames]
    if name != "auto" and name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        raise UserError(f"--optim {name}: Transformers has no such optimizer; {hint}")
