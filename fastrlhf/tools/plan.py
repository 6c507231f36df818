"""The memory and the steps of a run, before a weight is loaded.

Weights, gradients and optimiser state are counted on the models' configurations, activations by running the trainer's
forward and backward on tensors without data (tools/memory.py), the rollout's cache by its shape. Rows are read and
tokenised as the run will; of a dataset of the hub, which is not fetched for this, rows of `max_length` are assumed.
Responses are taken to be as long as `response_length` allows.

Not counted: what a fragmented allocator wastes, the workspaces of cuBLAS and of attention, the dataset itself, and the
Python process with its libraries (0.3 to 0.5 GiB of a CPU's memory; the CUDA context, of a GPU's).

`fastrlhf plan --config FILE [--command drpo] [--memory_gib 80]`
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from fastrlhf.algorithms.experience import pack_episodes
from fastrlhf.config import DPOConfig, PPOConfig, RewardConfig, TrainConfig, parse_model_config, require
from fastrlhf.data.inputs import open_tokenizer
from fastrlhf.data.packing import forest, micro_batches, num_computed, pack
from fastrlhf.data.rows import SUFFIXES
from fastrlhf.models.forward import enable_activation_checkpointing
from fastrlhf.models.kv_cache import rounded_up
from fastrlhf.models.loading import DTYPES, read_model_config, resolve_device
from fastrlhf.tools.memory import Fakes
from fastrlhf.tools.work import open_work, to_tree
from fastrlhf.types import PackedBatch, Prefix, Rollout, Segment, TokenizedExample

GIB = 2**30
USABLE = 0.92
"""Of a device's memory; the rest is for what is not counted."""
MOST_BATCHES = 200
"""Steps whose packs are looked at for the largest one; of on-policy runs, whose packs cost more to make, a tenth."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a step, and what is in memory at its worst moment."""

    name: str
    parts: dict[str, int]
    """What -> bytes"""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    phases: list[Phase]
    facts: list[str]
    """Steps, tokens and parameters."""
    device: str
    memory: int
    """Bytes of the device."""
    change: str = ""
    """What makes it fit; empty where it does."""

    @property
    def peak(self) -> int:
        return max(phase.total for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.peak <= USABLE * self.memory


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """What the steps are made of; it does not depend on the settings that `_changes` varies."""

    tokenizer: PreTrainedTokenizerBase
    examples: list[TokenizedExample]
    batches: list[list[int]]
    steps: int | None
    """None where the size of the dataset is not known and the steps depend on it."""
    note: str


@dataclass(frozen=True, kw_only=True)
class _Packs:
    largest: PackedBatch
    num_packs: int
    """Of a step, at most."""
    longest: int
    """Tokens of an item that no micro-batch may cut."""
    tokens_per_step: float
    """Computed in one pass over the batch."""


def plan_run(config: TrainConfig, *, memory_gib: float = 0.0) -> Plan:
    """The plan of a run on this machine's device, or on one of `memory_gib` GiB.

    Raises ValueError, as the run would, for a model, a tokenizer or a dataset that is not there.
    """
    require(memory_gib >= 0, "memory_gib", memory_gib, "at least 0")
    device = resolve_device(config.device)
    if memory_gib:
        name, memory = f"a device of {memory_gib:g} GiB", int(memory_gib * GIB)
    else:
        name, memory = _device_memory(device)
    rows = _rows(config)
    phases, facts = _phases(config, rows, is_cuda=device.type == "cuda")
    plan = Plan(phases=phases, facts=facts, device=name, memory=memory)
    return plan if plan.fits else replace(plan, change=_cheapest_change(config, rows, plan, device.type == "cuda"))


def format_plan(plan: Plan) -> str:
    worst = max(plan.phases, key=lambda phase: phase.total)
    unit, name, digits = (GIB, "GiB", 2) if plan.peak >= GIB else (2**20, "MiB", 1)
    output = [*plan.facts]
    for phase in plan.phases:
        output += ["", f"{phase.name}{'  <- the peak' if phase is worst else ''}"]
        parts = {what: size for what, size in phase.parts.items() if size} | {"together": phase.total}
        output += [f"  {size / unit:9.{digits}f} {name}  {what}" for what, size in parts.items()]
    verdict = "fits" if plan.fits else "does not fit"
    output += ["", f"{_size(plan.peak)} of {_size(plan.memory)} of {plan.device}: {verdict}"]
    return "\n".join([*output, *[plan.change] * bool(plan.change)])


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def _phases(config: TrainConfig, rows: _Rows, *, is_cuda: bool) -> tuple[list[Phase], list[str]]:
    require(not config.use_peft, "use_peft", True, "false: plan does not count adapters yet, which need less")
    packs = _on_policy_packs(config, rows) if isinstance(config, PPOConfig) else _offline_packs(config, rows)
    fakes = Fakes.of(config.dtype, is_cuda)
    own = _model_config(config, config.model_name_or_path, "model_name_or_path", rows.tokenizer)
    frozen, reference = {}, None
    trained = {"scorer": fakes.scorer(own)} if isinstance(config, RewardConfig) else {"policy": fakes.policy(own)}
    if isinstance(config, DPOConfig) and not config.precompute_ref_log_probs:
        source = _other(config, config.ref_model_name_or_path, "ref_model_name_or_path", rows) or own
        reference = frozen["reference"] = fakes.policy(source)
    if isinstance(config, PPOConfig):
        judge = _other(config, config.reward_model_path, "reward_model_path", rows)
        if judge is None:
            raise ValueError("reward_model_path: give the reward model that judges and from which the critic starts")
        frozen = {"reference": trained["policy"], "reward model": fakes.scorer(judge)}
        if config.advantage_estimator == "gae":
            trained["critic"] = fakes.scorer(judge)
        for what, field in (("DPO model", "dpo_model_path"), ("DPO reference", "dpo_ref_model_path")):
            if source := _other(config, getattr(config, field), field, rows):
                frozen[what] = fakes.policy(source)

    if config.activation_checkpointing:
        for fake in trained.values():
            enable_activation_checkpointing(fake.model)

    weights = {f"weights of the {name}": fake.num_bytes for name, fake in (*trained.items(), *frozen.items())}
    num_trained = sum(fake.num_parameters for fake in trained.values())
    num_masters = sum(fake.num_masters for fake in trained.values())
    gradients = sum(p.numel() * p.element_size() for fake in trained.values() for p in fake.model.parameters())
    kept = weights | {
        "optimiser state (float32, two per parameter)": 8 * num_trained,
        "float32 copies of bfloat16 weights": 4 * num_masters,
    }
    beyond = fakes.peak(trained, packs.largest, reference=reference, num_packs=packs.num_packs)
    pack_tokens = packs.largest.num_tokens
    phases = [
        Phase(
            name=f"forward and backward of {pack_tokens:,} tokens",
            parts=kept
            | {
                "gradients": min(gradients, beyond),
                "activations, blocks of logits, temporaries": max(0, beyond - gradients),
            },
        )
    ]
    if num_masters:
        both = {"gradients": gradients, "gradients in float32": 4 * num_masters}
        phases.append(Phase(name="optimiser step", parts=kept | both))
    if isinstance(config, PPOConfig):
        phases.insert(0, _rollout(config, rows, fakes, own, trained["policy"], kept))
    counts = {name: fake.num_parameters for name, fake in (*trained.items(), *frozen.items())}
    facts = [
        "parameters: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()),
        f"{'updates' if isinstance(config, PPOConfig) else 'optimiser steps'}: "
        + ("not known before the dataset is read" if rows.steps is None else f"{rows.steps:,}"),
        f"a pass over a batch: {packs.tokens_per_step:,.0f} tokens, in {packs.num_packs} packs at most",
        *[rows.note] * bool(rows.note),
    ]
    if isinstance(config, PPOConfig):
        passes = config.num_ppo_epochs
        facts.insert(3, f"an update: {passes} such passes, {passes * config.num_mini_batches} optimiser steps")
    return phases, facts


def _rollout(
    config: PPOConfig, rows: _Rows, fakes: Fakes, model: PretrainedConfig, policy: Any, kept: dict[str, int]
) -> Phase:
    """Generation of `rollout_batch_size` episodes: prefilled at once, then one token each at a time."""
    number = min(config.rollout_batch_size, config.batch_size)
    width = max(len(rows.examples[i].prompt) for batch in rows.batches for i in batch)
    text = model.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    item = DTYPES[config.dtype].itemsize
    per_layer = 2 * heads * head_dim * item * number * rounded_up(width + config.response_length)
    prefill = per_layer // 2 + fakes.forward_peak(policy, pack([Segment(token_ids=range(width))] * number))
    # logits, and in float32: tempered, their log-softmax, its exponential and the cumulative sum of that
    drawing = number * text.vocab_size * (item + 16)
    return Phase(
        name=f"rollout of {number:,} episodes of {width:,} + {config.response_length:,} tokens",
        parts=kept
        | {
            "key-value cache": per_layer * text.num_hidden_layers,
            "prefill, keys on their way to the cache, or logits of one token each": max(prefill, drawing),
        },
    )


def _rows(config: TrainConfig) -> _Rows:
    source = config.dataset_name
    require(bool(source), "dataset_name", source, "a hub name, or a local file or folder")
    if Path(source).expanduser().exists() or source.endswith(SUFFIXES) or source.startswith((".", "~", "/")):
        work = open_work(config, most_batches=MOST_BATCHES)
        note = f"rows: {work.report.summary()}"
        return _Rows(
            tokenizer=work.tokenizer, examples=work.examples, batches=work.batches, steps=work.steps, note=note
        )
    examples = [_assumed(config)] * config.batch_size
    num = config.batch_size
    steps = config.max_steps if config.max_steps > 0 else None
    if isinstance(config, PPOConfig):
        num //= config.reset_group_size
        if steps is None and config.total_episodes:
            steps = max(1, config.total_episodes // config.batch_size)
    return _Rows(
        tokenizer=open_tokenizer(config),
        examples=examples,
        batches=[list(range(num))],
        steps=steps,
        note=f"dataset: {source} is not on this disk, so not read; rows of {config.max_length:,} tokens are assumed",
    )


def _assumed(config: TrainConfig) -> TokenizedExample:
    """A row of `max_length` tokens; of a pair, prompt and both responses together."""
    if isinstance(config, PPOConfig):
        return TokenizedExample(prompt=[0] * (config.max_length - config.response_length), row=0)
    part = max(1, config.max_length // 4)
    response = [0] * part
    if isinstance(config, DPOConfig | RewardConfig):
        prompt = [0] * max(1, config.max_length - 2 * part)
        return TokenizedExample(prompt=prompt, chosen=response, rejected=response, responses=[response] * 2, row=0)
    return TokenizedExample(prompt=[0] * max(1, config.max_length - part), reference=response, chosen=response, row=0)


def _offline_packs(config: TrainConfig, rows: _Rows) -> _Packs:
    tree_of = to_tree(config)
    trees = [tree_of(example) for example in rows.examples]
    costs = [num_computed(tree) for tree in trees]
    split = [
        [[batch[i] for i in micro] for micro in micro_batches([costs[i] for i in batch], config.micro_batch_tokens)]
        for batch in rows.batches
    ]
    largest = max((micro for micros in split for micro in micros), key=lambda micro: sum(costs[i] for i in micro))
    return _Packs(
        largest=pack(forest(trees[i] for i in largest)),
        num_packs=max(map(len, split)),
        longest=max(costs),
        tokens_per_step=sum(costs[i] for batch in rows.batches for i in batch) / len(rows.batches),
    )


def _on_policy_packs(config: PPOConfig, rows: _Rows) -> _Packs:
    updates = []
    for batch in rows.batches[: MOST_BATCHES // 10]:
        prompts = [rows.examples[i] for i in batch for _ in range(config.reset_group_size)]
        updates.append(
            pack_episodes(config, [_whole(config, p) for p in prompts], range(len(batch)), torch.device("cpu"))
        )
    packs = [item.batch for update in updates for mini in update for item in mini]
    together = config.reset_group_size if config.share_trunks else 1
    longest = max(len(rows.examples[i].prompt) for batch in rows.batches for i in batch)
    return _Packs(
        largest=max(packs, key=lambda batch: batch.num_tokens),
        num_packs=max(len(mini) for update in updates for mini in update),
        longest=longest + together * config.response_length,
        tokens_per_step=sum(batch.num_tokens for batch in packs) / len(updates),
    )


def _whole(config: PPOConfig, example: TokenizedExample) -> Rollout:
    """An episode from the prompt that uses up its budget. A reset would leave it as long, with fewer trained tokens."""
    length = config.response_length
    return Rollout(
        prefix=Prefix(token_ids=example.prompt, num_reset=0, row=example.row, episode=0),
        completion=[0] * length,
        sampler_logprob=[0.0] * length,
        ended=False,
    )


def _model_config(config: TrainConfig, source: str, field: str, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Of a model as the run will open it: its vocabulary is at least the tokenizer's."""
    if config.model_config and field == "model_name_or_path":
        fields = parse_model_config(config.model_config)
        try:
            model = AutoConfig.for_model(fields.pop("model_type"), **fields)
        except ValueError as error:
            raise ValueError(f"model_config.model_type: {error}") from error
        model.vocab_size, model.pad_token_id = len(tokenizer), None
        return model
    require(bool(source), field, source, "a folder or a hub name")
    model = read_model_config(source, field, config.trust_remote_code)
    model.vocab_size, model.pad_token_id = max(model.vocab_size, len(tokenizer)), None
    return model


def _other(config: TrainConfig, source: str, field: str, rows: _Rows) -> PretrainedConfig | None:
    return _model_config(config, source, field, rows.tokenizer) if source else None


def _device_memory(device: torch.device) -> tuple[str, int]:
    """(name, bytes); of a container, what it may use."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.total_memory
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    return "this machine's memory", physical if allowed == "max" else min(physical, int(allowed))


def _cheapest_change(config: TrainConfig, rows: _Rows, plan: Plan, is_cuda: bool) -> str:
    """The first change that fits: those that cost speed, one of them and then both; last bfloat16, which also rounds.
    Where none does, what the least of them needs."""
    limit, least = USABLE * plan.memory, plan.peak

    def totals(changed: TrainConfig) -> list[int]:
        return [phase.total for phase in _phases(changed, rows, is_cuda=is_cuda)[0]]

    for base in _bases(config):
        needs = [phase.total for phase in plan.phases] if base == config else totals(base)
        if max(needs) <= limit:
            return f"the cheapest change that fits: {_told(config, base)}: {_size(max(needs))}"
        is_rollout = isinstance(base, PPOConfig)
        smaller = _smaller(base, rows, rollout=is_rollout and needs[0] > limit, training=needs[is_rollout] > limit)
        least = min(least, *needs, *(max(totals(changed)) for changed in smaller[-1:]))
        if least > limit:
            continue  # not even the smallest
        for changed in smaller:
            if (peak := max(totals(changed))) <= limit:
                return f"the cheapest change that fits: {_told(config, changed)}: {_size(peak)}"
    return (
        f"no setting of this command makes it fit: the least needs {_size(least)}; "
        "take a smaller model or a larger device"
    )


def _bases(config: TrainConfig) -> Iterator[TrainConfig]:
    """Settings that save memory without being a number to turn down, each on top of the one before. To compute the
    reference's log-probs once costs no speed, so nothing comes before it."""
    if isinstance(config, DPOConfig) and not config.precompute_ref_log_probs:
        config = replace(config, precompute_ref_log_probs=True)
    yield config
    if config.dtype != "bfloat16":
        yield replace(config, dtype="bfloat16")


def _smaller(config: TrainConfig, rows: _Rows, *, rollout: bool, training: bool) -> list[TrainConfig]:
    """Less side by side, in the phases that are too large; the least last."""
    packs = _on_policy_packs(config, rows) if isinstance(config, PPOConfig) else _offline_packs(config, rows)
    settings = [config]
    if training:
        sizes = _halvings(min(config.micro_batch_tokens, packs.largest.num_tokens), packs.longest)
        settings = [replace(config, micro_batch_tokens=size) for size in sizes] or settings
    if rollout and isinstance(config, PPOConfig):
        numbers = _halvings(min(config.rollout_batch_size, config.batch_size), 1)
        settings = [replace(each, rollout_batch_size=number) for each in settings for number in numbers]
    return [each for each in settings if each != config]


def _halvings(value: int, least: int) -> list[int]:
    """value / 2, value / 4, ... and at last `least`, all below `value`."""
    found = []
    while value > least:
        value = max(value // 2, least)
        found.append(value)
    return found


def _told(config: TrainConfig, changed: TrainConfig) -> str:
    names = ("precompute_ref_log_probs", "micro_batch_tokens", "rollout_batch_size", "dtype")
    return " ".join(
        f"--{name} {getattr(changed, name)}"
        for name in names
        if hasattr(config, name) and getattr(config, name) != getattr(changed, name)
    )
