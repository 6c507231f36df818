"""Calls reward functions, checks their results and handles their failures.

A function has one of two forms, which the names of its parameters tell apart:

    TRL's      One of its parameters is `prompts`, `completions` or `completion_ids`, or it takes only keywords
               (**kwargs). It is called once per batch, with keyword arguments that are lists of one item per response,
               and returns a list of numbers, the rewards of the last valid tokens of the responses.
    per token  All other functions. It is called with one Rollout and returns one number, or one number per token of
               `rollout.completion`.

A function of either form may be async, and may return None for a response that it does not judge. Only rank 0 calls it.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastrlhf.config import PPOConfig, RTOConfig
from fastrlhf.config.checks import at_default
from fastrlhf.config.functions import FunctionFailed, load_function
from fastrlhf.data.specials import end_ids
from fastrlhf.distributed.ranks import on_first
from fastrlhf.rewards import ready
from fastrlhf.rewards.lookups import is_async, warn_of_unknown_names
from fastrlhf.rewards.ready import READY
from fastrlhf.rollout.engine import end_index
from fastrlhf.runtime.out_of_memory import is_out_of_memory
from fastrlhf.types import Example, Prefix, Rollout, TokenizedExample

log = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]

Earned = dict[str, list[Tensor | None]]
"""Per reward function, one float32 tensor per rollout: 0-dim, or one number per token; None for a rollout that the
function does not judge."""

RESERVED = ("score", "missing_eos", "kl", "dpo", "length", "overlong")
"""Names of the built-in rewards."""

TEXTS = ("prompts", "completions", "completion_ids")
"""Parameters by which a function of TRL's form is recognised."""

GIVEN = (*TEXTS, "trainer_state", "log_extra", "log_metric")
"""Arguments that a function of TRL's form may take in addition to the columns of the dataset."""

DRY_ROWS = 2
"""Number of responses with which every function is called on trial before the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """Progress of the run, passed as TRL's argument `trainer_state`. It has only two of TRL's fields."""

    global_step: int
    """Number of completed updates."""
    max_steps: int
    """Number of updates of the whole run."""


@dataclass(kw_only=True)
class RewardFunctions:
    """The reward functions of a run. Calling the object with rollouts returns the rewards of every function, by its
    name."""

    functions: Mapping[str, RewardFunction] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    """Name of a function -> its weight; 1 if the name is missing."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """The tokenizer that decodes texts for functions of TRL's form; other functions do not need it."""
    rows: Mapping[int, Example] = field(default_factory=dict)
    """Row number -> the example whose prompt and columns are passed to functions of TRL's form."""
    retries: int = 0
    """Number of retries of a failing call, with waits of 1, 2, 4, ... seconds."""
    state: TrainerState = TrainerState(global_step=0, max_steps=0)
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics that functions logged with `log_metric` in the latest call: name -> mean of the logged numbers."""
    extra: dict[str, list[Any]] = field(default_factory=dict)
    """Columns that functions logged with `log_extra` in the latest call, with one value per response."""

    def __call__(self, rollouts: Sequence[Rollout]) -> Earned:
        """Returns the reward that each function gives to each rollout.

        Raises ValueError, naming the function and the row, if a result is neither a number, numbers per token nor None,
        and FunctionFailed if a function raises.
        """
        self.metrics, self.extra = {}, {}
        if not self.functions:
            return {}
        given, metrics, extra = on_first(lambda: self._ask(rollouts))
        self.metrics, self.extra = metrics, extra
        return {name: _checked(name, values, rollouts) for name, values in given.items()}

    def weight(self, name: str) -> float:
        return self.weights.get(name, 1.0)

    def totals(self, earned: Earned) -> list[float]:
        """Returns for each rollout the weighted sum of the rewards of all functions, summed over tokens."""
        columns = [
            [0.0 if value is None else self.weight(name) * value.sum().item() for value in values]
            for name, values in earned.items()
        ]
        return [sum(numbers) for numbers in zip(*columns, strict=True)]

    def rehearse(self, prompts: Sequence[TokenizedExample], response_length: int) -> None:
        """Calls every function with a few rows, so that a mistake is found before models are loaded.

        The response is the dataset's if the row has one, otherwise only an EOS. The state of functions is restored
        afterwards. Raises the errors of `__call__`.
        """
        if not self.functions or not prompts:
            return
        assert self.tokenizer is not None
        ends = end_ids(self.tokenizer)
        rollouts = []
        for i in range(DRY_ROWS):
            row = prompts[i % len(prompts)]
            ids = (row.reference or row.chosen or [ends[0]])[:response_length]
            prefix = Prefix(token_ids=row.prompt, num_reset=0, row=row.row, episode=i)
            ended = not set(ends).isdisjoint(ids)
            rollout = Rollout(prefix=prefix, completion=ids, sampler_logprob=[0.0] * len(ids), ended=ended)
            rollouts.append(rollout)
        before = self.state_dict()
        try:
            values = self(rollouts)
        except (RuntimeError, ValueError) as error:
            error.add_note(f"in a trial call on row {rollouts[0].prefix.row}, before the run")
            raise
        finally:
            self.load_state_dict(before)
        for name, (first, *_) in values.items():
            log.info("reward function %s: %s for a response to row %d", name, _shown(first), rollouts[0].prefix.row)

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the functions that have a `state_dict`, under keys NAME.KEY. Raises ValueError, naming
        the function, for a value that is neither a tensor nor a JSON value, because a checkpoint cannot hold it.
        """
        state: dict[str, Any] = {}
        for name, function in self.functions.items():
            own = cast(Any, function).state_dict() if hasattr(function, "state_dict") else {}
            for key, value in own.items():
                if not isinstance(value, Tensor) and not _is_json(value):
                    raise ValueError(
                        f"reward_functions: {name!r} has {key!r} of {type(value).__name__} in its state_dict, which a "
                        "checkpoint cannot hold; give tensors, numbers, strings, lists, and dicts whose keys are text"
                    )
                state[f"{name}.{key}"] = copy.deepcopy(value)
        return state

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        for name, function in self.functions.items():
            own = {key.removeprefix(f"{name}."): x for key, x in state.items() if key.startswith(f"{name}.")}
            if own and hasattr(function, "load_state_dict"):
                cast(Any, function).load_state_dict(own)

    def _ask(self, rollouts: Sequence[Rollout]) -> tuple[dict[str, Any], dict[str, float], dict[str, list[Any]]]:
        """Calls the functions. Returns the results of each function, the logged metrics, and the logged columns."""
        metrics: dict[str, list[float]] = {}
        extra: dict[str, list[Any]] = {}
        given: dict[str, Any] = {}
        if any(map(takes_texts, self.functions.values())):
            given = self._texts(rollouts) | {
                "trainer_state": self.state,
                "log_metric": lambda name, value: metrics.setdefault(name, []).append(float(value)),
                "log_extra": lambda column, values: extra.update({column: list(values)}),
            }
        calls = {
            name: _batched(function, rollouts, {key: given[key] for key in taken(function, given)})
            for name, function in self.functions.items()
        }
        waiting = [name for name, function in self.functions.items() if is_async(function)]
        with ThreadPoolExecutor(max(1, len(waiting))) as pool:  # one event loop per function
            started = {name: pool.submit(call, name, calls[name], self.retries) for name in waiting}
            values = {name: call(name, calls[name], self.retries) for name in calls if name not in started}
            values |= {name: future.result() for name, future in started.items()}
        means = {name: sum(numbers) / len(numbers) for name, numbers in metrics.items()}
        return {name: values[name] for name in calls}, means, extra

    def _texts(self, rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
        """Returns prompts, completions, completion ids and every column of the dataset, as lists with one item per
        rollout. A completion is the whole response, including the tokens of a reset, without special tokens. Its ids
        end with the EOS."""
        assert self.tokenizer is not None
        eos = end_ids(self.tokenizer)
        prompt_ids, responses = [], []
        for rollout in rollouts:
            ids, cut = rollout.prefix.token_ids, len(rollout.prefix.token_ids) - rollout.prefix.num_reset
            prompt_ids.append(ids[:cut])
            responses.append([*ids[cut:], *rollout.completion[: end_index(rollout, eos) + 1]])
        examples = [self.rows.get(rollout.prefix.row) for rollout in rollouts]
        read = [example.prompt if example else None for example in examples]
        decoded = [] if all(prompt is not None for prompt in read) else self._decode(prompt_ids)
        prompts = [decoded[i] if prompt is None else prompt for i, prompt in enumerate(read)]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, self._decode(responses), strict=True)
        ]
        names = dict.fromkeys(name for example in examples if example for name in example.columns)
        columns = {name: [example.columns.get(name) if example else None for example in examples] for name in names}
        return columns | {"prompts": prompts, "completions": completions, "completion_ids": responses}

    def _decode(self, ids: list[list[int]]) -> list[str]:
        assert self.tokenizer is not None
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [str(text) for text in texts]


def mean_rewards(earned: Earned) -> dict[str, float]:
    """Returns function name -> mean reward, where a rollout's reward is summed over its tokens and the mean is over the
    rollouts that the function judges. A function that judges no rollout is absent."""
    judged = {name: [value.sum().item() for value in values if value is not None] for name, values in earned.items()}
    return {name: sum(values) / len(values) for name, values in judged.items() if values}


def call(name: str, function: Callable[[], Any], retries: int = 0) -> Any:
    """Calls a reward function and returns its result. If it raises, it is called again, up to `retries` times. Raises
    FunctionFailed, naming the function, after the last failure; an out-of-memory error is raised unchanged at once."""
    for attempt in range(retries + 1):
        try:
            value = function()
            return asyncio.run(value) if asyncio.iscoroutine(value) else value
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if attempt == retries:
                message = f"reward_functions: {name!r} raised {type(error).__name__}: {error}"
                raise FunctionFailed(message) from error
            log.warning("reward function %s raised %s: %s; retrying", name, type(error).__name__, error)
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


def takes_texts(function: RewardFunction) -> bool:
    """Returns whether a function has TRL's form (see the docstring of this module)."""
    parameters = _parameters(function)
    keywords = (Parameter.VAR_KEYWORD, Parameter.KEYWORD_ONLY)
    return bool({*TEXTS} & {*parameters}) or (
        any(one.kind is Parameter.VAR_KEYWORD for one in parameters.values())
        and all(one.kind in keywords for one in parameters.values())
    )


def taken(function: RewardFunction, given: Collection[str]) -> list[str]:
    """Returns the names in `given` that a function of TRL's form takes as arguments; empty for a function of the
    per-token form."""
    if not takes_texts(function):
        return []
    parameters = _parameters(function)
    takes_all = any(one.kind is Parameter.VAR_KEYWORD for one in parameters.values())
    return [name for name in given if takes_all or name in parameters]


def check_parameters(name: str, function: RewardFunction, columns: Collection[str]) -> None:
    """Raises ValueError if a function of TRL's form has a required argument that is not available, or if a function of
    the per-token form has more than one required argument."""
    rest = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    parameters = _parameters(function)
    needed = [key for key, one in parameters.items() if one.default is Parameter.empty and one.kind not in rest]
    if not takes_texts(function):
        if len(needed) > 1:
            raise ValueError(
                f"reward_functions: {name!r} takes {', '.join(needed)}; write {name}(completions, answer, **kwargs), "
                f"which is called once per batch with a list per column, or {name}(rollout)"
            )
        return
    if others := [key for key in needed if key not in (*GIVEN, *columns)]:
        raise ValueError(
            f"reward_functions: {name!r} has parameters {', '.join(others)}; available are {', '.join(GIVEN)} and the "
            f"columns of the dataset: {', '.join(columns) or 'there are none beside the prompt'}"
        )


def load_reward_functions(
    config: PPOConfig, functions: Mapping[str, RewardFunction] | None = None
) -> dict[str, RewardFunction]:
    """Returns all reward functions by name: `functions`, followed by the functions that the configuration names.

    Raises ValueError if RTO has no DPO model, a function cannot be imported, two rewards have the same name, or a key
    about reward functions is set although there are none.
    """
    if isinstance(config, RTOConfig) and not config.has_dpo_rewards:
        raise ValueError("dpo_model_path: give the DPO model that rewards the tokens, trained by `fastrlhf dpo`")
    named = list((functions or {}).items())
    for path in config.reward_functions:
        named.append((path.rpartition(":")[2], _load(path)))
    names = [*RESERVED, *(name for name, _ in named)]
    for name, _ in named:
        if names.count(name) > 1:
            raise ValueError(f"reward_functions: {name!r} is the name of another reward; rename the function")
    read = ("reward_function_norm", "reward_function_clip", "reward_retries")
    at_default(config, [(bool(named), "without a reward function", read)])
    return dict(named)


def open_reward_functions(
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    functions: Mapping[str, RewardFunction] | None = None,
    rows: Mapping[int, Example] | None = None,
) -> RewardFunctions:
    """Makes the reward functions of a run, which get prompts and columns from `rows`. Raises ValueError as
    `load_reward_functions` does, and if a function has a parameter for a column that does not exist."""
    named, rows = load_reward_functions(config, functions), rows or {}
    columns = list(dict.fromkeys(name for example in rows.values() for name in example.columns))
    for name, function in named.items():
        check_parameters(name, function, columns)
        if takes_texts(function):
            warn_of_unknown_names(name, function, columns, GIVEN)
    own = [path.rpartition(":")[2] for path in config.reward_functions]
    weights = dict(zip(own, config.reward_weights or [1.0] * len(own), strict=True))
    return RewardFunctions(
        functions=named, weights=weights, tokenizer=tokenizer, rows=rows, retries=config.reward_retries
    )


def _load(path: str) -> RewardFunction:
    if path in READY:
        return getattr(ready, path)
    if ":" not in path:
        raise ValueError(
            f"reward_functions: {path!r} must be one of {', '.join(READY)}, or look like package.module:function or "
            "path/to/file.py:function"
        )
    return load_function(path, "reward_functions")


def _parameters(function: RewardFunction) -> Mapping[str, Parameter]:
    try:
        return signature(function).parameters
    except (TypeError, ValueError):  # some callables written in C have no signature
        return {}


def _batched(function: RewardFunction, rollouts: Sequence[Rollout], keywords: Mapping[str, Any]) -> Callable[[], Any]:
    """Returns a function without arguments that makes the call, or calls, for all rollouts."""
    if takes_texts(function):
        return lambda: function(**keywords)
    if not is_async(function):
        return lambda: [function(rollout) for rollout in rollouts]

    async def ask() -> list[Any]:
        return await asyncio.gather(*map(function, rollouts))

    return ask


def _checked(name: str, values: Any, rollouts: Sequence[Rollout]) -> list[Tensor | None]:
    listed = isinstance(values, Sequence | Tensor | np.ndarray) and not isinstance(values, str)
    if not listed or getattr(values, "ndim", 1) == 0 or len(values) != len(rollouts):
        raise ValueError(
            f"reward function {name!r} returns {values!r} for {len(rollouts)} completions; return a list with one "
            "number per completion"
        )
    return [_number(name, value, rollout) for value, rollout in zip(values, rollouts, strict=True)]


def _number(name: str, value: Any, rollout: Rollout) -> Tensor | None:
    if value is None:
        return None
    num, where = len(rollout.completion), f"reward function {name!r}: the response to row {rollout.prefix.row}"
    try:
        given = torch.as_tensor(value, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{where} gets {value!r}; return one number, one per token, or None") from None
    if given.shape not in ((), (num,)):
        raise ValueError(
            f"{where} has {num} tokens and gets rewards of shape {tuple(given.shape)}; return one number, or one "
            "per token"
        )
    if not given.isfinite().all():
        raise ValueError(f"{where} gets {given[~given.isfinite()][0].item()}; return finite numbers, or None")
    return given


def _is_json(value: Any) -> bool:
    """Returns whether a value can be written as JSON and read back unchanged."""
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


def _shown(value: Tensor | None) -> str:
    if value is None:
        return "not judged"
    return f"{value.item():.4g}" if value.ndim == 0 else f"{value.sum().item():.4g} over {len(value)} tokens"
