"""The result of a trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of a trainer."""

    model: PreTrainedModel
    """The trained model: sharded if there are several processes; on the CPU after `load_in_4bit`, because GPU memory is
    scarce."""
    tokenizer: PreTrainedTokenizerBase
    history: list[dict[str, float]] = field(repr=False)
    """One row of metrics per optimiser step (per update, in on-policy runs)."""
    final: dict[str, float]
    """Metrics of the last evaluation; empty if there were no rows to evaluate on."""
    output_dir: Path | None
    initial: dict[str, float] = field(default_factory=dict)
    """Metrics of the evaluation before the first step; empty without `eval_on_start`."""
    value_model: PreTrainedModel | None = None
    """The critic of an on-policy run; on the CPU if it shared the weights of the policy."""
    dpo_model: PreTrainedModel | None = None
    """The DPO model of an on-policy run that trains it (`dpo_refine`); on the CPU if it shared the weights of the
    policy."""
