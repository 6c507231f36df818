"""Rewards that are functions of the user's: of a rollout, or of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastrlhf.config import PPOConfig, RTOConfig
from fastrlhf.config.checks import at_default
from fastrlhf.config.functions import load_function
from fastrlhf.data.tokens import special_ids
from fastrlhf.rollout.engine import end_index
from fastrlhf.runtime.out_of_memory import is_out_of_memory
from fastrlhf.types import Rollout

RewardFunction = Callable[..., Any]
"""Of a Rollout: a number, earned at the last valid token, or one number per token of `rollout.completion`. One that has
a parameter called `completions` is of texts instead, as TRL's are: see `TextReward`."""

RESERVED = ("score", "missing_eos", "kl", "dpo", "length")
"""Names of the rewards that are built in."""

TEXTS = ("prompts", "completions", "completion_ids")
"""What a function of texts may take, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextReward:
    """A function of texts, `reward(prompts, completions, **kwargs)`: one number per response, earned at its last valid
    token.

    It is called once per batch, by keyword, with those of `TEXTS` that it takes, lists of one item per response: the
    prompt and the whole response, what a reset gave of it included, as text without special tokens; `completion_ids`
    are the response's tokens up to its EOS. Columns of the dataset are not there.
    """

    name: str
    function: RewardFunction
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rollouts: Sequence[Rollout]) -> Sequence[Any] | Tensor:
        """What the function gives, one item per rollout. Raises ValueError where it is another number of them."""
        eos, _ = special_ids(self.tokenizer)
        prompts, responses = [], []
        for rollout in rollouts:
            ids, cut = rollout.prefix.token_ids, len(rollout.prefix.token_ids) - rollout.prefix.num_reset
            prompts.append(ids[:cut])
            responses.append([*ids[cut:], *rollout.completion[: end_index(rollout, eos) + 1]])
        given = {"prompts": self._texts(prompts), "completions": self._texts(responses), "completion_ids": responses}
        values = call(self.name, self.function, **{name: given[name] for name in texts_taken(self.function)})
        if not isinstance(values, Sequence | Tensor) or len(values) != len(rollouts):
            raise ValueError(
                f"reward function {self.name!r}: gives {values!r} for {len(rollouts)} completions; give a list, one "
                "number per completion"
            )
        return values

    def _texts(self, ids: list[list[int]]) -> list[str]:
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [str(text) for text in texts]


def call(name: str, function: RewardFunction, *arguments: Any, **keywords: Any) -> Any:
    """What a function of the user's gives. Raises RuntimeError, which names it, from whatever it raises but a lack of
    memory: with its own lines in the traceback, whatever the class of the error."""
    try:
        return function(*arguments, **keywords)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RuntimeError(f"reward_functions: {name!r} raised {type(error).__name__}: {error}") from error


def texts_taken(function: RewardFunction) -> tuple[str, ...]:
    """Those of `TEXTS` that a function of texts takes; none for a function of a Rollout.

    Raises ValueError where it cannot do without something else.
    """
    try:
        parameters = signature(function).parameters
    except (TypeError, ValueError):  # some callables that are written in C have none
        return ()
    if "completions" not in parameters:
        return ()
    rest = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    needed = [name for name, one in parameters.items() if one.default is Parameter.empty and one.kind not in rest]
    if others := [name for name in needed if name not in TEXTS]:
        raise ValueError(f"asks for {', '.join(others)}; a function of completions is given {', '.join(TEXTS)}")
    takes_all = any(one.kind is Parameter.VAR_KEYWORD for one in parameters.values())
    return tuple(name for name in TEXTS if takes_all or name in parameters)


def load_reward_functions(
    config: PPOConfig, functions: Mapping[str, RewardFunction] | None = None
) -> dict[str, RewardFunction]:
    """The user's rewards by name, that of the configuration after `functions`.

    Raises ValueError where RTO has no DPO model, a function is none or asks for what there is not, its name is taken,
    or there is none for the keys of functions.
    """
    if isinstance(config, RTOConfig) and not config.dpo_model_path:
        raise ValueError("dpo_model_path: give the DPO model that rewards the tokens, trained by `fastrlhf dpo`")
    named = list((functions or {}).items())
    for path in config.reward_functions:
        named.append((path.rpartition(":")[2], load_function(path, "reward_functions")))
    names = [*RESERVED, *(name for name, _ in named)]
    for name, function in named:
        if names.count(name) > 1:
            raise ValueError(f"reward_functions: {name!r} is the name of another reward; call it otherwise")
        try:
            texts_taken(function)
        except ValueError as error:
            raise ValueError(f"reward_functions: {name!r} {error}") from error
    at_default(config, [(bool(named), "without a reward function", ("reward_function_norm", "reward_function_clip"))])
    return dict(named)


def function_weights(config: PPOConfig) -> dict[str, float]:
    """By the names of the functions of `reward_functions`."""
    names = [path.rpartition(":")[2] for path in config.reward_functions]
    return dict(zip(names, config.reward_weights or [1.0] * len(names), strict=True))
