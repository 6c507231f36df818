"""PPO (Schulman et al. 2017, arXiv 1707.06347), GRPO (Shao et al. 2024, arXiv 2402.03300), DR-PO (Chang et al. 2024,
arXiv 2404.08495, Algorithm 2) and RTO (Zhong et al. 2024, arXiv 2404.18922): one trainer.

    repeat
      prefixes    prompts, or with probability `reset_prob` a prompt and the first k tokens of a response to it
      rollouts    the policy continues each prefix
      scores      the judge, if there is one, reads the whole response (with `psi`, against other responses: PsiPO)
      experience  log-probs under sampler and reference, values, rewards (of reward functions and of a DPO model) and
                  advantages, of the sampled tokens only
      updates     `num_ppo_epochs` passes over the packs with the clipped losses or, if `update` is pair, a pair loss

DR-PO with reset probability 0 equals PPO bit for bit, and so does RTO with scale 0. DR-PO and RTO can be combined. Only
`advantage_estimator` gae uses a critic.

`fastrlhf ppo|grpo|drpo|rto --config FILE`
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.algorithms.dynamic_sampling import DROPPED_TOKENS, refilled
from fastrlhf.algorithms.experience import (
    keeps_reference_states,
    pack_episodes,
    score_episodes,
    with_reference_states,
)
from fastrlhf.algorithms.guards import check_kl, check_sampler
from fastrlhf.algorithms.judging import JudgedRollouts, judged_once, judged_rollouts
from fastrlhf.algorithms.open_update import OpenUpdate
from fastrlhf.algorithms.own_resets import DROPPED, restart_failures
from fastrlhf.algorithms.pair_update import update_pairs
from fastrlhf.algorithms.prefixes import draw_prefixes, reset_fields, sentence_ends_of
from fastrlhf.algorithms.prime import refine
from fastrlhf.algorithms.roles import EngineFactory, check_sources, open_roles
from fastrlhf.algorithms.update import update
from fastrlhf.config import PPOConfig, require
from fastrlhf.data.given import Rows
from fastrlhf.data.packing import check_micro_batch
from fastrlhf.data.specials import end_ids
from fastrlhf.distributed.ranks import from_all, world_size
from fastrlhf.evaluation.held_out import evaluate
from fastrlhf.evaluation.judges import Judge
from fastrlhf.models.precision import resolved
from fastrlhf.models.vocabulary import check_sampled
from fastrlhf.report.samples import sample_rows
from fastrlhf.rewards.functions import RewardFunction, TrainerState, open_reward_functions
from fastrlhf.rollout.engine import checked_rollouts
from fastrlhf.runtime.inputs import Data, open_inputs, with_room
from fastrlhf.runtime.mixing import shares_of
from fastrlhf.runtime.optim import Optimizer, index_batches, num_steps
from fastrlhf.runtime.result import TrainResult
from fastrlhf.runtime.run import Run
from fastrlhf.types import Prefix, Rollout, TokenizedExample

NUM_SAMPLES = 4
"""Number of episodes that are written to samples.jsonl at a time."""


def train_ppo(
    config: PPOConfig,
    examples: Rows | None = None,
    eval_examples: Rows | None = None,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    judge: Judge | None = None,
    held_out_judge: Judge | None = None,
    engine: EngineFactory | None = None,
    reward_functions: Mapping[str, RewardFunction] | None = None,
    callbacks: Sequence[object] = (),
) -> TrainResult:
    """Trains `config.model_name_or_path` against a judge or reward functions. `examples` replace the configured
    dataset; `model`, which is then trained in place, and `tokenizer` replace those that `config` names. `callbacks` are
    called at fixed points of the run (runtime/callbacks.py).

    `judge` replaces the reward model of `reward_model_path` as the judge; if this key is set, the critic still starts
    from that model. `held_out_judge` replaces the reward model of `eval_reward_model_path`. `engine` replaces
    `make_engine`: it is called once with the policy, and the engine that it returns must use the current weights of
    this policy in every `generate`. `reward_functions` are additional reward functions, by the names under which they
    are logged (rewards/functions.py). Each update gives one row of metrics, under TRL's names if it has them. Raises
    ValueError for bad input before training starts, and if training must stop (algorithms/guards.py).
    """
    config = resolved(config, PPOConfig, "train_ppo", model)
    check_sources(config, judge=judge, engine=engine, functions=reward_functions)
    rewarded = bool(config.reward_functions or reward_functions)
    keep_rows = rewarded or bool(config.reward_model_path or config.eval_reward_model_path)
    tokenizer, data = open_inputs(
        config, _fields_read(config), examples, eval_examples, tokenizer=tokenizer, keep_rows=keep_rows
    )
    rows, eval_rows = (data.train_rows, data.eval_rows) if rewarded else ({}, {})
    functions = open_reward_functions(config, tokenizer, reward_functions, rows)
    sentence_ends = sentence_ends_of(config, tokenizer)
    _check_ranks(config)
    prompts, held_out = _prompts(config, data)
    if (held_out_judge or config.eval_reward_model_path) and not held_out:
        raise ValueError("eval_reward_model_path: no rows to judge; give num_eval_examples or dataset_test_split")
    steps = num_updates(config, len(prompts))
    if steps <= config.value_warmup_steps:
        raise ValueError(
            f"value_warmup_steps: must be below the {steps} updates of the run, or the policy is never trained"
        )
    functions.rehearse(prompts, config.response_length)
    judges = {"judge": judge, "held_out_judge": held_out_judge}
    roles = open_roles(config, tokenizer, prompts, model=model, **judges, engine=engine, functions=functions, data=data)
    policy, reference, critic, rewards = roles.policy, roles.reference, roles.critic, roles.rewards
    eos = end_ids(tokenizer)
    num_groups = config.batch_size // config.num_generations
    shares = shares_of(config, prompts)
    batches = index_batches(len(prompts), num_groups, steps, config.seed, shares)
    token_rewarder = rewards.implicit.model if rewards.implicit and rewards.implicit.trained else None
    refiner = _refiner(config, token_rewarder, steps) if token_rewarder is not None else None
    optimizer = _optimizer(config, policy, critic, steps)
    sample_every = -(-steps // config.num_sample_generations) if config.num_sample_generations else 0
    evaluate_held_out = partial(
        evaluate,
        *(config, policy, reference, roles.judge, held_out, eos, roles.held_out_judge, roles.waiting.present),
        functions=replace(functions, rows=eval_rows),
        stops=roles.stops,
    )
    judge_all = partial(judged_rollouts, config, roles)
    opened = OpenUpdate(device=policy.device)

    def sample(prefixes: Sequence[Prefix]) -> Sequence[Rollout]:
        rollouts = checked_rollouts(
            roles.sampler.generate(prefixes),
            prefixes,
            eos_token_id=eos,
            stops_at_eos=config.compat == "fixed",
            may_stop=bool(config.stop),
            truncated=config.truncated,
        )
        check_sampled(policy, (token for rollout in rollouts for token in rollout.completion))
        return rollouts

    def sample_from(rows: Sequence[TokenizedExample], **place: Any) -> Sequence[Rollout]:
        with roles.waiting.present() if roles.roll_in else nullcontext():
            prefixes = draw_prefixes(config, rows, **place, roll_in=roles.roll_in)
        return sample(prefixes)

    def sample_judged(progress: float, rows: Sequence[TokenizedExample], first_group: int) -> JudgedRollouts:
        rollouts = sample_from(rows, first_group=first_group, progress=progress, sentence_ends=sentence_ends)
        with roles.waiting.present():
            return judge_all(rollouts)

    with Run(
        _name(config),
        config,
        steps,
        (policy, tokenizer),
        value_model=critic,
        dpo_model=token_rewarder,
        data=data,
        parts={"optimizer": optimizer, "rewards": rewards, "kl": rewards.kl, "update": opened}
        | ({"dpo_optimizer": refiner} if refiner is not None else {}),
        evaluate=evaluate_held_out if held_out else None,
        functions=reward_functions,
        callbacks=callbacks,
    ) as run:
        opened.stop = partial(run.between_parts, resumable=True)
        for step, indices in run.remaining(batches):
            functions.state = TrainerState(global_step=step, max_steps=steps)
            order = np.random.default_rng([config.seed, step]).permutation(num_groups).tolist()
            if opened.experience is not None:  # the run was resumed in the middle of this update
                packs = pack_episodes(config, opened.rollouts, order, policy.device)
                if keeps_reference_states(config):
                    opened.experience = with_reference_states(opened.experience, reference, packs)
            else:
                start = time.perf_counter()
                drawn = [prompts[i] for i in indices]
                place: dict[str, Any] = {
                    "first_group": step * num_groups,
                    "progress": step / steps,
                    "sentence_ends": sentence_ends,
                }
                rewarded, refined = None, dict[str, float]()
                if config.dynamic_sampling_factor > 1:
                    rewarded, restarts = refilled(
                        config, prompts, indices, step, partial(sample_judged, step / steps), shares
                    )
                    rollouts = rewarded.rollouts
                else:
                    rollouts, restarts = sample_from(drawn, **place), dict[str, float]()
                if config.reset_source == "rollout":
                    with roles.waiting.present():
                        rewarded = judge_all(rollouts)
                    found = (rewarded.outcome, rewarded.succeeded)
                    rollouts, restarts = restart_failures(config, rollouts, *found, sample=sample, **place)
                sampled = time.perf_counter()
                run.between_parts()
                packs = pack_episodes(config, rollouts, order, policy.device)
                with roles.waiting.present():
                    rewarded = judged_once(rewarded, rollouts, config.num_generations, judge_all)
                    if refiner is not None:
                        assert rewards.implicit is not None
                        label = rewarded.succeeded
                        refined = refine(config, rewards.implicit, reference, refiner, rollouts, label, packs)
                    experience, metrics = score_episodes(
                        *(config, policy, reference, critic, rollouts, rewarded.scores, packs, eos, rewards),
                        earned=rewarded.earned,
                        parts=run.parts,
                    )
                    metrics |= rewarded.metrics
                difference = metrics["sampling/sampling_logp_difference/mean"]
                check_sampler(config, step + 1, difference, policy, own=engine is not None)
                check_kl(config, step + 1, metrics["objective/kl"])
                due = sample_every and run.due(step, sample_every)
                samples = sample_rows(tokenizer, rollouts, experience, NUM_SAMPLES, rewarded.extra) if due else []
                timing = {"timing/rollout": sampled - start, "timing/scoring": time.perf_counter() - sampled}
                opened.begin(rollouts, experience, metrics | restarts | refined | timing, samples)
                run.between_parts()
            assert opened.experience is not None
            rollouts, metrics, scored = opened.rollouts, dict(opened.metrics), time.perf_counter()
            given = (rollouts, opened.experience, packs, (config.seed, step))
            if config.update == "pair":
                metrics |= update_pairs(config, policy, optimizer, *given, opened=opened)
            else:
                metrics |= update(
                    *(config, policy, critic, optimizer, *given),
                    reference=reference,
                    critic_only=step < config.value_warmup_steps,
                    opened=opened,
                )
            if step >= config.value_warmup_steps:
                rewards.kl.update(metrics["objective/kl"], len(rollouts))
            metrics |= {
                "timing/training": time.perf_counter() - scored,
                "episode": (step + 1) * config.batch_size,
                "num_tokens": sum(len(rollout.completion) for rollout in rollouts)
                + sum(metrics.get(name, 0) for name in (DROPPED, DROPPED_TOKENS)),  # all sampled tokens
                # tokens computed in one pass over the batch
                "num_unique_tokens": sum(from_all(sum(item.batch.num_tokens for mini in packs for item in mini))),
            }
            samples = opened.samples
            opened.end()
            run.log(step + 1, metrics, shown="objective/scores", samples=samples)
        return run.finish(policy, tokenizer, critic, token_rewarder)


train_on_policy = train_ppo
"""Deprecated name of `train_ppo`, to be removed in 0.3."""


def _prompts(config: PPOConfig, data: Data) -> tuple[Sequence[TokenizedExample], Sequence[TokenizedExample]]:
    """Returns the training and evaluation rows whose prompts leave room for a response; checks that each fits in a
    micro-batch."""
    prompts = with_room(data.train, "train", config.max_length, config.response_length)
    held_out = with_room(data.eval, "eval", config.max_length, config.response_length) if data.eval else []
    together = config.num_generations if config.share_trunks else 1
    for rows, responses in ((prompts, together), (held_out, 1)):
        if rows:
            check_micro_batch(config, rows, [len(row.prompt) + responses * config.response_length for row in rows])
    return prompts, held_out


def _optimizer(config: PPOConfig, policy: PreTrainedModel, critic: PreTrainedModel | None, updates: int) -> Optimizer:
    return Optimizer(
        {"": policy} | ({"value_": critic} if critic else {}),
        config,
        num_steps=updates * config.num_ppo_epochs * config.num_mini_batches,
        learning_rates={"value_": config.value_learning_rate or config.learning_rate},
        head_rates={"value_": config.head_learning_rate},
    )


def _refiner(config: PPOConfig, model: PreTrainedModel, updates: int) -> Optimizer:
    """Returns the optimiser of the DPO model, which takes one step per mini-batch of an update."""
    rate = {"dpo_": config.dpo_refine_learning_rate}
    return Optimizer({"dpo_": model}, config, num_steps=updates * config.num_mini_batches, learning_rates=rate)


def _check_ranks(config: PPOConfig) -> None:
    """Raises ValueError if several processes cannot divide the update, or would give other results than one process."""
    world = world_size()
    if world == 1:
        return
    episodes = config.batch_size // config.num_mini_batches
    items = episodes // (config.num_generations if config.share_trunks else 1)
    rule = f"such that the {items} trees of a mini-batch are a multiple of the {world} processes"
    require(items % world == 0, "num_mini_batches", config.num_mini_batches, rule)
    rule = f"empty in {world} processes, each of which has a vLLM engine on its own device"
    require(not config.vllm_devices, "vllm_devices", config.vllm_devices, rule)
    require(config.decode == "eager", "decode", config.decode, f"eager in {world} processes")
    require(not config.ref_reward_offload, "ref_reward_offload", True, f"false in {world} processes")
    own_mean = f"fixed in {world} processes: under reference every micro-batch is averaged separately"
    require(config.compat == "fixed", "compat", config.compat, own_mean)


def _fields_read(config: PPOConfig) -> list[str]:
    """Returns the responses that a row must have, because episodes start in them or `psi` compares with them."""
    opponents = [config.psi_opponents] if config.psi and config.psi_opponents != "rollouts" else []
    return list(dict.fromkeys([*reset_fields(config), *opponents]))


def _name(config: PPOConfig) -> str:
    parts = [name for name, used in (("drpo", config.reset_prob > 0), ("rto", config.has_dpo_rewards)) if used]
    return "+".join(parts) or ("ppo" if config.advantage_estimator == "gae" else config.advantage_estimator)


def num_updates(config: PPOConfig, num_prompts: int) -> int:
    """Returns the number of updates of a run: `max_steps`, or determined by `total_episodes` or `num_train_epochs`."""
    if config.max_steps == -1 and config.total_episodes:
        return max(1, config.total_episodes // config.batch_size)
    return num_steps(config, num_prompts * config.num_generations)
