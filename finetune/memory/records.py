"""Plan and sizes of a recorded run, read back: an estimator that changes is held against what was measured."""

from __future__ import annotations

from typing import Any

from finetune.memory.estimate import Plan
from finetune.memory.sizes import Matrix, Sizes


def plan_of(record: dict[str, Any]) -> Plan:
    """The plan in a `memory` entry of experiment_config.json or in a record of benchmarks/memory.py."""
    return Plan(**{**record["plan"], "target_modules": tuple(record["plan"]["target_modules"])})


def sizes_of(record: dict[str, Any]) -> Sizes:
    """The model's sizes in a record of benchmarks/memory.py."""
    return Sizes(**{**record["sizes"], "matrices": tuple(Matrix(**m) for m in record["sizes"]["matrices"])})
