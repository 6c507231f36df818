"""Computes the peak memory of each phase of a step: rollout, scoring, forward and backward, optimiser step.

Weights, gradients and optimiser state are counted from the configurations of the models, and the key-value cache of the
rollout from its shape. Activations are counted by running the trainer's forward and backward pass on tensors without
data (tools/plan/memory.py).

Not counted: fragmentation of the allocator, workspaces of cuBLAS and of attention, the dataset, and the Python
process with its libraries (0.3 to 0.5 GiB of CPU memory; on a GPU the CUDA context).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from fastrlhf.config import PPOConfig, ReferenceConfig, SFTConfig, TrainConfig
from fastrlhf.data.packing import pack
from fastrlhf.models.attention import run_alone
from fastrlhf.models.forward import enable_activation_checkpointing
from fastrlhf.models.layers import describe_alone, foresee_alone
from fastrlhf.models.loading import DTYPES
from fastrlhf.models.probe import one_line
from fastrlhf.rollout.kv_cache import rounded_up
from fastrlhf.runtime.optim import buckets
from fastrlhf.tools.plan.memory import FakeModel, Fakes
from fastrlhf.tools.plan.models import open_models
from fastrlhf.tools.plan.packs import Rows, find_packs
from fastrlhf.types import Segment

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a step, with the parts of the memory at its peak."""

    name: str
    parts: dict[str, int]
    """Part of the memory, in words -> its bytes."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def readable(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


@dataclass(frozen=True, kw_only=True)
class Count:
    """The memory of a step, phase by phase."""

    phases: list[Phase]
    """The phases in order; in on-policy runs the rollout is the first."""
    facts: list[str]
    """Lines about parameters, steps and tokens."""
    peak_recomputed: Callable[[], int]
    """Returns the peak with activation checkpointing, in bytes, from the models and packs of this count. Raises
    ValueError if the layers of a model cannot be recomputed."""


def count_phases(config: TrainConfig, rows: Rows, *, is_cuda: bool, memory: int = 0) -> Count:
    """Counts the memory of a step. vLLM on the trainer's device takes its share of `memory`, the bytes of the device.

    With `ref_reward_offload` the frozen models are on the device only in the phases that use them. Raises ValueError,
    as the run would, for a model that is missing or does not fit the configuration.
    """
    fakes = Fakes.of(config.dtype, is_cuda, memory)
    models = open_models(config, rows.tokenizer, fakes)
    trained, frozen = models.trained, models.frozen
    alone = foresee_alone(models.start, config.max_length)
    packs = find_packs(config, rows, alone=bool(alone))
    if alone:
        for fake in (*trained.values(), *frozen.values()):
            run_alone(fake.model, alone)
    weights = {f"weights of the {name}": models.own[name] for name in (*trained, *frozen) if models.own[name]}
    waits = isinstance(config, PPOConfig) and config.ref_reward_offload
    waiting = {part: weights.pop(part) for name in frozen if waits and (part := f"weights of the {name}") in weights}
    moments, copies, update = _optimiser(config, trained.values())
    gradients = sum(fake.gradient_bytes for fake in trained.values())
    paged = config.optim.startswith("paged")
    kept = weights | ({} if paged else moments) | {"float32 copies of bfloat16 weights": copies}
    live = frozen.get("reference") if isinstance(config, ReferenceConfig) else None

    def training_parts() -> dict[str, int]:
        try:
            by_token = _sums_over_tokens(config)
            beyond = fakes.peak(trained, packs.largest, reference=live, num_packs=packs.num_packs, by_token=by_token)
        except Exception as error:  # the code of a model family may raise any exception
            kinds = " and ".join(sorted({type(fake.model).__name__ for fake in trained.values()}))
            told = f"the memory of {kinds} cannot be counted without data ({one_line(error)}); measure a short run"
            raise ValueError(told) from error
        return {
            "gradients": min(gradients, beyond),
            "activations, blocks of logits, temporaries": max(0, beyond - gradients),
        }

    def peak_recomputed() -> int:
        for fake in trained.values():
            enable_activation_checkpointing(fake.model)
        changed = training_parts()
        return max(sum((phase.parts | changed if phase.name == training else phase.parts).values()) for phase in phases)

    pack_tokens = packs.largest.num_tokens
    training = f"forward and backward of {pack_tokens:,} tokens"
    phases = [Phase(name=training, parts=kept | training_parts())]
    if any(update.values()):
        phases.append(Phase(name="optimiser step", parts=kept | {"gradients": gradients} | update))
    if isinstance(config, PPOConfig):
        rollout = _rollout(config, rows, fakes, models.start, trained["policy"])
        before = [Phase(name=f"rollout of {rollout.name}", parts=kept | rollout.parts)]
        if waiting and config.reset_source == "sample":
            before.insert(
                0, Phase(name=f"sampling by the reference of {rollout.name}", parts=kept | waiting | rollout.parts)
            )
        if waiting:
            forward = {"activations of a forward without gradient": fakes.forward_peak(trained, packs.largest)}
            before.append(Phase(name=f"scoring of {pack_tokens:,} tokens", parts=kept | waiting | forward))
        phases = before + phases
        if config.engine == "vllm" and not config.vllm_devices:
            share = {"vLLM: weights and key-value cache": int(config.vllm_gpu_memory_utilization * memory)}
            if not config.vllm_enable_sleep_mode:
                phases = [Phase(name=phase.name, parts=phase.parts | share) for phase in phases]
            # The built-in engine samples for evaluation.
            phases.insert(1, Phase(name="sampling by vLLM", parts=kept | share))
    counts = {name: fake.num_parameters for name, fake in (*trained.items(), *frozen.items())}
    per_pass = f"one pass over a batch: {packs.tokens_per_step:,.0f} tokens, in at most {packs.num_packs} packs"
    facts = [
        "parameters: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()),
        f"{'updates' if isinstance(config, PPOConfig) else 'optimiser steps'}: "
        + ("not known before the dataset is read" if rows.steps is None else f"{rows.steps:,}"),
        f"weights in {config.dtype}",
        f"batch: {config.describe_batch()}",
        per_pass,
        *[rows.note] * bool(rows.note),
        *_ways(config, alone),
    ]
    if config.use_peft:
        facts.insert(
            1, "of them trained: " + ", ".join(f"{name} {fake.num_trained:,}" for name, fake in trained.items())
        )
    if waiting:
        facts.append(f"in CPU memory except while they are used: {readable(sum(waiting.values()))} of frozen weights")
    if paged:
        told = readable(sum(moments.values()))
        facts.append(f"optimiser state: {told} of paged memory, not counted below, since it can move to CPU memory")
    if config.activation_offloading:
        told = readable(max(_inputs_of_layers(fake, pack_tokens) for fake in trained.values()))
        facts.append(f"inputs of layers: {told}, not counted below, since they are kept in CPU memory")
    if isinstance(config, PPOConfig):
        passes = config.num_ppo_epochs
        facts.insert(
            facts.index(per_pass) + 1,
            f"one update: {passes} passes over its batch, {passes * config.num_mini_batches} optimiser steps",
        )
        facts += sampling_facts(config, models.start.get_text_config().vocab_size)
    return Count(phases=phases, facts=facts, peak_recomputed=peak_recomputed)


def _ways(config: TrainConfig, alone: str | None) -> list[str]:
    """Returns lines about a model whose sequences cannot share a pass. `alone`: the result of `foresee_alone`."""
    if alone is None:
        return ["whether the sequences of a pack can share a pass is measured at the start of the run"]
    if not alone:
        return []
    samples = isinstance(config, PPOConfig) and config.engine == "transformers"
    return [describe_alone(alone), *["sampling uses the cache of the model's own class, which is slower"] * samples]


def sampling_facts(config: PPOConfig, vocab_size: int) -> list[str]:
    """Returns lines about responses that are sampled in addition to the batch, and about the records of truncated
    sampling."""
    facts, num = [], config.batch_size
    if config.reset_source == "rollout":
        facts.append(
            f"sampled per update: {num:,} responses from the prompt, and at most {num:,} more from cuts of failures"
        )
    if config.dynamic_sampling_factor > 1:
        size = config.num_generations
        more = int(config.dynamic_sampling_factor * (num // size)) * size - num
        facts.append(
            f"sampled per update: {num:,} responses, and at most {more:,} more in place of groups with equal outcomes"
        )
    if config.truncated:
        tokens, most = num * config.response_length, min(config.top_k or vocab_size, vocab_size)
        facts.append(
            f"records of the tokens that could be drawn: at most {readable(4 * tokens * most)} of CPU memory, not "
            f"counted below ({most:,} for each of {tokens:,} sampled tokens)"
        )
    return facts


def _optimiser(config: TrainConfig, trained: Iterable[FakeModel]) -> tuple[dict[str, int], int, dict[str, int]]:
    """Returns the bytes of the moments, of the float32 copies of bfloat16 weights, and of the temporaries of an
    optimiser step."""
    in_float32 = in_8_bits = copies = update = 0
    keeps_copies = config.master_weights == "float32"
    for fake in trained:
        for _, small, params in buckets(fake.model, config):
            sizes = [param.numel() for _, param in params]
            in_float32 += 0 if small else 8 * sum(sizes)
            in_8_bits += sum(2 * size + 8 * -(-size // 256) for size in sizes) if small else 0
            copied = [param.numel() for _, param in params if param.dtype != torch.float32]
            copies += 4 * sum(copied) if keeps_copies else 0
            # Without copies, the weights are converted too, and one tensor at a time needs noise and new values.
            update = max(update, 4 * sum(copied) if keeps_copies else 8 * sum(copied) + 6 * max(copied, default=0))
    made = "gradients in float32" if keeps_copies else "gradients and weights in float32, noise"
    moments = {"optimiser state (float32, two per parameter)": in_float32, "optimiser state (8 bits)": in_8_bits}
    return moments, copies, {made: update}


def _sums_over_tokens(config: TrainConfig) -> bool:
    """Returns whether the loss of the policy is a sum over tokens that `linear_nll` or `linear_policy_loss` computes,
    rather than a loss of whole sequences, with an exact KL or over the tokens that truncated sampling kept."""
    if not isinstance(config, PPOConfig):
        return isinstance(config, SFTConfig)
    exact = config.kl_placement == "loss" and config.kl_estimator == "exact"
    return config.update == "clipped" and config.loss_type != "gspo" and not exact and not config.truncated


def _inputs_of_layers(fake: FakeModel, num_tokens: int) -> int:
    """Returns the bytes of pinned CPU memory for the inputs of all layers; torch allocates it in powers of 2."""
    text = fake.model.config.get_text_config()
    size = num_tokens * text.hidden_size * fake.model.dtype.itemsize
    return text.num_hidden_layers * 2 ** math.ceil(math.log2(size))


def _rollout(config: PPOConfig, rows: Rows, fakes: Fakes, model: PretrainedConfig, policy: FakeModel) -> Phase:
    """Returns the memory of generating `rollout_batch_size` episodes, without the weights: prompts are prefilled one
    micro-batch at a time, then each decode step adds one token per episode."""
    number = min(config.rollout_batch_size, config.batch_size)
    width = max(len(rows.examples[i].prompt) for batch in rows.batches for i in batch)
    text = model.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    item = DTYPES[config.dtype].itemsize
    per_layer = 2 * heads * head_dim * item * number * rounded_up(width + config.response_length)
    prefilled = min(number, max(1, config.micro_batch_tokens // width))
    # Peak of the prefill: a copy of one layer's keys for all episodes, and the forward pass over the prompts.
    prefill = per_layer // 2 + fakes.prefill_peak(policy, pack([Segment(token_ids=range(width))] * prefilled))
    # Logits, and in float32 the logits divided by the temperature, their log-softmax, its exponential and cumulative
    # sum.
    drawing = number * text.vocab_size * (item + 16)
    return Phase(
        name=f"{number:,} episodes of {width:,} + {config.response_length:,} tokens",
        parts={
            "key-value cache": per_layer * text.num_hidden_layers,
            "prefill, copies of keys, or logits of one token per episode": max(prefill, drawing),
        },
    )
