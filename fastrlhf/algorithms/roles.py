"""Opens all models of an on-policy run before its first step: policy, reference, judges, critic and sampler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.algorithms.prefixes import make_roll_in
from fastrlhf.algorithms.psipo import dataset_opponents, load_psi, psi_judge
from fastrlhf.config import PPOConfig, require
from fastrlhf.config.checks import at_default
from fastrlhf.data.identity import judge_tokenizer, require_same_tokenizer
from fastrlhf.data.reading import TextReader, open_reader
from fastrlhf.data.specials import end_ids, special_ids
from fastrlhf.data.token_set import TokenSet
from fastrlhf.data.tokens import TextRules
from fastrlhf.distributed.ranks import together
from fastrlhf.evaluation.judges import Judge, asked_once, reward_model_judge
from fastrlhf.models.adapters import frozen_copy
from fastrlhf.models.architecture import check_head
from fastrlhf.models.given import policy_or_given
from fastrlhf.models.layers import LayerOptions
from fastrlhf.models.loading import (
    check_vocabulary,
    load_reward_model,
    read_model_config,
)
from fastrlhf.models.offload import Waiting
from fastrlhf.models.roles import critic_from, holds_adapter, judge_and_critic, new_critic, score_role
from fastrlhf.models.sharding import shard
from fastrlhf.models.vocabulary import limit_vocabulary
from fastrlhf.rewards.functions import RewardFunction, RewardFunctions
from fastrlhf.rewards.implicit import implicit_sources, open_implicit_reward
from fastrlhf.rewards.terms import Rewards, open_rewards
from fastrlhf.rollout.engine import Engine, TransformersEngine
from fastrlhf.rollout.probe import decoder_of
from fastrlhf.rollout.shared import SharedEngine
from fastrlhf.rollout.stop import StoppingEngine, Stops
from fastrlhf.rollout.vllm import check_vllm, open_vllm
from fastrlhf.runtime.inputs import Data
from fastrlhf.types import EndIds, TokenizedExample

log = logging.getLogger(__name__)

EngineFactory = Callable[[PPOConfig, PreTrainedModel, EndIds], Engine]
"""(config, policy, the ids that end a response) -> the engine of the run."""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The models of an on-policy run, by role."""

    policy: PreTrainedModel
    """The policy, which is trained."""
    reference: PreTrainedModel
    """The policy as it was at the start, frozen; adapters of other roles share its weights."""
    critic: PreTrainedModel | None
    """The critic, which is trained; None if the advantage estimator needs none."""
    judge: Judge | None
    """Scores each response; None if only reward functions or a DPO model give rewards."""
    score: Judge | None
    """The score used for training: the score of `judge` or, with `psi`, the comparison with other responses."""
    held_out_judge: Judge | None
    """A second judge, for evaluation only."""
    rewards: Rewards
    """The reward terms: how the reward of each token is computed."""
    sampler: Engine
    roll_in: Engine | None
    """Engine that samples the responses from which `reset_source: sample` copies; None for other sources."""
    stops: Stops | None
    """The stop strings of a response; None if there are none."""
    waiting: Waiting
    """The frozen models, which may be in CPU memory while they are not used."""


def check_sources(
    config: PPOConfig,
    *,
    judge: Judge | None,
    engine: EngineFactory | None,
    functions: Mapping[str, RewardFunction] | None = None,
) -> None:
    """Reads the configuration of every model that `config` names, before data is read or weights are loaded.

    `functions` are further reward functions, by name, that `config` does not name. Raises ValueError, naming the key,
    for a model that is missing, unreadable or of the wrong kind, when nothing rewards a response, and for keys that
    concern a score when there is no judge.
    """
    if functions is not None and not isinstance(functions, Mapping):
        kind = type(functions).__name__
        raise ValueError(
            f"reward_functions: must map names to functions, for example {{'correct': correct}}; got a {kind}"
        )
    implicit = implicit_sources(config)
    if judge is None and not config.reward_model_path:
        if not (config.reward_functions or functions or implicit):
            raise ValueError("reward_model_path: nothing rewards a response; give a reward model, or reward_functions")
        value, rule = config.missing_eos_score, "null without a reward model, whose score it replaces"
        unset = value in (None, type(config).missing_eos_score)  # the default of drpo is for runs with a reward model
        require(unset, "missing_eos_score", value, f"{rule}; missing_eos_penalty subtracts from any reward")
        at_default(config, [(False, "without a reward model", ("psi", "score_norm", "score_clip"))])
        judged = bool(config.reward_functions or functions)
        rule = "another source without a reward model or reward functions, which decide what failed"
        require(judged or config.reset_source != "rollout", "reset_source", config.reset_source, rule)
        rule = "none without a reward model or reward functions, which decide what succeeded"
        require(judged or config.dpo_refine == "none", "dpo_refine", config.dpo_refine, rule)
    sources = implicit | {name: getattr(config, name) for name in ("reward_model_path", "eval_reward_model_path")}
    for field, source in (sources | {"critic_model_path": config.critic_model_path}).items():
        if source and not holds_adapter(source):
            found = read_model_config(source, field, config.trust_remote_code)
            if field not in implicit:
                check_head(found, source, field)
    if config.engine == "vllm" and engine is None:
        check_vllm(config)


def open_roles(
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenizedExample],
    *,
    model: PreTrainedModel | None = None,
    judge: Judge | None = None,
    held_out_judge: Judge | None = None,
    engine: EngineFactory | None = None,
    functions: RewardFunctions | None = None,
    data: Data | None = None,
) -> Roles:
    """Loads the models of the run, shards them if there are several processes, and makes the sampler. `data` holds the
    rows with their text, which a judge with another tokenizer reads. `judge`, `held_out_judge` and `engine` replace the
    reward models and the engine that `config` names. Raises ValueError as `check_sources` and the loaders of models do.
    """
    rewards = open_rewards(config, tokenizer, functions)
    policy = policy_or_given(config, tokenizer, model)
    limit_vocabulary(policy, tokenizer)
    if engine is None and config.engine == "transformers":
        decoder_of(policy)  # checked before the other models are loaded
    reference = frozen_copy(policy)
    talks = data is not None and data.conversations
    rewards.implicit = open_implicit_reward(config, tokenizer, reference, talks)
    frozen: list[PreTrainedModel] = [reference, *(rewards.implicit.frozen if rewards.implicit else ())]
    eos, (_, pad) = end_ids(tokenizer), special_ids(tokenizer)
    needs_critic, starts_at = config.advantage_estimator == "gae", config.critic_model_path
    reward_model = critic = None
    scorer = _Scorer(tokenizer=tokenizer)
    if config.reward_model_path and (judge is None or (needs_critic and not starts_at)):
        scorer = _find_scorer(config, "reward_model_path", tokenizer, data)
        if judge is None or scorer.same_ids:
            reward_model = _open_reward_model(config, "reward_model_path", reference, scorer.tokenizer)
    if needs_critic and starts_at:
        require_same_tokenizer("critic_model_path", starts_at, tokenizer, config, conversations=False)
        critic = critic_from(config, _open_reward_model(config, "critic_model_path", reference, tokenizer), starts_at)
    elif needs_critic and not scorer.same_ids:
        told = "reward_model_path: the critic cannot start from it, whose tokenizer gives other ids; it starts from %s"
        log.warning(told, "the policy, its values at 0; critic_model_path names another model")
        critic = new_critic(config, reference, pad)
    elif needs_critic and reward_model is not None:
        reward_model, critic = judge_and_critic(config, reward_model)
    elif needs_critic:
        critic = new_critic(config, reference, pad)
    if judge is not None:
        judge = asked_once(judge)
    elif reward_model is not None:
        frozen.append(reward_model.requires_grad_(False))
        judge = reward_model_judge(
            reward_model, eos_token_id=eos, micro_batch_tokens=config.micro_batch_tokens, reader=scorer.reader
        )
    if held_out_judge is not None:
        held_out_judge = asked_once(held_out_judge)
    elif config.eval_reward_model_path:
        second = _find_scorer(config, "eval_reward_model_path", tokenizer, data)
        frozen.append(_open_reward_model(config, "eval_reward_model_path", reference, second.tokenizer))
        held_out_judge = reward_model_judge(
            frozen[-1], eos_token_id=eos, micro_batch_tokens=config.micro_batch_tokens, reader=second.reader
        )
    score = judge
    if config.psi and judge is not None:
        opponents = [] if config.psi_opponents == "rollouts" else [config.psi_opponents]
        others = dataset_opponents(prompts, opponents) if opponents else None
        score = psi_judge(judge, others, load_psi(config.psi, config.psi_clip))
    trained = [policy, critic] if critic else [policy]
    if rewards.implicit and rewards.implicit.trained:
        trained.append(rewards.implicit.model)
    shard(*trained, *frozen)
    sampler = SharedEngine(
        engine=(engine or make_engine)(config, policy, eos), model=policy, response_length=config.response_length
    )
    stops = Stops(strings=config.stop, tokenizer=tokenizer) if config.stop else None
    return Roles(
        policy=policy,
        reference=reference,
        critic=critic,
        judge=judge,
        score=score,
        held_out_judge=held_out_judge,
        rewards=rewards,
        sampler=sampler if stops is None else StoppingEngine(engine=sampler, stops=stops),
        stops=stops,
        roll_in=make_roll_in(config, reference, eos) if config.reset_source == "sample" else None,
        waiting=Waiting(frozen if config.ref_reward_offload else (), trained, policy.device),
    )


def make_engine(config: PPOConfig, policy: PreTrainedModel, eos_token_id: EndIds) -> Engine:
    """Makes the engine that the configuration names; it samples with the weights that `policy` has at each call."""
    if config.engine == "vllm":
        return together(lambda: open_vllm(config, policy, eos_token_id))
    return TransformersEngine.of(config, policy, eos_token_id, stop_at_eos=config.compat == "fixed")


@dataclass(frozen=True, kw_only=True)
class _Scorer:
    """Describes how a reward model reads the rollouts of the run: as ids or as text."""

    tokenizer: PreTrainedTokenizerBase
    """The tokenizer whose ids the reward model reads."""
    reader: TextReader | None = None
    """Re-encodes the text of rollouts for the reward model; None: it reads the ids of the run."""
    same_ids: bool = True
    """Whether the reward model's tokenizer and the run's give a text the same ids; EOS and chat template may differ."""


def _find_scorer(config: PPOConfig, field: str, tokenizer: PreTrainedTokenizerBase, data: Data | None) -> _Scorer:
    source, talks = getattr(config, field), data is not None and data.conversations
    found = judge_tokenizer(field, source, tokenizer, config, conversations=talks)
    if found is None:
        return _Scorer(tokenizer=tokenizer)
    theirs, different = found
    same_ids = different.what != "ids"
    if not same_ids and holds_adapter(source):
        rule = "is an adapter over the weights of the run but has another tokenizer"
        raise ValueError(f"{field}: {source!r} {rule} ({different.told})")
    rows, rules = (TokenSet.joined(data.train, data.eval), data.rules) if data else (TokenSet(), TextRules())
    log.info("%s: another tokenizer than that of the run (%s): it reads the text", field, different.told)
    return _Scorer(tokenizer=theirs, reader=open_reader(field, tokenizer, theirs, rows, rules), same_ids=same_ids)


def _open_reward_model(
    config: PPOConfig, field: str, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Loads the reward model that `field` names, which must have a trained head and reads the ids of `tokenizer`. If it
    is an adapter, it shares the weights of `base`."""
    source, (_, pad) = getattr(config, field), special_ids(tokenizer)
    if holds_adapter(source):
        return score_role(source, base, field, pad)
    reward_model = load_reward_model(
        source,
        field=field,
        pad_token_id=pad,
        must_be_trained=True,
        device=base.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        layers=LayerOptions.of(config),
    )
    check_vocabulary({field: reward_model}, tokenizer)
    return reward_model
