"""What a token earns: named addends, each a float32 [R] over the flat rows of a batch of episodes; the reward is their
sum. RTO (Zhong et al. 2024, arXiv 2404.18922, eq. 4.7) is PPO with one more of them, `dpo`:

    r_h = beta1 log(pi_dpo / pi_ref) - beta2 log(pi / pi_ref) + [h is the last token] beta3 score

beta1 is `dpo_reward_scale`, beta2 is `kl_coef`, beta3 is `score_coef`. Prompts and resets earn nothing, nor does what
follows an EOS; under compat "reference" the KL alone is charged there too, as the authors of DR-PO do. With
`kl_placement` loss the KL is no reward.

With `truncation` bootstrap a response that the budget cut goes on, and what a whole one earns at its end, the score
above all, is not paid: the critic's value of the state after the cut expects it, and it would count twice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from fastrlhf.config import PPOConfig
from fastrlhf.distributed.ranks import on_first
from fastrlhf.models.loading import resolve_device
from fastrlhf.rewards.functions import (
    RewardFunction,
    TextReward,
    call,
    function_weights,
    load_reward_functions,
    texts_taken,
)
from fastrlhf.rewards.implicit import ImplicitReward
from fastrlhf.rewards.kl_controller import KLController
from fastrlhf.types import Rollout

log = logging.getLogger(__name__)

MOMENTS = "moments."
"""In a saved state the name of an addend follows."""


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """What an addend may know: the R rows of N episodes, flat, episode after episode. Log-probs in nats, float32."""

    rollouts: Sequence[Rollout]
    cu_rows: Tensor
    """(N+1,) int32"""
    sampled: Tensor
    """[R] bool: the tokens of the completions, in order"""
    earns: Tensor
    """[R] bool: the sampled tokens up to the first EOS"""
    end: Tensor
    """[N] int64: the row of the last valid token"""
    missing_eos: Tensor
    """[N] bool"""
    score: Tensor
    """[N] float32, of the judge"""
    token: Tensor
    """[R] int64"""
    logprob: Tensor
    """[R] of the sampler"""
    reference_logprob: Tensor
    """[R]"""
    dpo_log_ratio: Tensor | None
    """[R] log(pi_dpo / pi_ref) at temperature 1; None where there is no such model"""
    exact_kl: Tensor | None = None
    """[R] KL(sampler || reference) of the state that the token was drawn in; None where the KL is that of the token"""
    goes_on: Tensor | None = None
    """[N] bool: cut by the budget, and their return goes on with the critic's value; None where every episode ends"""

    @property
    def finished(self) -> Tensor:
        """[N] bool: those that are paid what a whole response earns"""
        return torch.ones_like(self.missing_eos) if self.goes_on is None else ~self.goes_on


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One addend."""

    reward: Tensor
    """[R] float32"""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """0-dim each"""


@dataclass(kw_only=True)
class Rewards:
    """The addends of one run, and what they keep from batch to batch. `open_rewards` makes it."""

    config: PPOConfig
    functions: Mapping[str, RewardFunction | TextReward] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of functions, by name; 1 where there is none"""
    implicit: ImplicitReward | None = None
    """Where the DPO rewards come from: `open_implicit_reward`, once the reference of the run is there"""
    sentence_ends: Tensor | None = None
    """int64 ids of the tokens that end a sentence, for the shaping "sentence" """
    kl: KLController = field(init=False)
    _moments: dict[str, Tensor] = field(init=False, default_factory=dict)
    """By addend [3] float64: count, sum and sum of squares of what its normaliser has seen so far"""
    _warned: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        config = self.config
        self.kl = KLController(coef=config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)

    def terms(self, episodes: Episodes) -> dict[str, Term]:
        """Every addend by its name, in the order in which they are summed."""
        config = self.config
        terms = {"score": self._score(episodes)}
        if config.missing_eos_penalty is not None:
            penalty = -config.missing_eos_penalty * episodes.missing_eos.float()
            terms["missing_eos"] = Term(reward=_at_end(penalty, episodes))
        if config.kl_placement == "reward":
            charged = episodes.logprob - episodes.reference_logprob if episodes.exact_kl is None else episodes.exact_kl
            terms["kl"] = Term(reward=-self.kl.coef * charged)
        if episodes.dpo_log_ratio is not None:
            terms["dpo"] = self._dpo(episodes, episodes.dpo_log_ratio)
        if config.length_coef:
            terms["length"] = Term(reward=-config.length_coef * episodes.earns.float())
        for name, function in self.functions.items():
            terms[name] = self._function(name, function, episodes)
        return terms

    def state_dict(self) -> dict[str, Any]:
        """What later batches depend on: the moments by addend, and whether a warning was given."""
        return {"warned": self._warned} | {MOMENTS + name: moments for name, moments in self._moments.items()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self._warned = state["warned"]
        self._moments = {key.removeprefix(MOMENTS): x for key, x in state.items() if key.startswith(MOMENTS)}

    def warn(self, metrics: Mapping[str, float]) -> None:
        """Says once in a run that the token rewards outweigh the score, which the authors of RTO advise against."""
        ratio = metrics.get("rto/return_to_score", 0.0)
        if ratio > 1 and self.config.score_coef > 0 and not self._warned:
            self._warned = True
            log.warning(
                "rto: the DPO rewards of an episode are %.2g times its score; lower dpo_reward_scale, or the policy "
                "follows the DPO model rather than the judge",
                ratio,
            )

    def _score(self, episodes: Episodes) -> Term:
        config = self.config
        score = torch.where(episodes.finished, episodes.score, 0.0)
        if config.score_norm == "running":
            score = self._standardised("score", score, episodes.finished)
        kept, clipped = clip(score, config.score_clip)
        metrics = {"reward/score_clipped": clipped.float().mean()} if config.score_clip else {}
        if config.missing_eos_score is not None:
            kept = torch.where(episodes.missing_eos, config.missing_eos_score, kept)
        return Term(reward=_at_end(config.score_coef * kept, episodes), metrics=metrics)

    def _standardised(self, name: str, values: Tensor, counts: Tensor) -> Tensor:
        """(value - mean) / std where `counts` [bool] is True, over all that the run has seen there, these included; 0
        elsewhere."""
        seen = torch.where(counts, values, 0.0).double()
        batch = torch.stack([counts.sum().double(), seen.sum(), (seen**2).sum()])
        before = self._moments.get(name)
        self._moments[name] = batch if before is None else before.to(batch.device) + batch
        count, total, squares = self._moments[name]
        mean = total / count
        std = (squares / count - mean**2).clamp(min=0).sqrt()
        return torch.where(counts, (seen - mean) / std.clamp(min=1e-6), 0.0).float()

    def _function(self, name: str, function: RewardFunction | TextReward, episodes: Episodes) -> Term:
        config = self.config
        reward, paid = function_term(name, function, episodes)
        if config.reward_function_norm == "running":
            reward = self._standardised(name, reward, paid)
        reward, clipped = clip(reward, config.reward_function_clip)
        share = clipped.sum() / paid.sum().clamp(min=1)  # one number each, and all responses cut: none is paid
        metrics = {f"reward/{name}_clipped": share} if config.reward_function_clip else {}
        return Term(reward=self.weights.get(name, 1.0) * reward, metrics=metrics)

    def _dpo(self, episodes: Episodes, log_ratio: Tensor) -> Term:
        config, earns = self.config, episodes.earns
        # Not a product with `earns`: a row that does not count may be infinite.
        ratio = torch.where(earns, log_ratio, 0.0)
        if config.dpo_reward_norm == "running":
            ratio = self._standardised("dpo", ratio, earns)
        token, clipped = clip(config.dpo_reward_scale * ratio, config.dpo_reward_clip)
        ends = torch.zeros_like(earns).index_fill(0, episodes.end, True)
        sentence_ends = ends
        if self.sentence_ends is not None:
            sentence_ends = ends | (earns & torch.isin(episodes.token, self.sentence_ends))
        metrics = {
            "rto/token_reward_mean": token.sum() / earns.sum(),
            "rto/abs_sum": token.abs().sum() / len(episodes.rollouts),
        }
        if config.dpo_reward_clip:
            metrics["reward/dpo_clipped"] = clipped.sum() / earns.sum()
        return Term(reward=shaped(token, config.reward_shaping, ends, sentence_ends), metrics=metrics)


def own_kl_advantage(episodes: Episodes, coef: float) -> Tensor | None:
    """[R]: what an exact KL in the reward leaves out of the advantage of the token itself; None for a sampled one.

    The exact KL of a state is the same whatever is drawn there, so as a reward it teaches the tokens before it and
    not the token itself. Its log-ratio does: coef * (exact_kl - log_ratio) has mean 0 in every state, and the mean of
    grad logprob times it is -coef times the gradient of the state's KL. Of the KL of later states nothing is sampled
    (Amini et al. 2025, arXiv 2504.10637, condition it in this way).
    """
    if episodes.exact_kl is None:
        return None
    return coef * (episodes.exact_kl - (episodes.logprob - episodes.reference_logprob))


def shaped(token: Tensor, shaping: str, ends: Tensor, sentence_ends: Tensor) -> Tensor:
    """The token rewards [R] of RTO, or one of the ablations of its section 5.2.

    token     where they are (RTO)
    sentence  summed over a sentence, at the token that ends it; what follows the last one, at the end (Semi-RTO)
    eos       summed over the response, at its end (DDPO)
    rs        where they are, and minus their sum at the end: the return is that without them (RS-PPO)
    none      nothing (PPO)

    `ends` [R] bool is True at the last valid token of every episode, `sentence_ends` [R] bool there and at the last
    token of every sentence. With gamma 1 the first three have one optimum, and so have the last two.
    """
    match shaping:
        case "token":
            return token
        case "sentence":
            return moved_to(token, sentence_ends)
        case "eos":
            return moved_to(token, ends)
        case "rs":
            return token - moved_to(token, ends)
        case _:
            return torch.zeros_like(token)


def moved_to(reward: Tensor, stops: Tensor) -> Tensor:
    """Every reward [R] moved on to the next row where `stops` [R] bool is True (its own row, if it is one), summed."""
    group = stops.cumsum(0) - stops.long()
    # In float64, so that the order in which a GPU adds is lost in rounding.
    sums = torch.zeros(len(reward) + 1, dtype=torch.float64, device=reward.device)
    sums.index_add_(0, group, reward.double())
    return torch.where(stops, sums[group], 0.0).to(reward.dtype)


def clip(values: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The values within +-limit, and where [bool] they were not; a limit of 0 is none."""
    if not limit:
        return values, torch.zeros_like(values, dtype=torch.bool)
    return values.clamp(-limit, limit), values.abs() > limit


def function_term(name: str, function: RewardFunction | TextReward, episodes: Episodes) -> tuple[Tensor, Tensor]:
    """What a function of the user's gives [R] float32, and the rows [R] bool that it gives it to.

    Raises ValueError where that is neither one finite number nor one per sampled token, RuntimeError where it raises.
    """
    numbers: list[Tensor] = []
    tokens: list[Tensor] = []
    at_end: list[bool] = []
    rollouts = episodes.rollouts

    def ask() -> Sequence[Any] | Tensor:
        if isinstance(function, TextReward):
            return function(rollouts)
        return [call(name, function, rollout) for rollout in rollouts]

    values = on_first(ask)
    for rollout, value in zip(rollouts, values, strict=True):
        num, where = len(rollout.completion), f"reward function {name!r}: the response to row {rollout.prefix.row}"
        try:
            given = torch.as_tensor(value, dtype=torch.float32, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{where} earns {value!r}; give one number, or one per token") from None
        if given.shape not in ((), (num,)):
            raise ValueError(
                f"{where} has {num} tokens and rewards of shape {tuple(given.shape)}; give one number, or one per token"
            )
        if not given.isfinite().all():
            raise ValueError(f"{where} earns {given[~given.isfinite()][0].item()}")
        numbers.append(given.new_zeros(()) if given.ndim else given)
        tokens.append(given if given.ndim else given.new_zeros(num))
        at_end.append(not given.ndim)
    device = episodes.sampled.device
    by_token = torch.zeros(len(episodes.sampled), device=device)
    by_token.masked_scatter_(episodes.sampled, torch.cat(tokens).to(device))
    reward = _at_end(torch.stack(numbers).to(device), episodes) + torch.where(episodes.earns, by_token, 0.0)
    once = torch.tensor(at_end, device=device)
    num_rows = episodes.cu_rows.diff().long()
    paid = episodes.earns & ~once.repeat_interleave(num_rows, output_size=len(reward))
    return reward, paid | _at_end(once.float(), episodes).bool()


def reward_metrics(terms: Mapping[str, Term], cu_rows: Tensor) -> dict[str, Tensor]:
    """0-dim each: `reward/NAME`, the mean over episodes of what the addend gives to one; `reward/NAME_share`, its share
    of all rewards in absolute value, row by row; and what the addends report of themselves.

    Of the DPO term also, from its sum over each episode: `rto/share_of_return`, the share of those in absolute value,
    and `rto/return_to_score`, their size over the score's.
    """
    rewards = torch.stack([term.reward for term in terms.values()]).double()
    until = pad(rewards.cumsum(1), (1, 0))
    returns = until[:, cu_rows[1:]] - until[:, cu_rows[:-1]]
    sizes, return_sizes = rewards.abs().sum(1), returns.abs().sum(1)
    shares, return_shares = (x / x.sum().clamp(min=1e-12) for x in (sizes, return_sizes))
    metrics: dict[str, Tensor] = {}
    for i, (name, term) in enumerate(terms.items()):
        metrics |= {f"reward/{name}": returns[i].mean(), f"reward/{name}_share": shares[i]}
        metrics |= term.metrics
    if "dpo" in terms:
        dpo, score = (return_sizes[list(terms).index(name)] for name in ("dpo", "score"))
        metrics["rto/share_of_return"] = return_shares[list(terms).index("dpo")]
        metrics["rto/return_to_score"] = dpo / score.clamp(min=1e-12)
    return metrics


def open_rewards(
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    functions: Mapping[str, RewardFunction] | None = None,
) -> Rewards:
    """What the configuration asks for, but for models; `functions` are added to it.

    Raises ValueError where RTO has no DPO model, a function is none, or no token ends a sentence.
    """
    named, sentence_ends = load_reward_functions(config, functions), None
    if config.dpo_model_path and config.reward_shaping == "sentence":
        sentence_ends = sentence_end_ids(tokenizer).to(resolve_device(config.device))
    return Rewards(
        config=config,
        functions={
            name: TextReward(name=name, function=function, tokenizer=tokenizer) if texts_taken(function) else function
            for name, function in named.items()
        },
        weights=function_weights(config),
        sentence_ends=sentence_ends,
    )


def sentence_end_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """int64 ids of the tokens whose text, decoded alone, ends in . ! or ? (spaces aside) or holds a new line.

    Raises ValueError where the vocabulary has none.
    """
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    ends = [i for i, text in enumerate(texts) if "\n" in text or text.rstrip().endswith((".", "!", "?"))]
    if not ends:
        raise ValueError("reward_shaping: no token of this vocabulary ends a sentence; sentence would be eos")
    return torch.tensor(ends)


def _at_end(values: Tensor, episodes: Episodes) -> Tensor:
    """values [N] float32, each at the row of the last valid token of its episode, where that ends; 0 elsewhere."""
    paid = torch.where(episodes.finished, values, 0.0)
    return torch.zeros(len(episodes.sampled), device=values.device).index_copy(0, episodes.end, paid)
