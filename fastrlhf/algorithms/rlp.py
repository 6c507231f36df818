"""RLP, reward learning on policy (Lang, Huang and Li 2024, arXiv 2403.19279, algorithm 1). It is not RL pre-training.

    r        a reward model, from the pairs D
    pi       a policy, from the SFT model, against r
    repeat `rounds` times (the paper: once)
      P      n answers of pi to each prompt
      r'     a reward model from D again, refitted with P: UML (`rlp_uml.py`) or SPG (`rlp_spg.py`)
      pi'    a policy, from the SFT model again, against r'
      r, pi = r', pi'

With refinement "none" the result is r and pi: plain PPO (or DR-PO, RTO), bit for bit. A refit without views and without
synthetic pairs gives r again, bit for bit. The authors have released no code; where the paper is silent, keys of
RLPConfig decide.

    output_dir/reward, policy                          r and pi, as the commands of the trainers save them
    output_dir/round-1/answers.jsonl                   P, as token ids
    output_dir/round-1/pairs.jsonl                     the synthetic pairs, as a preference dataset
    output_dir/round-1/spg.json                        the outcome of each prompt of P
    output_dir/round-1/reward, policy                  r' and pi'
    output_dir/round-1/report.json                     r and r' compared

Finished stages are not repeated: an interrupted run continues with its first unfinished stage.

`fastrlhf rlp --config FILE`; the sections `reward` and `ppo` (or the section that `policy` names) configure training.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.algorithms.completions import ANSWER_STREAM, Answers, sample_answers, write_rows
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.prefixes import reset_fields
from fastrlhf.algorithms.reward_model import held_out_accuracy, train_reward_model
from fastrlhf.algorithms.rlp_report import compare_scores, view_activity
from fastrlhf.algorithms.rlp_spg import synthetic_pairs
from fastrlhf.algorithms.rlp_uml import Views
from fastrlhf.algorithms.scoring import per_response
from fastrlhf.config import PPOConfig, RewardConfig, RLPConfig, require
from fastrlhf.config.compare import SAME_MODEL, differences
from fastrlhf.config.train import HUB_KEYS
from fastrlhf.data.identity import difference, require_same_tokenizer
from fastrlhf.data.specials import end_ids, special_ids
from fastrlhf.distributed.ranks import check_one_process
from fastrlhf.evaluation.equivalence import EquivalenceJudge, open_judge
from fastrlhf.models.architecture import check_head
from fastrlhf.models.forward import sequence_scores
from fastrlhf.models.layers import LayerOptions
from fastrlhf.models.loading import load_policy, load_reward_model, read_model_config, resolve_device
from fastrlhf.models.precision import resolved
from fastrlhf.models.roles import holds_adapter
from fastrlhf.models.vocabulary import limit_vocabulary
from fastrlhf.publish.methods import RLP, part_of
from fastrlhf.publish.push import check_sections, open_repository, push
from fastrlhf.rewards.implicit import implicit_sources
from fastrlhf.rollout.engine import TransformersEngine
from fastrlhf.runtime.atomic import write_file
from fastrlhf.runtime.checkpoint import check_output_dir, create_output_dir, holds_model, is_unfinished
from fastrlhf.runtime.inputs import Data, open_inputs, with_room
from fastrlhf.runtime.locks import check_idle, locked
from fastrlhf.runtime.metrics import read_metrics, read_rows
from fastrlhf.runtime.result import TrainResult
from fastrlhf.runtime.signals import stop_at_once
from fastrlhf.types import Example, TokenizedExample

log = logging.getLogger(__name__)

MAY_CHANGE = ("output_dir", "rounds", "min_reward_variance", "device", "push_to_hub", *HUB_KEYS)
"""Keys that may differ when the same run is started again."""

Gold = Callable[[str, str], float]
"""(prompt, response) -> true value of the response, which no trainer uses."""


def train_rlp(
    config: RLPConfig,
    reward: RewardConfig,
    policy: PPOConfig,
    *,
    pairs: Sequence[Example] | None = None,
    eval_pairs: Sequence[Example] | None = None,
    prompts: Sequence[Example] | None = None,
    eval_prompts: Sequence[Example] | None = None,
    equivalence: EquivalenceJudge | None = None,
    gold: Gold | None = None,
) -> TrainResult:
    """Runs the unfinished stages in `config.output_dir` and returns the last policy.

    `reward` and `policy` configure every reward model and every policy; the run sets `output_dir` of both, and
    `reward_model_path` of the policy, for each stage. `pairs` and `prompts` replace their datasets, `equivalence`
    replaces the judge of `config.equivalence`. With `gold` the reward models are also compared with it on the policy's
    answers.

    `final` of the result has the last evaluation of the policy and, from the last round, rlp/rm_accuracy_offline and
    rlp/rm_accuracy_policy (before and after the refit), rlp/rm_drift, rlp/rm_order_agreement, rlp/rm_variance_ratio.
    Raises ValueError for bad input before any time is spent, when the folder holds a run with other settings, and
    if a refitted model no longer distinguishes the answers to a prompt.
    """
    config = resolved(config, RLPConfig, "train_rlp")
    reward, policy = resolved(reward, RewardConfig, "train_rlp"), resolved(policy, PPOConfig, "train_rlp")
    check_one_process("rlp")
    run = _open(config, reward, policy, pairs, eval_pairs, prompts, eval_prompts, equivalence, gold)
    with stop_at_once(), locked(Path(config.output_dir)):
        judged_by = config.reward_model_path or run.train_reward("reward", reward.model_name_or_path)
        final = config.policy_path or run.train_policy("policy", judged_by)
        found: dict[str, float] = {}
        for round_ in range(1, config.rounds + 1) if config.refinement != "none" else ():
            judged_by, found = run.refit(round_, judged_by, final)
            final = run.train_policy(f"round-{round_}/policy", judged_by)
        result = run.result or run.read_result(Path(final))
    push(config, Path(final))
    return replace(result, final={**result.final, **found})


@dataclass(kw_only=True)
class _Run:
    """The state that all stages of a run share."""

    config: RLPConfig
    reward: RewardConfig
    policy: PPOConfig
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[TokenizedExample]
    pairs: Data
    examples: dict[str, Sequence[Example] | None]
    equivalence: EquivalenceJudge | None
    gold: Gold | None
    result: TrainResult | None = None
    """Result of the policy that was trained last; None before the first."""

    def folder(self, name: str) -> Path:
        return Path(self.config.output_dir) / name

    def train_reward(
        self, name: str, start: str, synthetic: Sequence[TokenizedExample] = (), views: Views | None = None
    ) -> str:
        folder = str(self.folder(name))
        if not _skipped(folder):
            settings = replace(self.reward, output_dir=folder, model_name_or_path=start, **self._tokenizer(start))
            examples = self.examples["pairs"], self.examples["eval_pairs"]
            with part_of(*([RLP] if views or synthetic else [])):
                train_reward_model(settings, *examples, synthetic=synthetic, views=views)
        return folder

    def train_policy(self, name: str, judged_by: str) -> str:
        folder = str(self.folder(name))
        if not _skipped(folder):
            settings = replace(self.policy, output_dir=folder, reward_model_path=judged_by)
            with part_of(*([RLP] if "/" in name else [])):
                self.result = train_ppo(settings, self.examples["prompts"], self.examples["eval_prompts"])
        return folder

    def refit(self, round_: int, judged_by: str, policy: str) -> tuple[str, dict[str, float]]:
        """Returns the folder of the refitted reward model and its comparison with the previous reward model."""
        config, name = self.config, f"round-{round_}"
        self.result = None  # frees the policy and the critic before the models of the refit are loaded
        report = self.folder(f"{name}/report.json")
        if report.exists():
            found = json.loads(report.read_text(encoding="utf-8"))
            self._check_variance(found)
            return str(self.folder(f"{name}/reward")), found
        answers = self._answers(round_, policy)
        before = self._scores(judged_by, answers)
        synthetic = self._synthetic(name, answers, before) if config.with_pairs else []
        views = Views(config=config, answers=answers) if config.with_views else None
        start = judged_by if config.refit_from == "reward" else self.reward.model_name_or_path
        refitted = self.train_reward(f"{name}/reward", start, synthetic, views)
        worth = [self._worth(one) for one in answers] if self.gold else None
        found = compare_scores(config.seed, answers, before, self._scores(refitted, answers), worth)
        if self.pairs.eval:
            for which, path in (("before", judged_by), ("after", refitted)):
                accuracy = held_out_accuracy(self.reward, self._load_reward(path), self.pairs.eval)
                found[f"rlp/rm_accuracy_offline_{which}"] = accuracy
        if views:
            found |= view_activity(read_metrics(Path(refitted) / "metrics.jsonl"))
        write_file(report, json.dumps(found, indent=2) + "\n")
        self._check_variance(found)
        return refitted, found

    def read_result(self, folder: Path) -> TrainResult:
        """Reads the result of a policy that was trained before this run was resumed."""
        history = [row for row in read_metrics(folder / "metrics.jsonl") if row["step"] > 0]
        model = self._load_policy(str(folder))
        return TrainResult(model=model, tokenizer=self.tokenizer, history=history, final={}, output_dir=folder)

    def _answers(self, round_: int, policy: str) -> list[Answers]:
        file = self.folder(f"round-{round_}/answers.jsonl")
        if not file.exists():
            config, settings = self.config, self.policy
            log.info("rlp: %d answers to each of %d prompts", config.num_answers, len(self.prompts))
            model, eos = self._load_policy(policy), end_ids(self.tokenizer)
            own = {"temperature": config.answer_temperature, "seed": config.seed, "stream": ANSWER_STREAM}
            engine = TransformersEngine.of(settings, model, eos, **own)
            write_rows(file, map(asdict, sample_answers(engine, self.prompts, config.num_answers, round_)))
        return [Answers(**row) for row in read_rows(file)]

    def _synthetic(self, name: str, answers: Sequence[Answers], scores: Sequence[Tensor]) -> list[TokenizedExample]:
        file = self.folder(f"{name}/pairs.jsonl")
        if not file.exists():
            found = synthetic_pairs(
                self.config,
                answers,
                [self._text(one.prompt) for one in answers],
                [[self._text(response) for response in one.responses] for one in answers],
                [score.tolist() for score in scores],
                self.equivalence,
            )
            report = self.folder(f"{name}/spg.json")
            report.write_text(json.dumps(found.report, indent=2) + "\n", encoding="utf-8")
            log.info("spg: %s", json.dumps(found.report))
            write_rows(file, map(self._pair_row, found.pairs))
        rows = [row.pop("ids") | {"row": row["row"]} for row in read_rows(file)]
        if not rows:
            log.warning(
                "spg: no synthetic pair: the refit repeats the first training; %s/spg.json has the reasons",
                name,
            )
        return [TokenizedExample(**row) for row in rows]

    def _pair_row(self, pair: TokenizedExample) -> dict[str, object]:
        ids = {"prompt": pair.prompt, "chosen": pair.chosen or [], "rejected": pair.rejected or []}
        return {"row": pair.row, **{side: self._text(tokens) for side, tokens in ids.items()}, "ids": ids}

    def _check_variance(self, found: dict[str, float]) -> None:
        ratio, least = found["rlp/rm_variance_ratio"], self.config.min_reward_variance
        if ratio < least:
            raise ValueError(
                "min_reward_variance: the variance of the scores among the answers to one prompt has fallen to "
                f"{ratio:.3g} of its value before the refit, below {least:g}: the reward model has learnt to ignore "
                "the answer. Lower mib_weight and use a new output_dir, or set min_reward_variance to 0 to continue"
            )

    def _scores(self, reward_model: str, answers: Sequence[Answers]) -> list[Tensor]:
        """Returns the scores of the answers, one tensor [n] float32 per prompt."""
        model = self._load_reward(reward_model)
        trees = [one.tree for one in answers]
        budget = self.config.micro_batch_tokens
        return per_response(model, trees, budget, sequence_scores, "reward_model_path")

    def _load_reward(self, path: str) -> PreTrainedModel:
        return load_reward_model(
            path,
            pad_token_id=special_ids(self.tokenizer)[1],
            must_be_trained=True,
            device=resolve_device(self.reward.device),
            dtype=self.reward.dtype,
            trust_remote_code=self.reward.trust_remote_code,
            layers=LayerOptions.of(self.reward),
        )

    def _load_policy(self, path: str) -> PreTrainedModel:
        settings = self.policy
        model = load_policy(
            path,
            field="policy_path",
            device=resolve_device(settings.device),
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            layers=LayerOptions.of(settings),
        )
        limit_vocabulary(model, self.tokenizer)
        return model

    def _tokenizer(self, start: str) -> dict[str, str]:
        """Returns the tokenizer of section `reward`, which a refit needs if it starts from another model than this
        section."""
        named = self.reward.tokenizer_name_or_path or self.reward.model_name_or_path
        return {} if start == self.reward.model_name_or_path else {"tokenizer_name_or_path": named}

    def _worth(self, answers: Answers) -> list[float]:
        assert self.gold is not None
        prompt = self._text(answers.prompt)
        return [self.gold(prompt, self._text(response)) for response in answers.responses]

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def _open(
    config: RLPConfig,
    reward: RewardConfig,
    policy: PPOConfig,
    pairs: Sequence[Example] | None,
    eval_pairs: Sequence[Example] | None,
    prompts: Sequence[Example] | None,
    eval_prompts: Sequence[Example] | None,
    equivalence: EquivalenceJudge | None,
    gold: Gold | None,
) -> _Run:
    require(bool(config.output_dir), "output_dir", config.output_dir, "the folder of the run and of all its stages")
    check_sections(config, {"reward": reward, config.policy: policy})
    _check_same_run(config)
    given = {"reward_model_path": config.reward_model_path, "policy_path": config.policy_path}
    roles = {field: path for field, path in implicit_sources(policy).items() if not holds_adapter(path)}
    for field, path in (given | roles).items():
        if path:
            found = read_model_config(path, field, policy.trust_remote_code)
            if field == "reward_model_path":
                check_head(found, path, field)
    for part in ("", *(f"round-{i}/" for i in range(1, config.rounds + 1))):
        for stage, section in (("reward", reward), ("policy", policy)):
            _check_stage(config, f"{part}{stage}", section)
    pair_tokenizer, judged = open_inputs(replace(reward, output_dir=""), ["chosen", "rejected"], pairs, eval_pairs)
    tokenizer, data = open_inputs(replace(policy, output_dir=""), reset_fields(policy), prompts, eval_prompts)
    _check_tokenizers(config, policy, tokenizer, pair_tokenizer, judged.conversations or data.conversations)
    asked = with_room(data.train, "train", policy.max_length, policy.response_length)
    asked = asked[: config.num_answer_prompts or None]
    if config.refinement != "none":
        longest = max(len(row.prompt) for row in asked) + config.num_answers * policy.response_length
        require(
            longest <= config.micro_batch_tokens,
            "micro_batch_tokens",
            config.micro_batch_tokens,
            f"at least {longest}: a prompt with all its answers is scored at once",
        )
    if config.with_pairs and config.pairing == "spg" and equivalence is None:
        equivalence = open_judge(
            config.equivalence,
            device=config.device,
            dtype=config.dtype,
            batch_tokens=config.nli_batch_tokens,
            side_tokens=config.nli_side_tokens,
        )
    open_repository(config)
    create_output_dir(config.output_dir, config)
    return _Run(
        config=config,
        reward=reward,
        policy=policy,
        tokenizer=tokenizer,
        prompts=asked,
        pairs=judged,
        examples={"pairs": pairs, "eval_pairs": eval_pairs, "prompts": prompts, "eval_prompts": eval_prompts},
        equivalence=equivalence,
        gold=gold,
    )


def _check_tokenizers(
    config: RLPConfig,
    policy: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    pair_tokenizer: PreTrainedTokenizerBase,
    conversations: bool,
) -> None:
    """Raises ValueError if the reward model and the policy have different tokenizers or chat templates. A refit gives
    the policy's answers to the reward model as ids, so both must read ids in the same way."""
    if config.refinement == "none":
        return
    if found := difference(tokenizer, pair_tokenizer, conversations=conversations):
        raise ValueError(
            f"tokenizer_name_or_path: section reward and section {config.policy} have tokenizers that differ "
            f"({found.told}); a refit gives the policy's ids to the reward model, so give both sections "
            "the same tokenizer"
        )
    for field, source in (("reward_model_path", config.reward_model_path), ("policy_path", config.policy_path)):
        if source:
            require_same_tokenizer(field, source, tokenizer, policy, conversations=conversations)


def _check_same_run(config: RLPConfig) -> None:
    """Raises ValueError if the folder is in use or holds anything but an earlier part of this run."""
    check_idle(config.output_dir)
    file = Path(config.output_dir) / "config.yaml"
    if not file.exists():
        check_output_dir(config.output_dir)
        return
    other = differences(config, file, MAY_CHANGE)
    rule = f"a new folder: it holds a run of another configuration ({'; '.join(other)})"
    require(not other, "output_dir", config.output_dir, rule)


def _check_stage(config: RLPConfig, name: str, section: RewardConfig | PPOConfig) -> None:
    """Raises ValueError if the folder of a stage holds anything but this stage, trained with the same section."""
    folder = Path(config.output_dir) / name
    if not holds_model(str(folder)):
        if not is_unfinished(str(folder)):  # an unfinished run is resumed or refused by its trainer
            check_output_dir(str(folder))
        return
    given = ["reward_model_path"]  # set by the run, like the model that a refit starts from
    if config.refit_from == "reward" and "/" in name:
        given += ["model_name_or_path", "tokenizer_name_or_path"]
    other = differences(section, folder / "config.yaml", [*SAME_MODEL, *given])
    rule = f"a new folder: {name} in it was trained by another section ({'; '.join(other)})"
    require(not other, "output_dir", config.output_dir, rule)


def _skipped(folder: str) -> bool:
    if holds_model(folder):
        log.info("rlp: %s holds a finished run; skipped", folder)
        return True
    return False
