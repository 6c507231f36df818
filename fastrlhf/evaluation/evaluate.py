"""`fastrlhf eval`: measures win rates of models against dataset responses or against each other, judged by a reward
model."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config import ChatConfig, EvalConfig, check_config, require
from fastrlhf.config.files import as_yaml, load_yaml
from fastrlhf.config.paths import filled_in
from fastrlhf.config.sources import Source, read_sources
from fastrlhf.data.given import Rows
from fastrlhf.data.specials import end_ids, special_ids
from fastrlhf.data.token_set import TokenSet
from fastrlhf.distributed.ranks import check_one_process
from fastrlhf.evaluation.completions import respond
from fastrlhf.evaluation.judges import reward_model_judge, score_texts
from fastrlhf.evaluation.texts import Asked, JudgeTexts, ask_all
from fastrlhf.evaluation.winrates import Comparison, compare
from fastrlhf.models.layers import LayerOptions
from fastrlhf.models.loading import (
    check_vocabulary,
    load_policy,
    load_reward_model,
    read_model_config,
    resolve_device,
)
from fastrlhf.models.precision import with_dtype
from fastrlhf.models.roles import holds_adapter, open_base, policy_role, score_role, unmerged_adapter
from fastrlhf.models.vocabulary import limit_vocabulary
from fastrlhf.rollout.engine import as_ids
from fastrlhf.rollout.truncation import Truncation
from fastrlhf.runtime.atomic import sweep_files, write_files
from fastrlhf.runtime.checkpoint import check_output_dir
from fastrlhf.runtime.inputs import open_eval_inputs
from fastrlhf.types import EndIds, Prefix, Rollout, TokenizedExample

log = logging.getLogger(__name__)

COLUMNS = ("reference", "chosen", "rejected")

FILES = ("samples.jsonl", "summary.json", "config.yaml")
"""The files that `fastrlhf eval` writes into its folder. A folder with config.yaml has all of them."""


def evaluate_models(config: EvalConfig, examples: Rows | None = None) -> dict[str, Comparison]:
    """Compares each of `config.models` with `config.opponent` on the same prompts. `examples` replace the dataset.

    The prompts are the prompts that training with the same dataset keys evaluates on, without those that leave no room
    for a response. Each model reads them with its own tokenizer and chat template, and so does the judge. The
    comparisons and all responses are written to `output_dir`, if it is given. Raises ValueError for bad input,
    including a missing model, before anything is generated.
    """
    check_config(config, EvalConfig, "evaluate_models")
    config = with_dtype(config)
    check_one_process("eval")
    _check(config)
    if config.output_dir:
        sweep_files(Path(config.output_dir), FILES)
        check_output_dir(config.output_dir)
    against_column = config.opponent in COLUMNS
    source = replace(config, model_name_or_path=config.model_name_or_path or config.models[0])
    fields = [config.opponent] if against_column else []
    tokenizer, data = open_eval_inputs(source, fields, examples)
    if examples is None:
        _warn_of_trained_rows(config, data.eval)
    asked = ask_all(source, tokenizer, data, fields)
    judge_of = JudgeTexts.open(config, tokenizer, data)
    base = open_base(config, [("reward_model_path", config.reward_model_path), *(("models", m) for m in config.models)])
    reward_model = open_judge(config, base, special_ids(judge_of.tokenizer)[1])
    check_vocabulary({"reward_model_path": reward_model}, judge_of.tokenizer)
    readers = {name: judge_of.reader(model) for name, model in asked.items()}
    # All adapters are opened first: they are cheap, and a broken one is reported before any model generates.
    adapted = {name: policy_role(name, base, "models") for name in config.models if base and holds_adapter(name)}

    def policy(name: str) -> PreTrainedModel:
        model = adapted.get(name) or open_policy(config, name)
        check_vocabulary({name: model}, asked[name].tokenizer)
        limit_vocabulary(model, asked[name].tokenizer)
        return model

    def score(name: str) -> np.ndarray:
        judge = reward_model_judge(
            reward_model,
            eos_token_id=end_ids(asked[name].tokenizer),
            micro_batch_tokens=config.micro_batch_tokens,
            reader=readers[name],
        )
        return judge(answers[name]).cpu().numpy()

    answers = {name: _respond(config, policy(name), asked[name]) for name in config.models}
    scores = {name: score(name) for name in config.models}
    if against_column:
        own = asked[config.opponent]
        answers[config.opponent] = _responses_of(own.rows, config.opponent, end_ids(own.tokenizer))
        if judge_of.differs:
            texts = judge_of.column(own.rows, config.opponent)
            scores[config.opponent] = score_texts(reward_model, texts, config.micro_batch_tokens).cpu().numpy()
        else:
            scores[config.opponent] = score(config.opponent)
    against = scores[config.opponent]
    names = [name for name in config.models if name != config.opponent]
    comparisons = {name: compare(scores[name], against, seed=config.seed) for name in names}
    if config.output_dir:
        tokenizers = {name: each.tokenizer for name, each in asked.items()}
        _write(config, tokenizers, answers, scores, comparisons)
    return comparisons


def _write(
    config: EvalConfig,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    answers: Mapping[str, Sequence[Rollout]],
    scores: Mapping[str, np.ndarray],
    comparisons: Mapping[str, Comparison],
) -> None:
    """Writes config.yaml, summary.json with the comparisons (shown by `fastrlhf report`), and samples.jsonl with every
    prompt, response and score. If the process is killed, either all files are complete or none counts."""
    summary = {
        "opponent": config.opponent,
        "opponent_mean_score": float(scores[config.opponent].mean(dtype=np.float64)),
        "judge": config.reward_model_path,
        "methods": {name: asdict(made) for name, made in comparisons.items()},
    }
    rows = [
        {
            "row": rollout.prefix.row,
            "prompt": tokenizers[name].decode(rollout.prefix.token_ids),
            "model": name,
            "response": tokenizers[name].decode(rollout.completion),
            "score": score,
        }
        for name, rollouts in answers.items()
        for rollout, score in zip(rollouts, scores[name].tolist(), strict=True)
    ]
    samples = "".join(json.dumps(row) + "\n" for row in rows)
    texts = (samples, json.dumps(summary, indent=2) + "\n", as_yaml(config))
    write_files(Path(config.output_dir), dict(zip(FILES, texts, strict=True)))


def format_table(comparisons: Mapping[str, Comparison], opponent: str, judge: str) -> str:
    """Formats the result as a table: the judge; for each model a line with its win rate in per cent, its mean score and
    its difference from the opponent's, with 95 % intervals; and the opponent's mean score."""
    width = max(map(len, ("model", opponent, *comparisons)))
    wins, gain = f"{f'win rate % vs {opponent}':21}", f"{f'minus {opponent}':26}"
    lines = [f"{'model':{width}}  {wins}  mean score  {gain}  prompts"]
    for name, comparison in comparisons.items():
        low, high = (100 * end for end in comparison.win_rate_ci)
        below, above = comparison.mean_difference_ci
        rate = f"{100 * comparison.win_rate:5.1f} [{low:5.1f}, {high:5.1f}]"
        difference = f"{comparison.mean_difference:+7.3f} [{below:+7.3f}, {above:+7.3f}]"
        lines.append(
            f"{name:{width}}  {rate:{len(wins)}}  {comparison.mean_score:10.3f}  {difference:{len(gain)}}  "
            f"{comparison.num:7d}"
        )
    first = next(iter(comparisons.values()))
    lines.append(f"{opponent:{width}}  {'':{len(wins)}}  {first.mean_score - first.mean_difference:10.3f}")
    return "\n".join([f"judged by {judge}, intervals of 95 %", *lines])


def _warn_of_trained_rows(config: EvalConfig, given: Sequence[TokenizedExample]) -> None:
    """Logs a warning if a model was trained on some of the rows `given` according to the config.yaml of its run."""
    split, rows = config.dataset_test_split or config.dataset_train_split, TokenSet.of(given)
    numbers, (_, datasets) = np.array(rows.rows(), np.int64), rows.datasets()
    by_dataset = [numbers[datasets == i] - first for i, first in enumerate(rows.first_rows())]
    for name in config.models:
        run = _run_config(name)
        if (
            not run.get("dataset_name")
            or _places(run["dataset_name"]) != _places(config.dataset_name)
            or (run.get("dataset_config"), run.get("dataset_train_split")) != (config.dataset_config, split)
        ):
            continue
        held_out = 0 if run.get("dataset_test_split") else run.get("num_eval_examples", 0)
        most, num = run.get("max_train_examples") or math.inf, 0
        for own in by_dataset:
            end = own.max(initial=-1) + 1
            num += int((own < min(end - held_out, most)).sum())
        if num:
            log.warning(
                "models: %s was trained on at least %d of the %d rows on which it is judged; hold them out by "
                "the same num_eval_examples in training and evaluation",
                *(name, num, len(rows)),
            )


def _places(dataset_name: Any) -> list[Any]:
    """Returns the paths of the datasets, with the settings of entries other than their weights."""
    names = read_sources(dataset_name)
    return [
        replace(name, path=str(Path(name.path).resolve()), weight=1.0)
        if isinstance(name, Source)
        else Path(name).expanduser().resolve()
        for name in ([names] if isinstance(names, str) else names)
    ]


def _run_config(model: str) -> dict[str, Any]:
    """Returns the configuration of the run that saved this model, adapter or checkpoint; empty if there is none."""
    folder = Path(model)
    if folder.name == "adapter" or folder.name.startswith("checkpoint-"):
        folder = folder.parent
    file = folder / "config.yaml"
    try:
        written = load_yaml(str(file)) if file.is_file() else {}
        return {key: filled_in(key, value) for key, value in written.items()}
    except ValueError:  # not a config.yaml written by fastrlhf
        return {}


def _check(config: EvalConfig) -> None:
    require(bool(config.models), "models", config.models, "at least one folder or hub name")
    require(
        bool(config.reward_model_path), "reward_model_path", config.reward_model_path, "the reward model that judges"
    )
    require(
        config.opponent in (*COLUMNS, *config.models),
        "opponent",
        config.opponent,
        f"a column ({', '.join(COLUMNS)}) or one of the models",
    )
    require(set(config.models) != {config.opponent}, "opponent", config.opponent, "different from the only model")
    for name in config.models:
        if not holds_adapter(name):
            read_model_config(name, "models", config.trust_remote_code)


def open_judge(
    config: EvalConfig | ChatConfig, base: PreTrainedModel | None, pad_token_id: int | None
) -> PreTrainedModel:
    """Loads the reward model; an adapter shares the weights of `base`."""
    source = config.reward_model_path
    if base and holds_adapter(source):
        return score_role(source, base, "reward_model_path", pad_token_id).requires_grad_(False)
    if adapter := unmerged_adapter(source, config.dtype):  # unrounded weights, as in open_policy
        try:
            own = open_base(replace(config, model_name_or_path=""), [("reward_model_path", adapter)])
            if own is not None:
                return score_role(adapter, own, "reward_model_path", pad_token_id).requires_grad_(False)
        except ValueError as error:
            log.warning("reward_model_path: %s judges with its merged weights, rounded to bfloat16: %s", source, error)
    return load_reward_model(
        source,
        pad_token_id=pad_token_id,
        must_be_trained=True,
        device=resolve_device(config.device),
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        layers=LayerOptions.of(config),
    )


def open_policy(config: EvalConfig | ChatConfig, name: str) -> PreTrainedModel:
    """Loads a model that samples. If the merged weights of a run with an adapter would be rounded to bfloat16, the
    adapter over its base is loaded instead; if the base is not available, the merged weights are used, with a
    warning."""
    if adapter := unmerged_adapter(name, config.dtype):
        try:
            base = open_base(replace(config, model_name_or_path=""), [("models", adapter)])
            if base is not None:
                return policy_role(adapter, base, "models")
        except ValueError as error:
            log.warning("models: %s is judged by its merged weights, rounded to bfloat16: %s", name, error)
    return load_policy(
        name,
        field="models",
        device=resolve_device(config.device),
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        layers=LayerOptions.of(config),
    )


def _respond(config: EvalConfig, policy: PreTrainedModel, asked: Asked) -> list[Rollout]:
    return respond(
        policy,
        asked.rows,
        eos_token_id=end_ids(asked.tokenizer),
        response_length=config.response_length,
        temperature=config.temperature,
        truncation=Truncation.of(config),
        seed=config.seed,
        batch_size=config.rollout_batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        decode=config.decode,
    )


def _responses_of(rows: Sequence[TokenizedExample], column: str, eos: EndIds) -> list[Rollout]:
    """Returns the responses in a column of the dataset as rollouts; a truncated response has no EOS."""
    return [
        Rollout(
            prefix=Prefix(token_ids=row.prompt, num_reset=0, row=row.row, episode=i),
            completion=getattr(row, column),
            sampler_logprob=[],
            ended=getattr(row, column)[-1] in as_ids(eos),
        )
        for i, row in enumerate(rows)
    ]
