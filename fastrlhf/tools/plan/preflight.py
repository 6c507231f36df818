"""Checks all runs of a chain before the first of them starts.

Each trainer checks its input when it starts, which may be hours after the start of the chain. These functions check the
input of all runs at once, except weights that an earlier run has yet to train.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastrlhf.algorithms.pair_losses import pair_function
from fastrlhf.algorithms.psipo import load_psi
from fastrlhf.config import (
    DPOConfig,
    PPOConfig,
    ReferenceConfig,
    RewardConfig,
    RLPConfig,
    TrainConfig,
    parse_model_config,
)
from fastrlhf.data.packing import check_micro_batch, num_computed
from fastrlhf.models.loading import read_model_config
from fastrlhf.models.roles import holds_adapter
from fastrlhf.publish.push import check_sections, open_repository, target_of
from fastrlhf.rewards.functions import load_reward_functions
from fastrlhf.rollout.vllm import check_vllm
from fastrlhf.runtime.atomic import check_writable
from fastrlhf.runtime.inputs import check_libraries
from fastrlhf.runtime.reporters import import_reporters
from fastrlhf.tools.plan.work import open_work, to_tree

POLICIES = ("model_name_or_path", "ref_model_name_or_path", "dpo_model_path", "dpo_ref_model_path")
REWARD_MODELS = ("reward_model_path", "eval_reward_model_path", "critic_model_path")
"""Keys that name a reward model; the keys in POLICIES name a policy."""

Made = Mapping[str, tuple[str, TrainConfig]]
"""Absolute output_dir -> (name, configuration) of the runs that come before a run."""


def check_chain(runs: Sequence[tuple[str, TrainConfig]]) -> None:
    """Raises ValueError, naming the run, if a run after the first could not start: its models, tokenizer, rows,
    functions or reporters are missing or unusable, the hub refuses its repository, or another run has the same
    output_dir or repository.

    `runs` are (name, configuration), in order. Results of earlier runs count as present. The first run is not checked
    here, because it checks its input itself when it starts.
    """
    made: dict[str, tuple[str, TrainConfig]] = {}
    pushed: dict[tuple[str, str], str] = {}
    for name, config in runs:
        folder = os.path.abspath(config.output_dir)
        try:
            if folder in made:
                raise ValueError(
                    f"output_dir: {config.output_dir!r} is also the output_dir of {made[folder][0]}; give another"
                )
            if config.push_to_hub and (other := pushed.setdefault(target_of(config), name)) != name:
                raise ValueError(f"hub_model_id: {other} uploads there too; give another repository or hub_revision")
            if made:
                _check(config, made)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        made[folder] = (name, config)


def rlp_stages(config: RLPConfig, reward: RewardConfig, policy: PPOConfig) -> list[tuple[str, TrainConfig]]:
    """Returns the first two runs of RLP, made from the sections of its file. Raises ValueError if RLP could not upload
    its last policy."""
    check_sections(config, {"reward": reward, config.policy: policy})
    open_repository(config)
    folder, judge = Path(config.output_dir), config.reward_model_path
    first = dataclasses.replace(reward, output_dir=str(folder / "reward"))
    judged = dataclasses.replace(policy, output_dir=str(folder / "policy"), reward_model_path=judge or first.output_dir)
    return [("reward", first), (config.policy, judged)]


def _check(config: TrainConfig, made: Made) -> None:
    import_reporters(config.report_to)
    check_libraries(config)
    open_repository(config)
    for key in (*POLICIES, *REWARD_MODELS):
        if path := getattr(config, key, ""):
            _check_model(config, key, path, made)
    if config.model_config:
        parse_model_config(config.model_config)
    if isinstance(config, PPOConfig):
        if config.engine == "vllm":
            check_vllm(config)
        load_reward_functions(config)
    if isinstance(config, ReferenceConfig) and config.ref_cache_dir:
        check_writable(config.ref_cache_dir, "ref_cache_dir")
    if isinstance(config, DPOConfig):
        for name in config.functions:
            pair_function(name)
    if isinstance(config, DPOConfig | PPOConfig) and config.psi:
        load_psi(config.psi, config.psi_clip)
    _check_rows(_with_tokenizer(config, made))


def _check_model(config: TrainConfig, key: str, path: str, made: Made) -> None:
    place = Path(os.path.abspath(path))
    if str(place) in made:
        name, earlier = made[str(place)]
        if isinstance(earlier, RewardConfig) != (key in REWARD_MODELS):
            kinds = ("a policy", "a reward model")
            found, wanted = (kinds[x] for x in (isinstance(earlier, RewardConfig), key in REWARD_MODELS))
            raise ValueError(f"{key}: {path!r} will hold {found}, trained by {name}; give {wanted}")
        return
    if isinstance(config, PPOConfig) and key != "model_name_or_path" and holds_adapter(path):
        return
    if not {*map(str, place.parents)} & {*made}:  # a path inside the folder of an earlier run may not exist yet
        read_model_config(path, key, config.trust_remote_code)


def _with_tokenizer(config: TrainConfig, made: Made) -> TrainConfig:
    """Returns the configuration with a tokenizer that already exists. If an earlier run has yet to train the model,
    this is the tokenizer with which that run starts."""
    own = {name: getattr(config, name) for name in ("eos_token", "chat_template")}
    source = config.tokenizer_name_or_path or config.model_name_or_path
    while os.path.abspath(source) in made:
        earlier = made[os.path.abspath(source)][1]
        own = {name: value or getattr(earlier, name) for name, value in own.items()}
        source = earlier.tokenizer_name_or_path or earlier.model_name_or_path
    return dataclasses.replace(config, tokenizer_name_or_path=source, **own)


def _check_rows(config: TrainConfig) -> None:
    examples = open_work(config).examples
    if isinstance(config, PPOConfig):
        together = config.num_generations if config.share_trunks else 1
        costs = [len(example.prompt) + together * config.response_length for example in examples]
    else:
        tree_of = to_tree(config)
        costs = [num_computed(tree_of(example)) for example in examples]
    check_micro_batch(config, examples, costs)
