"""End-to-end tests of RLP on tiny models: its results compared with those of the single trainers, and how runs
resume."""

import gc
import json
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastrlhf.algorithms import rlp
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.reward_model import train_reward_model
from fastrlhf.algorithms.rlp import train_rlp
from fastrlhf.cli import parse
from fastrlhf.config import DRPOConfig, PPOConfig, RewardConfig, RLPConfig, SFTConfig
from fastrlhf.data.tokens import tokenize_examples
from fastrlhf.evaluation.equivalence import Comparison, Relation
from fastrlhf.runtime.metrics import read_metrics, read_rows
from tests import hub_server, tiny

PAIRS, HELD_OUT, PROMPTS = tiny.examples(12), tiny.examples(8, seed=1), tiny.examples(10, seed=2)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def first(policy, tmp_path_factory):
    """Trains a reward model and a policy without refinement; returns the settings with which other runs start from
    both."""
    out = tmp_path_factory.mktemp("first") / "rlp"
    run(settings(out, refinement="none"), policy)
    return {"reward_model_path": str(out / "reward"), "policy_path": str(out / "policy")}


@pytest.fixture(scope="module")
def spg(policy, first, tmp_path_factory):
    """Runs SPG from the models of `first`; returns the run's folder and its result."""
    out = tmp_path_factory.mktemp("spg") / "rlp"
    return out, run(settings(out, refinement="spg", **first), policy)


def sections(policy: str) -> tuple[RewardConfig, PPOConfig]:
    fields = {"model_name_or_path": policy, "max_length": 32, "max_steps": 2, "progress": False, "seed": 5}
    reward = RewardConfig(**fields, per_device_train_batch_size=4, learning_rate=1e-3)
    ppo = PPOConfig(
        **fields,
        per_device_train_batch_size=4,
        response_length=5,
        num_ppo_epochs=1,
        temperature=1.0,
        learning_rate=1e-3,
    )
    return reward, ppo


def settings(folder: Path, **fields) -> RLPConfig:
    defaults = {"num_answers": 4, "views_per_step": 3, "view_width": 16, "view_latent": 4, "min_reward_variance": 0.0}
    return RLPConfig(output_dir=str(folder), seed=5, **defaults | {"num_calibration_prompts": 0} | fields)


def same_length(comparisons: Sequence[Comparison]) -> list[Relation]:
    """A stand-in for an equivalence judge: two answers are equivalent if they have equally many words."""
    return [Relation(2 * (len(c.premise.split()) == len(c.hypothesis.split()))) for c in comparisons]


def run(config: RLPConfig, policy: str, **given):
    data = {"pairs": PAIRS, "eval_pairs": HELD_OUT, "prompts": PROMPTS, "equivalence": same_length}
    return train_rlp(config, *sections(policy), **data | given)


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def same(first: Path | str, second: Path | str) -> bool:
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", [PPOConfig, DRPOConfig])
def test_without_refinement_it_is_the_reward_model_and_plain_on_policy_training_bit_for_bit(policy, tmp_path, kind):
    reward, ppo = sections(policy)
    ppo = replace(ppo, reset_prob=0.5) if kind is DRPOConfig else ppo
    train_reward_model(replace(reward, output_dir=str(tmp_path / "rm")), PAIRS, HELD_OUT)
    plain = train_ppo(replace(ppo, output_dir=str(tmp_path / "ppo"), reward_model_path=str(tmp_path / "rm")), PROMPTS)
    config = settings(tmp_path / "rlp", refinement="none")
    ours = train_rlp(config, reward, ppo, pairs=PAIRS, eval_pairs=HELD_OUT, prompts=PROMPTS)
    assert same(tmp_path / "rlp" / "reward", tmp_path / "rm")
    assert same(tmp_path / "rlp" / "policy", tmp_path / "ppo")
    assert [without_times(row) for row in ours.history] == [without_times(row) for row in plain.history]
    assert ours.output_dir == tmp_path / "rlp" / "policy"


def without_times(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not name.startswith("timing/")}


@pytest.mark.parametrize("refinement", ["uml", "spg"])
def test_a_refit_at_lambda_0_and_one_without_synthetic_pairs_is_the_reward_model_again_bit_for_bit(
    policy, first, tmp_path, refinement, caplog
):
    def all_different(comparisons):
        return [Relation.CONTRADICTION] * len(comparisons)

    config = settings(tmp_path / "rlp", refinement=refinement, mib_weight=0.0, min_confidence=1.0, **first)
    result = run(config, policy, equivalence=all_different)
    assert same(tmp_path / "rlp" / "round-1" / "reward", first["reward_model_path"])
    assert same(tmp_path / "rlp" / "round-1" / "policy", first["policy_path"])
    assert result.final["rlp/rm_drift"] == 0.0
    assert result.final["rlp/rm_order_agreement"] == result.final["rlp/rm_variance_ratio"] == 1.0
    assert ("no synthetic pair" in caplog.text) == (refinement == "spg")


def test_spg_trains_on_synthetic_pairs_and_on_those_of_the_dataset(policy, first, spg, tmp_path):
    out, result = spg
    rows = read_rows(out / "round-1" / "pairs.jsonl")
    report = json.loads((out / "round-1" / "spg.json").read_text())
    assert len(rows) == report["pairs"] == report["accepted"] > 0
    answers = {row["row"]: row for row in read_rows(out / "round-1" / "answers.jsonl")}
    assert len(answers) == report["prompts"] == len(PROMPTS)
    tokens = []
    for row in rows:
        drawn = answers[row["row"]]
        assert row["ids"]["prompt"] == drawn["prompt"] == tiny.ids(row["prompt"])
        assert row["ids"]["chosen"] in drawn["responses"]
        assert row["ids"]["rejected"] in drawn["responses"]
        assert len(row["chosen"].split()) != len(row["rejected"].split())
        tokens.append(replace(tokenized()[0], **row["ids"], row=row["row"]))
    reward, _ = sections(policy)
    by_hand = train_reward_model(replace(reward, output_dir=str(tmp_path / "by_hand")), PAIRS, synthetic=tokens)
    assert same(out / "round-1" / "reward", tmp_path / "by_hand")
    assert not same(out / "round-1" / "reward", first["reward_model_path"])
    assert not same(out / "round-1" / "policy", first["policy_path"])
    assert by_hand.output_dir != result.output_dir == out / "round-1" / "policy"
    cards = [out / "round-1" / "reward", out / "round-1" / "policy", tmp_path / "by_hand", Path(first["policy_path"])]
    named = ["arxiv.org/abs/2403.19279" in (folder / "README.md").read_text() for folder in cards]
    assert named == [True, True, False, False]


def test_only_the_last_policy_is_uploaded_also_by_a_run_that_was_finished_before(policy, first, spg, monkeypatch):
    out, _ = spg
    with hub_server.serving() as hub:
        hub_server.use(monkeypatch, hub.url)
        run(settings(out, refinement="spg", push_to_hub=True, hub_model_id="ada/rlp", **first), policy)
        assert [*hub.files] == [("ada/rlp", "main")]
        files = hub.files["ada/rlp", "main"]
        assert {"README.md", "model.safetensors", "tokenizer.json"} <= {*files}
        assert all(content == (out / "round-1" / "policy" / name).read_bytes() for name, content in files.items())


def tokenized():
    return tokenize_examples(PAIRS[:1], tiny.tokenizer(), max_length=32, fields=("chosen", "rejected")).examples


def test_uml_trains_on_views_and_pairs_and_both_combines_them(policy, first, tmp_path):
    for refinement in ("uml", "both"):
        out = tmp_path / refinement
        result = run(settings(out, refinement=refinement, **first), policy)
        rows = read_metrics(out / "round-1" / "reward" / "metrics.jsonl")
        assert all(-2 < row["views/jsd"] < 0 for row in rows)
        assert (out / "round-1" / "pairs.jsonl").exists() == (refinement == "both")
        assert "rlp/views_active" in result.final


def test_the_policy_starts_again_from_the_sft_model_and_a_second_round_refits_the_refitted(policy, first, tmp_path):
    out = tmp_path / "rlp"
    run(settings(out, refinement="spg", rounds=2, **first), policy)
    _, ppo = sections(policy)
    again = replace(ppo, output_dir=str(tmp_path / "again"), reward_model_path=str(out / "round-2" / "reward"))
    train_ppo(again, PROMPTS)
    assert same(tmp_path / "again", out / "round-2" / "policy")
    first, second = (read_rows(out / f"round-{i}" / "answers.jsonl") for i in (1, 2))
    assert [row["prompt"] for row in first] == [row["prompt"] for row in second]
    assert first != second


def test_a_refit_may_start_from_the_reward_model(policy, first, tmp_path):
    run(settings(tmp_path / "rlp", refinement="uml", mib_weight=0.0, refit_from="reward", **first), policy)
    reward, _ = sections(policy)
    twice = replace(reward, model_name_or_path=first["reward_model_path"], output_dir=str(tmp_path / "twice"))
    train_reward_model(twice, PAIRS)
    assert same(tmp_path / "rlp" / "round-1" / "reward", tmp_path / "twice")
    assert not same(tmp_path / "twice", first["reward_model_path"])


def test_a_restarted_run_does_only_what_is_missing_and_ends_with_the_same_result(
    policy, first, spg, tmp_path, monkeypatch
):
    out, real = tmp_path / "rlp", rlp.train_ppo
    config = settings(out, refinement="spg", **first)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rlp, "train_ppo", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config, policy)
    done = {file: file.stat().st_mtime_ns for file in out.rglob("*.*") if file.name != "config.yaml"}
    monkeypatch.setattr(rlp, "train_ppo", real)
    asked = []
    again = run(config, policy, equivalence=lambda comparisons: asked.append(comparisons) or [])
    assert same(out / "round-1" / "policy", spg[0] / "round-1" / "policy")
    assert again.final == spg[1].final
    assert not asked
    assert {file: file.stat().st_mtime_ns for file in done} == done
    third = run(config, policy)  # all stages are complete
    assert [row["objective/scores"] for row in third.history] == [row["objective/scores"] for row in again.history]
    assert all(map(torch.equal, third.model.state_dict().values(), again.model.state_dict().values()))
    with pytest.raises(
        ValueError,
        match=r"a new folder: it holds a run of another configuration \(min_confidence: 0.5 there, 0.7 here\)",
    ):
        run(replace(config, min_confidence=0.7), policy)


@pytest.mark.parametrize("refit_from", ["start", "reward"])
def test_another_section_than_a_finished_stage_was_trained_by_is_refused_and_a_moved_run_is_not(
    policy, tmp_path, refit_from
):
    config = settings(tmp_path / "rlp", refinement="uml", mib_weight=0.0, refit_from=refit_from)
    reward, ppo = sections(policy)
    data = {"pairs": PAIRS, "eval_pairs": HELD_OUT, "prompts": PROMPTS}
    train_rlp(config, reward, ppo, **data)
    moved = (tmp_path / "rlp").rename(tmp_path / "moved")
    config = replace(config, output_dir=str(moved))
    before = [(file, file.stat().st_mtime_ns) for file in moved.rglob("*.safetensors")]
    train_rlp(config, replace(reward, micro_batch_tokens=4096), replace(ppo, save_steps=1), **data)
    assert [(file, file.stat().st_mtime_ns) for file in moved.rglob("*.safetensors")] == before
    changes = (
        (replace(reward, learning_rate=2e-3), ppo, r"reward in it .* \(learning_rate: 0.001 there, 0.002 here\)"),
        (reward, replace(ppo, kl_coef=0.5), r"policy in it .* \(kl_coef: 0.05 there, 0.5 here\)"),
    )
    for part in ("", "round-1/"):
        for other_reward, other_policy, message in changes:
            with pytest.raises(ValueError, match=f"output_dir: must be a new folder: {part}{message}"):
                train_rlp(config, other_reward, other_policy, **data)
        for stage in ("reward", "policy"):  # without these folders, round-1 is checked next
            shutil.rmtree(moved / stage, ignore_errors=True)


def test_user_provided_models_replace_the_first_stages(policy, spg, tmp_path):
    out, _ = spg
    assert not (out / "reward").exists()
    assert not (out / "policy").exists()
    run(settings(tmp_path / "whole", refinement="spg"), policy)
    assert same(tmp_path / "whole" / "round-1" / "policy", out / "round-1" / "policy")


def test_a_dpo_model_may_be_an_adapter_and_a_missing_one_is_reported_at_once(policy, first, tmp_path):
    reward, ppo = sections(policy)
    adapter = tiny.save_adapter(tmp_path / "dpo", policy, 1)
    config = settings(tmp_path / "rlp", refinement="none", reward_model_path=first["reward_model_path"])
    missing = replace(ppo, dpo_model_path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"^dpo_model_path: "):
        train_rlp(config, reward, missing, pairs=PAIRS, prompts=PROMPTS)
    train_rlp(config, reward, replace(ppo, dpo_model_path=adapter), pairs=PAIRS, prompts=PROMPTS)


def test_two_runs_never_share_a_folder(policy, first, spg, tmp_path):
    """Tries to start a second run in the folder between two stages of the first run, when no stage holds a lock."""
    config, refused = settings(tmp_path / "rlp", refinement="spg", **first), []

    def intruding(comparisons):
        if not refused:
            with pytest.raises(ValueError, match="another run is training in") as refusal:
                run(replace(config, rounds=2), policy)
            refused.append(refusal)
        return same_length(comparisons)

    result = run(config, policy, equivalence=intruding)
    assert len(refused) == 1
    assert result.history[0]["loss/policy_avg"] == spg[1].history[0]["loss/policy_avg"]
    assert parse(RLPConfig, ["--config", str(tmp_path / "rlp" / "config.yaml")], "rlp").rounds == 1


def test_a_run_killed_while_it_writes_a_report_can_be_restarted(policy, first, tmp_path, monkeypatch):
    """The run is killed when the report file exists but is still empty."""
    config, write = settings(tmp_path / "rlp", refinement="spg", **first), Path.write_text

    def deadly(path, text, *arguments, **keywords):
        write(path, "" if "report.json" in path.name else text, *arguments, **keywords)
        if "report.json" in path.name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", deadly)
        with pytest.raises(KeyboardInterrupt):
            run(config, policy)
    assert run(config, policy).final["rlp/rm_variance_ratio"] > 0


def test_the_policy_is_freed_before_the_refit(policy, first, tmp_path, monkeypatch):
    trained, left, train = [], [], rlp.train_ppo

    def training(*arguments):
        result = train(*arguments)
        trained.append(weakref.ref(result.model))
        return result

    def sampling(*arguments):
        gc.collect()
        left.extend(model() for model in trained)
        raise KeyboardInterrupt

    monkeypatch.setattr(rlp, "train_ppo", training)
    monkeypatch.setattr(rlp, "sample_answers", sampling)
    with pytest.raises(KeyboardInterrupt):
        run(settings(tmp_path / "rlp", refinement="uml", reward_model_path=first["reward_model_path"]), policy)
    assert left == [None]


def test_a_finished_policy_is_read_again_in_the_dtype_of_its_section(policy, first, tmp_path):
    reward, ppo = sections(policy)
    config = settings(tmp_path / "rlp", refinement="none", reward_model_path=first["reward_model_path"])
    for _ in range(2):
        result = train_rlp(config, reward, replace(ppo, dtype="bfloat16"), pairs=PAIRS, prompts=PROMPTS)
        assert result.model.dtype == torch.bfloat16


def test_the_gold_judge_only_affects_the_report(policy, first, spg, tmp_path):
    def shorter(prompt: str, response: str) -> float:
        return -float(len(response.split()))

    told = run(settings(tmp_path / "told", refinement="spg", **first), policy, gold=shorter).final
    gold = {name for name in told if "accuracy_policy" in name}
    assert gold == {"rlp/rm_accuracy_policy_before", "rlp/rm_accuracy_policy_after"}
    assert {name: value for name, value in told.items() if name not in gold} == spg[1].final
    assert 0 <= told["rlp/rm_accuracy_policy_after"] <= 1
    folders = {"before": Path(first["reward_model_path"]), "after": tmp_path / "told" / "round-1" / "reward"}
    for which, folder in folders.items():
        accuracy = read_metrics(folder / "metrics.jsonl")[-1]["eval_accuracy"]
        assert told[f"rlp/rm_accuracy_offline_{which}"] == accuracy


def test_a_refit_that_ignores_the_answer_stops_the_run_before_a_policy_is_trained_on_it(
    policy, first, tmp_path, monkeypatch
):
    compare = rlp.compare_scores
    monkeypatch.setattr(rlp, "compare_scores", lambda *a: compare(*a) | {"rlp/rm_variance_ratio": 0.2})
    config = settings(tmp_path / "rlp", refinement="uml", min_reward_variance=0.25, **first)
    for _ in range(2):  # the restarted run stops again
        with pytest.raises(
            ValueError, match=r"min_reward_variance: .* fallen to 0.2 of its value before the refit, below 0.25"
        ):
            run(config, policy)
    assert not (tmp_path / "rlp" / "round-1" / "policy").exists()
    run(replace(config, min_reward_variance=0.1), policy)


def test_errors_are_reported_before_anything_is_trained(policy, tmp_path):
    cases = (
        (
            settings(tmp_path / "a", equivalence="nowhere:same"),
            {"equivalence": None},
            "equivalence: 'nowhere' cannot be imported",
        ),
        (settings(tmp_path / "a", micro_batch_tokens=16), {}, "micro_batch_tokens: must be at least 2"),
        (settings(tmp_path / "a", reward_model_path=str(tmp_path)), {}, "reward_model_path: .* holds no model"),
        (settings(tmp_path / "a"), {"pairs": PROMPTS[:0]}, "there are no rows to train or evaluate on"),
        (replace(settings(tmp_path / "a"), output_dir=""), {}, "output_dir: must be the folder"),
    )
    for config, given, message in cases:
        with pytest.raises(ValueError, match=message):
            run(config, policy, **given)
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        run(settings(tmp_path / "b"), policy)


def test_the_recipe_is_one_chain_with_the_settings_of_the_paper(monkeypatch):
    monkeypatch.setenv("FASTRLHF_DATA", "/data")
    kinds = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig, "rlp": RLPConfig}
    sft, reward, ppo, own = (parse(kind, ["--config", "rlp_alpacafarm"], name) for name, kind in kinds.items())
    assert sft.output_dir == reward.model_name_or_path == ppo.model_name_or_path
    assert (own.num_answers, own.min_confidence, own.mib_weight, own.clustering) == (10, 0.5, 0.5, "strict")
    assert (reward.learning_rate, reward.batch_size, ppo.batch_size, ppo.kl_coef) == (3e-6, 16, 512, 0.0067)
    # A prompt (at most max_length - response_length tokens) and all its answers are scored at once.
    assert ppo.max_length - ppo.response_length + 10 * ppo.response_length <= own.micro_batch_tokens
