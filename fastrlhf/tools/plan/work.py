"""Makes the rows that a run would train on, by the functions of its trainer but without a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fastrlhf.algorithms import dpo, kto, ppo, psipo_groups, reward_model, sft
from fastrlhf.algorithms.prefixes import draw_prefixes, reset_fields, sentence_ends_of
from fastrlhf.algorithms.scoring import Tree
from fastrlhf.config import DPOConfig, KTOConfig, PPOConfig, RewardConfig, SFTConfig, TrainConfig
from fastrlhf.data.examples import Origin
from fastrlhf.data.token_set import TokenSet
from fastrlhf.data.tokens import TextRules, TokenReport
from fastrlhf.models.loading import check_architecture
from fastrlhf.runtime.inputs import open_inputs, with_room
from fastrlhf.runtime.mixing import shares_of
from fastrlhf.runtime.optim import index_batches, num_steps
from fastrlhf.types import Prefix, Rollout, TokenizedExample


@dataclass(frozen=True, kw_only=True)
class Work:
    """The rows of a run and the order in which it draws them."""

    tokenizer: PreTrainedTokenizerBase
    examples: TokenSet
    """Training rows; in on-policy runs, only rows whose prompt leaves room for a response."""
    report: TokenReport
    steps: int
    """Number of optimiser steps (on-policy: updates)."""
    batches: list[list[int]]
    """For each of the first steps, the indices into `examples` that it draws."""
    origin: Origin = field(default_factory=Origin)
    num_eval: int = 0
    """Number of rows that are held out for evaluation."""
    num_read: int = 0
    """Number of rows that were read, if only the first rows were read (tools/first_rows.py); 0: all rows. If it is not
    0, `steps` and `batches` are not those of the run."""
    rules: TextRules = field(default_factory=TextRules)


def open_work(config: TrainConfig, most_batches: int = 1, *, keep_rows: bool = False) -> Work:
    """Reads and tokenises the rows as the trainer of `config` does; `output_dir` may already hold a run. With
    `keep_rows` every row holds the example from which it was made.

    Raises ValueError as the trainer would.
    """
    tokenizer, data = open_inputs(without_model(config), fields_of(config), None, None, keep_rows=keep_rows)
    examples = TokenSet.of(data.train)
    if isinstance(config, PPOConfig):
        examples = with_room(examples, "train", config.max_length, config.response_length)
        steps, size = ppo.num_updates(config, len(examples)), config.batch_size // config.num_generations
    else:
        steps, size = num_steps(config, len(examples)), config.batch_size
    drawn = index_batches(len(examples), size, steps, config.seed, shares_of(config, examples))
    return Work(
        tokenizer=tokenizer,
        examples=examples,
        report=data.report,
        steps=steps,
        batches=list(islice(drawn, most_batches)),
        origin=data.origin,
        num_eval=len(data.eval),
        rules=data.rules,
    )


def without_model(config: TrainConfig) -> TrainConfig:
    """Returns the configuration with which the rows of a run are read, without its model, output folder and optional
    libraries. Raises ValueError for an architecture that cannot be trained."""
    # Only the run itself needs an output folder, reporters, the hub, a device and optional libraries.
    alone = {"optim": "adamw_torch_fused", "attn_implementation": "auto", "use_liger_kernel": False}
    alone |= {"activation_offloading": False, "load_in_4bit": False, "callbacks": ()}
    alone |= {"push_to_hub": False, "hub_model_id": "", "hub_private_repo": False, "hub_revision": ""}
    elsewhere = dataclasses.replace(config, output_dir="", report_to=(), **alone)
    # A local model may not exist yet, if an earlier run of the chain trains it.
    if config.model_config or Path(config.model_name_or_path).is_dir() or not config.tokenizer_name_or_path:
        check_architecture(config)
    if config.model_name_or_path:
        source = config.tokenizer_name_or_path or config.model_name_or_path
        elsewhere = dataclasses.replace(elsewhere, tokenizer_name_or_path=source, model_name_or_path="")
    return elsewhere


def to_tree(config: TrainConfig) -> Callable[[TokenizedExample], Tree]:
    """Returns the function that makes the segments of a row, as the offline trainer of `config` does."""
    if isinstance(config, SFTConfig):
        return lambda example: [sft.to_segment(example, config)]
    if isinstance(config, RewardConfig):
        return lambda example: reward_model.to_tree(example, config)
    if isinstance(config, KTOConfig):
        return kto.to_tree
    assert isinstance(config, DPOConfig)
    module = psipo_groups if config.psi_backend == "groupwise" else dpo
    return lambda example: module.to_tree(example, config)


def first_prefixes(config: PPOConfig, work: Work) -> list[Prefix]:
    """Draws the prefixes of the episodes of `work.batches` as the run does.

    With `reset_source` sample or rollout, these episodes have no resets here, because a model would first have to
    generate the responses.
    """
    sentence_ends = sentence_ends_of(config, work.tokenizer)
    return [
        prefix
        for step, batch in enumerate(work.batches)
        for prefix in draw_prefixes(
            config,
            [work.examples[i] for i in batch],
            step * len(batch),
            progress=step / work.steps,
            roll_in=_WritesNothing(),
            sentence_ends=sentence_ends,
        )
    ]


class _WritesNothing:
    """Stand-in for the reference policy, which generates reset responses in a real run; this one generates none."""

    def generate(self, prefixes: Sequence[Prefix]) -> list[Rollout]:
        return []


def fields_of(config: TrainConfig) -> list[str]:
    """Returns the fields that the trainer of `config` reads from a row."""
    if isinstance(config, SFTConfig):
        return [config.response]
    if isinstance(config, RewardConfig):
        return reward_model.fields_read(config)
    if isinstance(config, PPOConfig):
        return reset_fields(config)
    if isinstance(config, KTOConfig):
        return list(kto.FIELDS)
    assert isinstance(config, DPOConfig)
    return ["responses"] if config.psi_backend == "groupwise" else dpo.fields_read(config)
