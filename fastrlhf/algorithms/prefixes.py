"""Determines where the episodes of an update start: right after the prompt, or after the first tokens of a response."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config import PPOConfig
from fastrlhf.data.resets import cut_prefix, is_reset, reset_length, sentence_cuts, takes_first
from fastrlhf.rewards.terms import sentence_end_ids
from fastrlhf.rollout.engine import Engine, TransformersEngine
from fastrlhf.rollout.shared import SharedEngine
from fastrlhf.types import EndIds, Prefix, TokenizedExample

ROLL_IN_STREAM = 3
"""Random stream of roll-ins, the responses that the reference writes for resets. Sampler and resets have other streams,
so that the draws are independent."""


def reset_fields(config: PPOConfig) -> list[str]:
    """Returns the names of the responses that a row of the dataset must have."""
    if config.reset_prob == 0 or config.reset_source in ("sample", "rollout"):
        return []
    return ["reference", "chosen"] if config.reset_source == "both" else [config.reset_source]


def make_roll_in(config: PPOConfig, reference: PreTrainedModel, eos_token_id: EndIds) -> Engine:
    """Makes the engine that samples the responses from which `reset_source: sample` copies (PPO++, Chang et al. 2023,
    arXiv 2306.11816). A response ends at its first end token, also with compat reference.
    """
    engine = TransformersEngine.of(config, reference, eos_token_id, stream=ROLL_IN_STREAM)
    return SharedEngine(engine=engine, model=reference, response_length=config.response_length)


def sentence_ends_of(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the tokens after which a reset may end with `reset_cut: sentence`; empty if it may end anywhere. Raises
    ValueError if no token of the vocabulary ends a sentence.
    """
    if config.reset_cut != "sentence":
        return frozenset()
    return frozenset(sentence_end_ids(tokenizer, "reset_cut").tolist())


def draw_prefixes(
    config: PPOConfig,
    prompts: Sequence[TokenizedExample],
    first_group: int,
    *,
    progress: float = 1.0,
    roll_in: Engine | None = None,
    sentence_ends: Collection[int] = (),
) -> list[Prefix]:
    """Draws the prefix from which each episode starts, with `num_generations` consecutive episodes per prompt.

    Group number g, counted from `first_group`, has the episodes g * size, g * size + 1, ... The random choice of its
    response depends on g, and so does the common reset point of its episodes with `reset_group: point`. With
    `reset_group: response` each episode has its own reset point, which depends on the number of the episode. `progress`
    is the share of the run that is done, on which the curriculum depends. `roll_in` samples the responses of
    `reset_source: sample`. Resets into a response longer than `response_length` stay below that limit. `sentence_ends`
    are the tokens after which `reset_cut: sentence` may cut. With `reset_source: rollout` every episode starts at the
    prompt; own_resets.py resets it later.
    """
    responses = _responses(config, prompts, first_group, roll_in)
    prefixes = []
    for group, (example, response) in enumerate(zip(prompts, responses, strict=True), first_group):
        for episode, key in episodes_of(config, group):
            k = draw_cut(config, response, key, progress, sentence_ends)
            heat = temperature_of_episode(config, episode)
            prefix = cut_prefix(example.prompt, response, k, row=example.row, episode=episode, temperature=heat)
            prefixes.append(prefix)
    return prefixes


def draw_cut(
    config: PPOConfig, response: Sequence[int], key: int, progress: float, sentence_ends: Collection[int]
) -> int:
    """Draws the number of tokens that the episode or group with this key copies from the response; 0: no reset."""
    return reset_length(
        len(response),
        seed=config.seed,
        key=key,
        prob=config.reset_prob,
        minimum=config.reset_min,
        withheld=_withheld(config, progress),
        cuts=sentence_cuts(response, sentence_ends) if config.reset_cut == "sentence" else None,
    )


def temperature_of_episode(config: PPOConfig, episode: int) -> float | None:
    """Returns the temperature of an episode, which may depend on its place in its group; None: the temperature of the
    run."""
    return config.temperatures[episode % len(config.temperatures)] if config.temperatures else None


def episodes_of(config: PPOConfig, group: int) -> list[tuple[int, int]]:
    """Returns (number of the episode, key of its reset) for each episode of a group."""
    size = config.num_generations
    numbers = range(group * size, (group + 1) * size)
    return [(number, group if config.reset_group == "point" else number) for number in numbers]


def _responses(
    config: PPOConfig, prompts: Sequence[TokenizedExample], first_group: int, roll_in: Engine | None
) -> list[Sequence[int]]:
    """Returns the responses from which each group may copy, cut at the length limit; empty for groups that start at the
    prompt."""
    resetting = {
        group: example
        for group, example in enumerate(prompts, first_group)
        if any(is_reset(seed=config.seed, key=key, prob=config.reset_prob) for _, key in episodes_of(config, group))
    }
    if config.reset_source == "rollout":
        found = {}
    elif config.reset_source == "sample":
        assert roll_in is not None or not resetting
        starts = [
            Prefix(token_ids=example.prompt, num_reset=0, row=example.row, episode=group)
            for group, example in resetting.items()
        ]
        written = roll_in.generate(starts) if roll_in else []
        found = {rollout.prefix.episode: rollout.completion for rollout in written}
    else:
        found = {group: _dataset_response(config, example, group) for group, example in resetting.items()}
    return [found.get(group, [])[: config.response_length] for group in range(first_group, first_group + len(prompts))]


def _dataset_response(config: PPOConfig, example: TokenizedExample, group: int) -> list[int]:
    source = config.reset_source
    if source == "both":
        source = "reference" if takes_first(seed=config.seed, key=group) else "chosen"
    response, trained = getattr(example, source), example.scored(source)
    if trained is None:
        return response
    # An episode must not start after text that the policy did not write, so it resets within the first assistant turn.
    return response[: next((n for n, i in enumerate(trained) if n != i), len(trained))]


def _withheld(config: PPOConfig, progress: float) -> float:
    """Returns the share of the allowed reset lengths, beginning with the shortest, that the curriculum still
    excludes."""
    return max(0.0, 1 - progress / config.reset_curriculum) if config.reset_curriculum else 0.0
