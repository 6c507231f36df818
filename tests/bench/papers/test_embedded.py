import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.papers import embedded
from bench.papers.embedded import ARMS, BY_LENGTH, GRANULARITY, LENGTHS, PROMPTS, RESETS, UPDATES, Arm
from fastrlhf import demo
from fastrlhf.data.toy import FACTS, ToyTask, read_post, toy_tokenizer
from fastrlhf.rewards.terms import sentence_end_ids
from fastrlhf.types import Prefix, Rollout


def test_a_sentence_is_a_fact_and_the_ids_are_those_of_the_task(tmp_path):
    embedded._sentence_tokenizer().save_pretrained(tmp_path)
    tokenizer = type(toy_tokenizer()).from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == toy_tokenizer().get_vocab()
    ends = tokenizer.convert_ids_to_tokens(sentence_end_ids(tokenizer).tolist())
    assert sorted(ends) == sorted(value for values in FACTS.values() for value in values)
    assert tokenizer.decode(toy_tokenizer()("boss angry rent")["input_ids"]) == "boss angry. rent "


def test_one_pass_over_all_prompts_is_the_same_run_as_in_the_granularity_experiment():
    assert PROMPTS[-1] == 40 * embedded.EPISODES
    for arm in ARMS["rto"]:
        if arm not in GRANULARITY:
            assert arm.settings["max_steps"] * embedded.EPISODES == arm.num_prompts
    assert [arm.settings.get("reward_shaping") for arm in GRANULARITY] == ["token", "sentence", "eos", "rs", None]


def test_the_reset_probabilities_are_those_of_the_paper():
    assert list(UPDATES) == [0, 0.25, 0.5, 0.75, 1]
    assert [arm.settings.get("reset_prob", 0) for arm in RESETS] == list(UPDATES)


def test_the_arms_of_a_length_differ_only_in_resets_and_share_their_models():
    for facts, ppo, drpo in zip(LENGTHS, BY_LENGTH[::2], BY_LENGTH[1::2], strict=True):
        assert (ppo.method, drpo.method, drpo.settings["reset_prob"]) == ("ppo", "drpo", 1)
        assert (ppo.facts, drpo.facts, ppo.models, drpo.models) == (facts, facts, "lengths", "lengths")
    _, task, folder = embedded._problem("lengths", 0, Path("runs"))
    assert (task.min_salient, task.max_salient) == (min(LENGTHS), max(LENGTHS))
    assert folder == Path("runs/lengths/seed-0")


@pytest.mark.parametrize("arm", [arm for arms in ARMS.values() for arm in arms], ids=lambda arm: arm.folder)
def test_the_settings_of_every_arm_are_read(arm):
    settings = demo.stage_config(arm.method, demo.DemoConfig(), Path("runs"))
    assert replace(settings, **arm.settings).max_steps == arm.settings.get("max_steps", 40)


@pytest.mark.parametrize("models", ["rto", "drpo", "lengths"])
def test_arms_share_the_models_of_a_seed_and_run_once(models, tmp_path, monkeypatch):
    """Trains every starting model for two steps, and then two arms for one update of 4 episodes. A second call must
    train nothing."""
    full, rows = demo.stage_config, []

    def short(name, config, out):
        return replace(full(name, config, out), max_steps=2, per_device_train_batch_size=8, progress=False)

    monkeypatch.setattr(demo, "stage_config", short)
    monkeypatch.setattr(embedded, "append_row", lambda row, folder: rows.append(row))
    monkeypatch.setattr(embedded, "EPISODES", 4)
    monkeypatch.setattr(embedded, "DemoConfig", lambda out, seed: demo.DemoConfig(out=out, seed=seed, num_eval=8))
    for name in ("NUM_SFT", "NUM_PAIRS"):
        monkeypatch.setattr(demo, name, 32)
    settings = {"max_steps": 1} | ({"reward_shaping": "sentence"} if models == "rto" else {})
    paper, facts = ("drpo", 3) if models == "lengths" else (models, 0)
    arms = [
        Arm(paper=paper, experiment="x", name=f"a {num}", method=paper, num_prompts=num, settings=settings, facts=facts)
        for num in (8, 16)
    ]
    embedded._make_models(tmp_path, models, 0)
    first = [embedded._run_arm(tmp_path, tmp_path, arm, 0) for arm in arms]
    sft = (tmp_path / models / "seed-0/sft/model.safetensors").stat().st_mtime_ns
    embedded._make_models(tmp_path, models, 0)
    assert [embedded._run_arm(tmp_path, tmp_path, arm, 0) for arm in arms] == first
    assert (tmp_path / models / "seed-0/sft/model.safetensors").stat().st_mtime_ns == sft
    assert [row["arm"] for row in rows] == ["a 8", "a 16"]
    for row in first:
        assert (row["updates"], len(row["score_curve"]), len(row["gold_curve"])) == (1, 1, 1)
        if paper == "drpo":  # the reward of this experiment is the score of the gold judge
            # the tolerance covers the rounding of both curves
            assert row["gold_curve"][0] == pytest.approx(embedded.SCALE * row["score_curve"][0], abs=4e-4)
    if facts:
        posts = [row["prompt"] for row in map(json.loads, (tmp_path / models / "seed-0/x_a_8/samples.jsonl").open())]
        assert {sum(fact.matters for fact in read_post(post.replace(".", ""))) for post in posts} == {facts}
    history = [json.loads(line) for line in (tmp_path / models / "seed-0/x_a_8/metrics.jsonl").read_text().splitlines()]
    assert ("reward/dpo" in history[0]) == (paper == "rto")


def test_recording_does_not_change_the_judge():
    task, gold = ToyTask(seed=0), []
    (example,) = task.examples("train", 1)
    tokenizer = toy_tokenizer()
    prompt, ideal = (tokenizer(text)["input_ids"] for text in (example.prompt, task.ideal(str(example.prompt))))
    prefix = Prefix(token_ids=prompt, num_reset=0, row=0, episode=0)
    rollout = Rollout(prefix=prefix, completion=ideal, sampler_logprob=[0.0] * len(ideal), ended=False)
    assert embedded._recorded(lambda rollouts: [7.0] * len(rollouts), task, gold)([rollout]) == [7.0]
    assert gold == [pytest.approx(task.gold_reward(str(example.prompt), task.ideal(str(example.prompt))), abs=1e-6)]


def test_the_tables_pair_the_seeds_and_all_figures_are_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    found = {
        arm.folder: [
            {"gold_reward": seed + 2 * i, "kl": 1.0, "tokens": 100, "score_curve": [seed, i], "gold_curve": [0.0, 4.0]}
            for seed in (0.0, 10.0)
        ]
        for arms in (GRANULARITY[::-1], ARMS["drpo"], ARMS["rto"][len(GRANULARITY) :])
        for i, arm in enumerate(arms)
    }
    monkeypatch.setattr(embedded, "run_arms", lambda *arguments: found)
    granularity, prompts = embedded.run_embedded("rto", 2, 1, tmp_path, tmp_path).split("\n\n")
    assert "| token | 4.50 | 2.00 +- 0.00 | 2.00 +- 0.00 | 13.00 +- 63.55 | 8.00 +- 0.00 | 1.00 |" in granularity
    assert "| none | 2.50 |  |" in granularity
    # gold_reward grows by 2 per arm. RTO has the arms 0, 1, 2 and PPO 3, 4, 5: their difference is 2 * (0 - 3) = -6.
    # In the last row, with all prompts, RTO is the arm "token" (4) and PPO the arm "none" (0): 2 * (4 - 0) = 8.
    assert prompts.splitlines()[2].endswith("| -6.00 +- 0.00 | 0.00 +- 0.00 |")
    assert prompts.splitlines()[-1].endswith("| 8.00 +- 0.00 | 8.00 +- 0.00 |")
    resets, lengths = embedded.run_embedded("drpo", 2, 1, tmp_path, tmp_path).split("\n\n")
    assert resets.splitlines()[3] == "| 0.25 | 7.00 +- 63.55 | 2.00 +- 0.00 | 1.00 | 100 |"
    # The stand-in's gold reward is seed + 2 * arm, and the seeds are 0 and 10, with mean 5. In the row of 5 facts, PPO
    # is arm 7 and DR-PO arm 8, so their means are 5 + 2 * 7 = 19 and 5 + 2 * 8 = 21.
    assert lengths.splitlines()[3] == "| 5 | 19.00 +- 63.55 | 21.00 +- 63.55 | 2.00 +- 0.00 | 100 and 100 |"
    names = [path.name for path in sorted((tmp_path / "figures").iterdir())]
    assert names == ["drpo_lengths.png", "drpo_resets.png", "rto_granularity.png", "rto_prompts.png"]
