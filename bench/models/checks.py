"""Checks of a model family: compares our results on a tiny random model with those of plain transformers."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from bench.models.configs import tiny_config
from fastrlhf.config import SFTConfig
from fastrlhf.data.packing import pack
from fastrlhf.models.adapters import add_adapter, merged_copy
from fastrlhf.models.attention import runs_alone
from fastrlhf.models.forward import (
    disable_activation_checkpointing,
    enable_activation_checkpointing,
    sequence_scores,
    token_logprobs,
)
from fastrlhf.models.layers import LayerOptions
from fastrlhf.models.loading import load_policy, load_reward_model
from fastrlhf.models.small import EOS, VOCAB, small_model
from fastrlhf.rollout.engine import TransformersEngine
from fastrlhf.types import Prefix, Segment

VALUES, GRADIENTS = 1e-5, 2e-5
"""Tolerances: VALUES is absolute, in nats. GRADIENTS is relative to the largest entry of the same parameter's gradient,
or to 1 % of the largest entry of all gradients if that is more."""
ROUNDINGS = 3
"""The error of our gradients relative to float64 may be this many times the error of the plain model's float32
gradients."""
SAMPLING = 1e-4
LENGTHS = (7, 2, 19)
MAX_LENGTH = 24


class DifferenceError(Exception):
    """Raised if a number differs from the expected number by more than its tolerance."""


class NotBuiltError(Exception):
    """Raised if transformers itself cannot make the tiny model."""


@dataclass
class Family:
    """Makes a tiny model of one type. Its weights are large, so that log-probs of different tokens differ."""

    model_type: str
    folder: Path
    _policy: PreTrainedModel | None = field(default=None)

    @property
    def policy(self) -> PreTrainedModel:
        if self._policy is None:
            try:
                write_model(self.model_type, self.folder / "policy")
            except Exception as error:
                raise NotBuiltError(f"{type(error).__name__}: {error}") from error
            self._policy = load_policy(str(self.folder / "policy"), layers=LayerOptions(max_length=MAX_LENGTH))
        return self._policy


def write_model(model_type: str, folder: Path, **fields: Any) -> None:
    """Saves a tiny random model of the type; `fields` of its text configuration replace those of `tiny_config`."""
    config = tiny_config(model_type)
    config.get_text_config().update(fields)
    small_model(config).save_pretrained(folder)


def check_packed(family: Family) -> dict[str, float]:
    """Compares log-probs and all gradients of a pack with the plain model, which processes one sequence at a time."""
    sequences = [_ids(length, salt) for salt, length in enumerate(LENGTHS)]
    segments = [Segment(token_ids=ids, num_scored=len(ids) - 1) for ids in sequences]
    return _compare(family.policy, segments, [(ids, 1) for ids in sequences])


def check_branched(family: Family) -> dict[str, float]:
    """Compares log-probs and all gradients with those of the plain model, for responses that share a prompt."""
    prompt, one, two = _ids(9, 5), _ids(6, 6), _ids(3, 7)
    segments = [
        Segment(token_ids=prompt),
        Segment(token_ids=one, num_scored=len(one), parent=0, cut=9),
        Segment(token_ids=two, num_scored=len(two), parent=0, cut=4),
    ]
    return _compare(family.policy, segments, [(prompt + one, 9), (prompt[:4] + two, 4)])


def check_checkpointing(family: Family) -> dict[str, float]:
    """Compares log-probs and gradients with and without activation checkpointing."""
    model = family.policy
    batch = pack([Segment(token_ids=_ids(n, s), num_scored=n - 1) for s, n in enumerate(LENGTHS)])
    plain = _gradients(model, lambda: token_logprobs(model, batch).logprob)
    enable_activation_checkpointing(model)
    try:
        return _differences(_gradients(model, lambda: token_logprobs(model, batch).logprob), plain)
    finally:
        disable_activation_checkpointing(model)


def check_sampling(family: Family) -> dict[str, float]:
    """Compares the log-probs that the sampler records with those of the plain model."""
    model = family.policy
    engine = TransformersEngine(model=model, eos_token_id=EOS, response_length=9, temperature=1.0, seed=0, batch_size=2)
    starts = [_ids(n, 11 + n) for n in (3, 6, 3)]
    prefixes = [Prefix(token_ids=ids, num_reset=0, row=i, episode=i) for i, ids in enumerate(starts)]
    worst = 0.0
    with torch.no_grad():
        for rollout in engine.generate(prefixes):
            ids = [*rollout.prefix.token_ids, *rollout.completion]
            expected = _own_logprobs(model, ids)[len(rollout.prefix.token_ids) - 1 :]
            worst = max(worst, (torch.tensor(rollout.sampler_logprob) - expected).abs().max().item())
    return _within(sampling=(worst, SAMPLING))


def check_reward(family: Family) -> dict[str, float]:
    """Saves a reward model; compares its scores with those of plain transformers, and with its scores after loading it
    again."""
    family.policy  # noqa: B018 (saves it)
    model = load_reward_model(str(family.folder / "policy"), pad_token_id=0)
    model.save_pretrained(family.folder / "reward")
    sequences = [_ids(length, salt) for salt, length in enumerate(LENGTHS)]
    batch = pack([Segment(token_ids=ids) for ids in sequences])
    plain = AutoModelForSequenceClassification.from_pretrained(family.folder / "reward", trust_remote_code=True).eval()
    again = load_reward_model(str(family.folder / "reward"), pad_token_id=0, must_be_trained=True)
    with torch.no_grad():
        ours, theirs = sequence_scores(model, batch), sequence_scores(again, batch)
        alone = torch.cat([plain(torch.tensor([ids]), use_cache=False).logits[0] for ids in sequences])
    return _within(
        plain=((ours - alone).abs().max().item(), VALUES), again=((ours - theirs).abs().max().item(), VALUES)
    )


def check_lora(family: Family) -> dict[str, float]:
    """Compares a model that has a random LoRA adapter with its merged and saved copy, loaded by plain transformers."""
    family.policy  # noqa: B018 (saves it)
    source = str(family.folder / "policy")
    model = load_policy(source)
    add_adapter(model, SFTConfig(use_peft=True, lora_r=2), source)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        ids = _ids(19, 2)
        batch = pack([Segment(token_ids=ids, num_scored=18)])
        ours = token_logprobs(model, batch).logprob
        before = token_logprobs(family.policy, batch).logprob
        merged_copy(model).save_pretrained(family.folder / "merged")
        plain = AutoModelForCausalLM.from_pretrained(family.folder / "merged").eval()
        error = (ours - _own_logprobs(plain, ids)).abs().max().item()
        if not error <= 5 * VALUES:
            unmerged = _own_logprobs(_in_float64(model), ids)
            error = (unmerged - _own_logprobs(_in_float64(plain), ids)).abs().max().item()
    if torch.equal(ours, before):
        raise DifferenceError("the adapter does not change the log-probs")
    return _within(lora=(error, 5 * VALUES))


CHECKS: dict[str, Callable[[Family], dict[str, float]]] = {
    "packed": check_packed,
    "branched": check_branched,
    "checkpointing": check_checkpointing,
    "sampling": check_sampling,
    "reward": check_reward,
    "lora": check_lora,
}


def run_checks(model_type: str, names: list[str]) -> Iterator[tuple[str, Any]]:
    """Runs the checks and yields a result for each.

    The first result is ("alone", reason why sequences cannot share a pack, or ""). For each check follows (name,
    differences) or (name, exception). If the model cannot be loaded, the only result is ("refused", error), with the
    one-line error of this project, ("crashed", exception), or ("not built", exception) of transformers itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        family = Family(model_type, Path(folder))
        try:
            model = family.policy
        except NotBuiltError as error:
            yield "not built", error
            return
        except ValueError as error:
            yield "refused", error
            return
        except Exception as error:
            yield "crashed", error
            return
        yield "alone", runs_alone(model)
        for name in names:
            try:
                yield name, CHECKS[name](family)
            except Exception as error:
                yield name, error


def _ids(length: int, salt: int) -> list[int]:
    return [3 + (5 * i * i + 11 * i + 17 * salt) % (VOCAB - 12) for i in range(length)]


def _own_logprobs(model: PreTrainedModel, ids: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def _compare(model: PreTrainedModel, segments: list[Segment], alone: list[tuple[list[int], int]]) -> dict[str, float]:
    """Compares a pack with the plain model on each sequence; `alone` holds (ids, index of the first scored token) per
    sequence.

    If the pack and the plain float32 model differ by more than the tolerance, which may be float32 rounding, both are
    compared with the plain float64 model. The error of the pack may then be at most ROUNDINGS times the error of the
    plain float32 model.
    """

    def plain(of: PreTrainedModel) -> Numbers:
        return _gradients(of, lambda: torch.cat([_own_logprobs(of, ids)[first - 1 :] for ids, first in alone]))

    ours, rounded = _gradients(model, lambda: token_logprobs(model, pack(segments)).logprob), plain(model)
    try:
        return _differences(ours, rounded)
    except DifferenceError:
        exact = plain(_in_float64(model))
        return _differences(ours, exact, max(GRADIENTS, ROUNDINGS * _gradient_error(rounded, exact)))


def _in_float64(model: PreTrainedModel) -> PreTrainedModel:
    doubled = copy.deepcopy(model).double()
    doubled.config.dtype = torch.float64
    return doubled


Numbers = tuple[Tensor, dict[str, Tensor]]


def _gradients(model: PreTrainedModel, forward: Callable[[], Tensor]) -> Numbers:
    """Runs forward and backward of a weighted sum of log-probs; returns (log-probs, gradients by parameter name)."""
    model.zero_grad()
    values = forward()
    (values * torch.linspace(-1, 1, len(values)).cos()).sum().backward()
    return values.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _differences(ours: Numbers, plain: Numbers, gradients: float = GRADIENTS) -> dict[str, float]:
    if {n for n, g in ours[1].items() if g.any()} != {n for n, g in plain[1].items() if g.any()}:
        raise DifferenceError("packed and plain model have gradients for different parameters")
    values = (ours[0] - plain[0]).abs().max().item()
    return _within(values=(values, VALUES), gradients=(_gradient_error(ours, plain), gradients))


def _gradient_error(ours: Numbers, plain: Numbers) -> float:
    largest = max(g.abs().max().item() for g in plain[1].values())
    return max(
        (ours[1][n] - g).abs().max().item() / max(g.abs().max().item(), 1e-2 * largest)
        for n, g in plain[1].items()
        if n in ours[1]
    )


def _within(**found: tuple[float, float]) -> dict[str, float]:
    for name, (error, limit) in found.items():
        if not error <= limit:
            raise DifferenceError(f"{name} differ by {error:.2g}")
    return {name: error for name, (error, _) in found.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """A context manager that silences the logs of transformers and of this project."""
    import logging

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
