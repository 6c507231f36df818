"""Finds the cheapest change of a configuration that makes the run fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fastrlhf.config import PPOConfig, ReferenceConfig, TrainConfig
from fastrlhf.distributed.ranks import world_size
from fastrlhf.tools.plan.packs import Rows, find_packs
from fastrlhf.tools.plan.phases import Phase, count_phases, readable


def cheapest_change(
    config: TrainConfig,
    rows: Rows,
    phases: Sequence[Phase],
    limit: int,
    *,
    memory: int,
    is_cuda: bool,
    may_offload: bool,
) -> str:
    """Returns a text that names the first change after which no phase takes more than `limit` bytes. Changes are tried
    in the order of `_bases`, each of them also with smaller micro-batches and rollout batches. If no change is enough,
    the text gives the memory of the smallest configuration. `phases` are the phases of `config`. `memory`: bytes of
    the device. `may_offload`: the run has a GPU whose activations and frozen models can be moved to CPU memory."""
    least = max(phase.total for phase in phases)

    def totals(changed: TrainConfig) -> list[int]:
        return [phase.total for phase in count_phases(changed, rows, is_cuda=is_cuda, memory=memory).phases]

    for base in _bases(config, may_offload):
        needs = [phase.total for phase in phases] if base == config else totals(base)
        if max(needs) <= limit:
            return f"the cheapest change that fits: {_told(config, base)}: {readable(max(needs))}"
        is_rollout = isinstance(base, PPOConfig)
        smaller = _smaller(
            base, rows, rollout=is_rollout and needs[0] > limit, training=max(needs[is_rollout:]) > limit
        )
        least = min(least, *needs, *(max(totals(changed)) for changed in smaller[-1:]))
        if least > limit:
            continue  # even the smallest of these configurations is too large
        for changed in smaller:
            if (peak := max(totals(changed))) <= limit:
                return f"the cheapest change that fits: {_told(config, changed)}: {readable(peak)}"
    return (
        f"no change of settings is enough: the smallest configuration needs {readable(least)}; "
        "take a smaller model or a larger device"
    )


def _bases(config: TrainConfig, may_offload: bool) -> Iterator[TrainConfig]:
    """Yields configurations that save memory, the cheapest change first; each includes the changes before it.

    Computing the log-probs of the reference once costs no time, copying frozen models from CPU memory a little per
    update, and recomputing activations about a third. These changes and the offloading of the remaining activations
    change no result. bfloat16 and 8-bit moments round, and LoRA trains other parameters. Runs of several processes
    cannot offload models.
    """
    if isinstance(config, ReferenceConfig) and not config.precompute_ref_log_probs:
        config = replace(config, precompute_ref_log_probs=True)
    steps = (
        {},
        {"ref_reward_offload": True} if may_offload and _can_wait(config) else {},
        {"activation_checkpointing": True},
        {"activation_offloading": True} if may_offload else {},
        {"dtype": "bfloat16"},
        {"optim": "adamw_8bit"} if not config.use_peft else {},
        {"use_peft": True, "optim": config.optim} if not (config.use_peft or config.model_config) else {},
    )
    before = None
    for step in steps:
        config = replace(config, **step)
        if config != before:
            yield config
        before = config


def _can_wait(config: TrainConfig) -> bool:
    """Returns whether frozen models can be offloaded while they are not used, which requires that they do not share
    their weights with trained models."""
    if not isinstance(config, PPOConfig) or config.use_peft or world_size() > 1:
        return False
    try:
        replace(config, ref_reward_offload=True)
    except ValueError:
        return False
    return True


def _smaller(config: TrainConfig, rows: Rows, *, rollout: bool, training: bool) -> list[TrainConfig]:
    """Returns configurations with smaller micro-batches (if training is too large) and rollout batches (if the rollout
    is too large), the smallest one last."""
    packs = find_packs(config, rows)
    settings = [config]
    if training:
        sizes = _halvings(min(config.micro_batch_tokens, packs.largest.num_tokens), packs.longest)
        settings = [replace(config, micro_batch_tokens=size) for size in sizes] or settings
    if rollout and isinstance(config, PPOConfig):
        numbers = _halvings(min(config.rollout_batch_size, config.batch_size), 1)
        settings = [replace(each, rollout_batch_size=number) for each in settings for number in numbers]
    return [each for each in settings if each != config]


def _halvings(value: int, least: int) -> list[int]:
    """Returns value / 2, value / 4, ... and `least` as the last number; empty if `value` is at most `least`."""
    found = []
    while value > least:
        value = max(value // 2, least)
        found.append(value)
    return found


def _told(config: TrainConfig, changed: TrainConfig) -> str:
    names = (
        *("precompute_ref_log_probs", "ref_reward_offload", "micro_batch_tokens", "rollout_batch_size"),
        *("activation_checkpointing", "activation_offloading", "dtype", "optim", "use_peft"),
    )
    return " ".join(
        f"--{name} {getattr(changed, name)}"
        for name in names
        if hasattr(config, name) and getattr(config, name) != getattr(changed, name)
    )
