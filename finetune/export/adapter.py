"""The adapter alone, at its own or a smaller rank, and a check that it answers as what it was made from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.export.adapter_files import copy_adapter
from finetune.export.merged import check_prompts, log_probabilities, measure_agreement, served_format
from finetune.export.targets import Job, target
from finetune.models.adapter import attach_adapter
from finetune.models.remote_code import strip_code
from finetune.models.truncation import TruncatableAdapter, energy_share
from finetune.progress import counted, say

if TYPE_CHECKING:
    from formats import Format

AUTO = "auto"  # --rank auto


@target("adapter", marker="adapter_config.json", help="the adapter, with --rank at a smaller rank")
def export_adapter(job: Job) -> None:
    """Adapter, tokenizer and template; at a smaller rank its best approximation (see finetune/models/truncation.py)."""
    from finetune.evaluation.rank_losses import check_ranks

    run = job.run
    if run.adapter is None:
        raise UserError(f"{run.path} has no adapter; name a run or an adapter folder")
    copy_adapter(run.adapter, job.folder)
    if job.rank is None:
        return
    if job.rank == AUTO:
        check_ranks(run, [], job.dataset, "--rank auto")
    else:
        check_ranks(run, [int(job.rank)], None, "--rank")
    loaded, fmt = run.load_base()
    base, tokenizer = loaded.model.eval(), loaded.tokenizer
    prompts = check_prompts(run, tokenizer, served_format(run, fmt))
    of_base = log_probabilities(base, prompts)
    model = attach_adapter(base, run.adapter).eval()
    adapter = TruncatableAdapter(model)
    rank = choose_rank(job, adapter, model, tokenizer, fmt) if job.rank == AUTO else int(job.rank)
    of_whole = log_probabilities(model, prompts)
    with adapter.at_rank(rank):
        of_cut = log_probabilities(model, prompts)
    write_tensors(model, adapter, rank, job.folder)
    saved = attach_adapter(model.unload(), job.folder).eval()
    agreement = measure_agreement(of_cut, of_base, log_probabilities(saved, prompts))
    if not agreement.is_close:
        raise UserError(f"the saved adapter of rank {rank} does not answer as it should ({agreement}); report this")
    kept = measure_agreement(of_whole, of_base, of_cut)
    say(
        f"rank {rank} of {adapter.rank}: {energy_share(adapter.spectra, rank):.2%} of the adapter's energy; against "
        f"the whole adapter KL {kept.kl:.2g} nats (base: {kept.kl_of_base:.2g}), same likeliest token at "
        f"{kept.same_top:.1%} of {kept.positions} positions"
    )


def choose_rank(job: Job, adapter: TruncatableAdapter, model: Any, tokenizer: Any, fmt: Format) -> int:
    """The smallest power of two whose loss is within job.tolerance of the adapter's; else the adapter's own rank."""
    from finetune.evaluation.rank_losses import (
        LossMeter,
        encode_loss_rows,
        halved_ranks,
        losses_by_rank,
        smallest_rank,
    )

    rows, source = encode_loss_rows(job.run, tokenizer, fmt, job.dataset)
    losses = losses_by_rank(adapter, LossMeter(model, tokenizer, rows.sequences), halved_ranks(adapter.rank))
    rank = smallest_rank({rank: {"eval_loss": loss} for rank, loss in losses.items()}, job.tolerance)
    shown = ", ".join(f"{rank}: {loss:.4f}" for rank, loss in losses.items())
    sequences = counted(len(rows.sequences), "sequence")
    say(f"loss by rank over {sequences} of {source}: {shown}; {rank} is within {job.tolerance:g}")
    return rank


def write_tensors(model: Any, adapter: TruncatableAdapter, rank: int, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json at `rank`; everything but the LoRA matrices is kept."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu() for name, tensor in get_peft_model_state_dict(model).items()}
    cut = adapter.tensors(rank)
    if unknown := [name for name in tensors if "lora_" in name and name not in cut]:
        raise UserError(f"the adapter has {unknown[0]}, which is not a plain LoRA; its rank cannot be changed")
    save_file({name: tensor.contiguous() for name, tensor in (tensors | cut).items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})  # fmt: skip
    config = copy.deepcopy(model.peft_config[model.active_adapter])
    config.r = config.lora_alpha = rank
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.use_rslora, config.init_lora_weights = False, True
    config.inference_mode = True
    config.save_pretrained(str(folder))
    strip_code(folder)
