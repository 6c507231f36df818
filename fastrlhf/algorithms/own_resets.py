"""Resets into the policy's own failed responses: `reset_source: rollout`.

Random-reset policy optimisation (RRPO, Samanta et al. 2026, arXiv 2605.25507) learns from a response y that failed: it
cuts y at a random point k, samples a group of G suffixes from there, and gives each suffix the advantage within its
group. With the group-relative advantage of GRPO,

    y_i ~ policy(. | x, y_{1:k}),   A_i = (r(x, y_{1:k}, y_i) - mean_j r_j) / std_j r_j,   i, j = 1 .. G

and the policy gradient is taken over the suffix tokens only. The suffixes share
everything up to the cut, so that their difference in reward is due to decisions after it. The paper cuts between
reasoning steps; here `reset_cut` gives the allowed positions of the cut.

One update: every group is sampled from the prompt and scored. From each group whose share of successes lies in
`reset_band`, one failed response is drawn. With probability `reset_prob` the group is sampled again from a cut of this
response. All other groups keep their first responses as episodes, which are exactly those of a run without resets. With
rewards of two values this choice does not bias the gradient of a prompt: given the number of successes, the successful
responses of a prompt are independent draws of the policy, and so are the failed ones. The choice only changes the
weight of each prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from fastrlhf.algorithms.prefixes import draw_cut, episodes_of, temperature_of_episode
from fastrlhf.config import PPOConfig
from fastrlhf.data.resets import cut_prefix, one_of
from fastrlhf.types import Prefix, Rollout

RESAMPLED = 2**40
"""Offset added to the number of an episode that is sampled again. The number is the key of the sampler's random draws;
without the offset the suffix would repeat the draws of the failed response."""
DROPPED = "drpo/dropped_tokens"
"""Metric: the number of sampled tokens that no episode of the update keeps."""


def restart_failures(
    config: PPOConfig,
    rollouts: Sequence[Rollout],
    outcome: Tensor,
    succeeded: Tensor,
    first_group: int,
    sample: Callable[[list[Prefix]], Sequence[Rollout]],
    *,
    progress: float,
    sentence_ends: Collection[int] = (),
) -> tuple[list[Rollout], dict[str, float]]:
    """Samples some groups again from a cut of a failed response; returns the episodes of the update and metrics.

    `rollouts` all start at the prompt; outcome [N] float64 and succeeded [N] bool belong to them. All other groups keep
    their rollouts. `sample` returns one rollout per prefix. Metrics: drpo/first_outcome and drpo/first_success, the
    mean outcome and the share of successes of `rollouts`; drpo/groups_restarted, the share of groups that were sampled
    again; drpo/dropped_tokens, the number of sampled tokens that no episode keeps.
    """
    size, low, high = config.num_generations, *config.reset_band
    starts: dict[int, Prefix] = {}
    for i, members in enumerate(succeeded.view(-1, size).tolist()):
        failed = [i * size + j for j, success in enumerate(members) if not success]
        if not failed or not low <= sum(members) / size <= high:
            continue
        source = rollouts[one_of(failed, seed=config.seed, key=first_group + i)]
        prompt, response = source.prefix.token_ids, source.completion
        for j, (episode, key) in enumerate(episodes_of(config, first_group + i)):
            if k := draw_cut(config, response, key, progress, sentence_ends):
                heat, number = temperature_of_episode(config, episode), episode + RESAMPLED
                start = cut_prefix(prompt, response, k, row=source.prefix.row, episode=number, temperature=heat)
                starts[i * size + j] = start
    episodes = list(rollouts)
    for index, suffix in zip(starts, sample(list(starts.values())) if starts else (), strict=True):
        episodes[index] = suffix
    restarted = {index // size for index in starts}
    return episodes, {
        "drpo/first_outcome": outcome.mean().item(),
        "drpo/first_success": succeeded.double().mean().item(),
        "drpo/groups_restarted": len(restarted) * size / len(rollouts),
        DROPPED: float(sum(len(rollouts[index].completion) for index in starts)),
    }
