import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from math import exp
from statistics import fmean

import pytest

from fastrlhf.data.toy import (
    FACTS,
    MAX_FACTS,
    MAX_SUMMARY_TOKENS,
    QUESTION,
    SPLITS,
    Fact,
    ToyTask,
    read_post,
    read_summary,
    toy_model_config,
    toy_tokenizer,
)
from fastrlhf.types import Example

TASK = ToyTask()
POST = "dog lost CAR fast RENT late lamp dim BOSS kind TL;DR:"
"""A hand-written post. Its facts that matter are, in the order of FACTS: boss kind, rent late, car fast."""


def text(value: object) -> str:
    assert isinstance(value, str)
    return value


def golds(task: ToyTask, examples: list[Example], summarise: Callable[[Example], str]) -> list[float]:
    return [task.gold_reward(text(e.prompt), summarise(e)) for e in examples]


def win_rate(ours: list[float], theirs: list[float]) -> float:
    return fmean((a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def test_posts() -> list[Example]:
    return TASK.examples("test", 1_000)


@pytest.fixture(scope="module")
def pairs() -> list[Example]:
    return TASK.examples("preferences", 3_000)


@pytest.mark.parametrize("split", SPLITS)
def test_an_example_depends_on_its_index_and_not_on_how_many_are_asked_for(split):
    assert ToyTask().examples(split, 40)[:7] == TASK.examples(split, 7)
    assert [e.row for e in TASK.examples(split, 7)] == list(range(7))


def test_another_process_with_another_hash_seed_makes_the_same_examples():
    script = "from fastrlhf.data.toy import ToyTask; print(ToyTask(seed=5).examples('preferences', 20))"
    env = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True).stdout
    assert output.strip() == str(ToyTask(seed=5).examples("preferences", 20))


def test_no_post_is_in_two_splits_for_any_seed():
    # With one fact per post only 96 different posts exist, so splits drawn independently would overlap.
    small = {"num_facts": 1, "min_salient": 1, "max_salient": 1, "wrong": 0.0}
    posts = {
        split: {text(e.prompt) for seed in (0, 1) for e in ToyTask(seed=seed, **small).examples(split, 60)}
        for split in ("train", "validation", "test")
    }
    assert all(posts.values())
    assert not posts["train"] & posts["validation"]
    assert not posts["train"] & posts["test"]
    assert not posts["validation"] & posts["test"]


def test_seeds_and_rows_differ():
    prompts = [text(e.prompt) for seed in (0, 1) for e in ToyTask(seed=seed).examples("train", 500)]
    assert len(set(prompts)) == 1_000


def test_only_the_preference_splits_hold_pairs():
    for split in SPLITS:
        (example,) = TASK.examples(split, 1)
        assert example.reference
        assert (example.chosen is not None, example.rejected is not None) == (split.startswith("preferences"),) * 2


def test_posts_and_responses_fit_their_budgets_and_the_vocabulary():
    tokenizer = toy_tokenizer()
    for split in SPLITS:
        for e in TASK.examples(split, 400):
            prompt = tokenizer(text(e.prompt))["input_ids"]
            assert 24 <= len(prompt) <= 40
            responses = [r for r in (e.reference, e.chosen, e.rejected, TASK.ideal(text(e.prompt))) if r is not None]
            for response in responses:
                ids = tokenizer(text(response))["input_ids"]
                assert 1 <= len(ids) < MAX_SUMMARY_TOKENS
                assert tokenizer.unk_token_id not in ids
            assert tokenizer.unk_token_id not in prompt


@pytest.mark.parametrize(
    ("summary", "gold"),
    [
        # covered facts - other facts - words outside facts / 2 + 0.5 (chain) * run * (run - 1) / 2 - 0.05 * words
        ("boss kind rent late car fast", 3 + 0.5 * 3 - 0.3),
        ("boss kind rent late", 2 + 0.5 - 0.2),
        ("boss kind car fast", 2 - 0.2),
        ("rent late car fast", 2 - 0.2),
        ("car fast rent late boss kind", 3 - 0.3),
        ("boss angry rent late car fast", 2 - 1 - 0.3),
        ("boss kind rent late car broken", 2 - 1 + 0.5 - 0.3),
        ("boss kind dog lost rent late car fast", 3 - 1 - 0.4),
        ("boss kind boss kind", 1 - 1 - 0.2),
        ("boss kind rent late car fast car fast", 3 - 1 + 0.5 * 3 - 0.4),
        ("boss late rent fast car kind", -3 - 0.3),
        ("boss kind rent", 1 - 0.5 - 0.15),
        ("kind boss", -1 - 0.1),
        ("boss kind spaceship rent late", 2 - 0.5 + 0.5 - 0.25),
        ("BOSS kind RENT late", -2 - 0.2),
        ("", 0.0),
    ],
)
def test_the_gold_reward_equals_the_sum_of_its_terms_by_hand(summary, gold):
    assert ToyTask(chain=0.5, length_cost=0.05).gold_reward(POST, summary) == pytest.approx(gold, abs=1e-12)


def test_the_ideal_states_what_matters_in_order():
    assert TASK.ideal(POST) == "boss kind rent late car fast"


def test_whitespace_changes_no_reward():
    spaced = "  boss  kind\nrent late "
    assert TASK.gold_reward(POST.replace(" ", "  "), spaced) == TASK.gold_reward(POST, "boss kind rent late")


def test_every_single_change_makes_the_ideal_worse():
    for e in TASK.examples("validation", 60):
        prompt = text(e.prompt)
        ideal = read_summary(TASK.ideal(prompt))
        extra = next((f.subject, f.value) for f in read_post(prompt) if not f.matters)
        changed = [[*ideal[:i], *ideal[i + 1 :]] for i in range(len(ideal))]
        changed += [[*ideal[:i], pair, *ideal[i:]] for i in range(len(ideal) + 1) for pair in (extra, ideal[0])]
        changed += [[*ideal[:i], ideal[i + 1], ideal[i], *ideal[i + 2 :]] for i in range(len(ideal) - 1)]
        best = TASK.gold_reward(prompt, TASK.ideal(prompt))
        assert max(TASK.gold_reward(prompt, " ".join(w for pair in c for w in pair)) for c in changed) < best
        assert TASK.gold_reward(prompt, TASK.ideal(prompt).rsplit(" ", 1)[0]) < best


def test_an_early_mistake_costs_more_than_a_late_one_and_without_chain_the_same():
    early, late = "boss angry rent late car fast", "boss kind rent late car broken"
    assert TASK.gold_reward(POST, early) < TASK.gold_reward(POST, late)
    flat = replace(TASK, chain=0.0)
    assert flat.gold_reward(POST, early) == flat.gold_reward(POST, late)


def test_chain_and_label_settings_change_neither_posts_nor_references():
    other = ToyTask(chain=0.0, length_cost=0.0, label_temperature=9.0, label_flips=0.5).examples("preferences", 50)
    ours = TASK.examples("preferences", 50)
    assert [(e.prompt, e.reference) for e in other] == [(e.prompt, e.reference) for e in ours]


def test_writers_without_haste_rates_write_the_ideal():
    careful = ToyTask(omit=0.0, stray=0.0, wrong=0.0, tire=0.0)
    assert all(e.reference == careful.ideal(text(e.prompt)) for e in careful.examples("train", 200))


def test_the_ideal_nearly_always_beats_the_reference_and_references_are_far_below_it(test_posts):
    ideal = golds(TASK, test_posts, lambda e: TASK.ideal(text(e.prompt)))
    reference = golds(TASK, test_posts, lambda e: text(e.reference))
    assert win_rate(ideal, reference) > 0.93
    assert min(a - b for a, b in zip(ideal, reference, strict=True)) >= 0
    assert fmean(reference) < 0.6 * fmean(ideal)


def test_long_unbroken_runs_are_rare_in_references_and_short_ones_are_not(test_posts):
    def run(e: Example) -> int:
        ideal, stated = read_summary(TASK.ideal(text(e.prompt))), read_summary(text(e.reference))
        return next(
            (i for i, (a, b) in enumerate(zip(ideal, stated, strict=False)) if a != b), min(len(ideal), len(stated))
        )

    runs = [run(e) for e in test_posts]
    assert fmean(r >= 2 for r in runs) > 0.6
    assert 0.05 < fmean(r >= 5 for r in runs) < 0.3


def stated(e: Example) -> list[tuple[str, str]]:
    return read_summary(text(e.reference))


def in_wrong_pairs(e: Example) -> str:
    values = [value for _, value in stated(e)]
    return " ".join(
        f"{subject} {value}" for (subject, _), value in zip(stated(e), values[1:] + values[:1], strict=True)
    )


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(lambda e: "", id="empty"),
        pytest.param(lambda e: e.prompt, id="the whole prompt"),
        pytest.param(lambda e: " ".join(e.prompt.split()[: MAX_SUMMARY_TOKENS - 1]), id="the start of the post"),
        pytest.param(lambda e: e.prompt.lower().removesuffix(f" {QUESTION.lower()}"), id="every fact of the post"),
        pytest.param(lambda e: " ".join(TASK.ideal(e.prompt).split()[:2]), id="one fact"),
        pytest.param(lambda e: " ".join(TASK.ideal(e.prompt).split()[:2] * MAX_FACTS), id="one fact repeated"),
        pytest.param(lambda e: f"{TASK.ideal(e.prompt)} {TASK.ideal(e.prompt)} " * 2, id="the ideal four times"),
        pytest.param(lambda e: " ".join(TASK.ideal(e.prompt).split()[::-1]), id="the ideal backwards"),
        pytest.param(lambda e: " ".join(TASK.ideal(e.prompt).split()[::2]), id="subjects without values"),
        pytest.param(
            lambda e: " ".join(f"{s} {v}" for s, vs in FACTS.items() for v in vs[:1]), id="same for every post"
        ),
        pytest.param(in_wrong_pairs, id="right words in wrong pairs"),
        pytest.param(lambda e: TASK.ideal(e.prompt).replace(" ", ""), id="one unknown word"),
    ],
)
def test_a_degenerate_policy_loses_clearly_to_the_reference(policy, test_posts):
    ours, reference = golds(TASK, test_posts, policy), golds(TASK, test_posts, lambda e: text(e.reference))
    assert win_rate(ours, reference) < 0.1
    assert fmean(ours) < fmean(reference) - 2


def test_the_better_candidate_is_chosen_as_often_as_bradley_terry_says(pairs):
    margins = [
        TASK.gold_reward(text(e.prompt), text(e.chosen)) - TASK.gold_reward(text(e.prompt), text(e.rejected))
        for e in pairs
    ]
    clear = [m for m in margins if m]
    expected = fmean(1 / (1 + exp(-abs(m))) for m in clear)
    assert fmean(m > 0 for m in clear) == pytest.approx(expected, abs=0.02)  # 3 standard errors are 0.017
    assert 0.8 < expected < 0.97
    near = [m for m in margins if 0 < abs(m) < 1.2]
    assert fmean(m > 0 for m in near) == pytest.approx(fmean(1 / (1 + exp(-abs(m))) for m in near), abs=0.08)


def label_margins(task: ToyTask, count: int) -> list[float]:
    """Returns the gold reward of the chosen response minus the gold reward of the rejected response."""
    pairs = task.examples("preferences_test", count)
    better, worse = golds(task, pairs, lambda e: text(e.chosen)), golds(task, pairs, lambda e: text(e.rejected))
    return [a - b for a, b in zip(better, worse, strict=True)]


def test_a_label_of_temperature_0_is_the_gold_order_and_members_of_a_pair_differ():
    assert all(e.chosen != e.rejected for e in TASK.examples("preferences_test", 500))
    assert min(label_margins(ToyTask(label_temperature=0.0), 500)) > -1e-9


def test_ties_are_labelled_by_the_same_fair_coin_at_every_temperature():
    ties = [i for i, margin in enumerate(label_margins(TASK, 3_000)) if abs(margin) < 1e-9]
    assert len(ties) > 30
    cold, warm = (ToyTask(label_temperature=t).examples("preferences_test", 3_000) for t in (0.0, 1.0))
    assert [cold[i] for i in ties] == [warm[i] for i in ties]


def test_label_flips_have_the_given_rate_and_change_nothing_else():
    kept = ToyTask(label_temperature=0.0).examples("preferences_test", 3_000)
    flipped = ToyTask(label_temperature=0.0, label_flips=0.3).examples("preferences_test", 3_000)
    assert [{e.chosen, e.rejected} for e in flipped] == [{e.chosen, e.rejected} for e in kept]
    share = fmean(a.chosen != b.chosen for a, b in zip(flipped, kept, strict=True))
    ties = fmean(abs(m) < 1e-9 for m in label_margins(TASK, 3_000))
    assert share == pytest.approx(0.3 * (1 - ties), abs=0.025)  # tolerance: 3 standard errors


def test_pairs_without_any_noise_are_refused():
    silent = ToyTask(omit=0.0, stray=0.0, wrong=0.0, tire=0.0, spoiled=0.0)
    with pytest.raises(ValueError, match="no two candidates differ"):
        silent.examples("preferences", 1)


def test_pairs_contain_the_mistakes_that_a_policy_may_make(pairs):
    found = {"copy": 0, "repeated": 0, "wrong pairs": 0, "malformed": 0, "wordy": 0, "ideal": 0}
    for e in pairs:
        words, facts = text(e.prompt).split(), read_post(text(e.prompt))
        for summary in (text(e.chosen), text(e.rejected)):
            pairs_stated, right = read_summary(summary), {(f.subject, f.value) for f in facts}
            found["copy"] += summary.split() == words[: MAX_SUMMARY_TOKENS - 1]
            found["repeated"] += len(set(pairs_stated)) < len(pairs_stated)
            found["wrong pairs"] += len(pairs_stated) > 1 and not right & set(pairs_stated)
            found["malformed"] += len(summary.split()) > 2 * len(pairs_stated)
            found["wordy"] += sum(not f.matters and (f.subject, f.value) in pairs_stated for f in facts) > 2
            found["ideal"] += summary == TASK.ideal(text(e.prompt))
    assert {kind for kind, count in found.items() if count < 0.01 * 2 * len(pairs)} == set()


def test_reading_a_post_gives_its_facts():
    assert read_post(POST)[:2] == [Fact("dog", "lost", False), Fact("car", "fast", True)]


@pytest.mark.parametrize(
    "prompt", ["", "boss kind", f"boss {QUESTION}", f"boss late {QUESTION}", f"ship kind {QUESTION}"]
)
def test_a_text_that_is_not_a_post_is_refused(prompt):
    with pytest.raises(ValueError, match="not a post of the embedded task"):
        TASK.gold_reward(prompt, "boss kind")


def test_an_unknown_split_names_those_that_exist():
    with pytest.raises(ValueError, match=r"no split 'dev'.*validation"):
        TASK.examples("dev", 1)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"min_salient": 0}, "min_salient"),
        ({"min_salient": 6, "max_salient": 5}, "max_salient"),
        ({"max_salient": MAX_FACTS + 1}, "max_salient"),
        ({"num_facts": len(FACTS) + 1}, "num_facts"),
        ({"num_facts": 4}, "max_salient"),
        ({"omit": 1.5}, "omit"),
        ({"wrong": -0.1}, "wrong"),
        ({"tire": float("nan")}, "tire"),
        ({"label_temperature": -0.5}, "label_temperature"),
        ({"label_flips": 1.1}, "label_flips"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings, named):
    with pytest.raises(ValueError, match=named):
        ToyTask(**settings)


def test_every_word_has_one_meaning():
    values = [value for values in FACTS.values() for value in values]
    assert len(set(values)) == len(values)
    assert not set(values) & set(FACTS)


def test_the_tokenizer_gives_back_the_text_and_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = toy_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for t in (tokenizer, reloaded):
        assert (t.pad_token_id, t.eos_token_id, len(t)) == (0, 1, 84)
        ids = t(POST)["input_ids"]
        assert len(ids) == len(POST.split())
        assert t.decode(ids) == POST
        assert t.decode(t.encode("boss kind <eos>"), skip_special_tokens=True) == "boss kind"
    assert reloaded(POST)["input_ids"] == tokenizer(POST)["input_ids"]


def test_the_model_is_of_about_a_million_parameters():
    from transformers import AutoModelForCausalLM

    config = toy_model_config()
    config.vocab_size = len(toy_tokenizer())
    count = AutoModelForCausalLM.from_config(config).num_parameters()
    assert 5e5 < count < 2e6


def test_importing_the_task_loads_neither_transformers_nor_tokenizers():
    script = "import sys, fastrlhf.data.toy; sys.exit(bool({'transformers', 'tokenizers'} & set(sys.modules)))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=env).returncode == 0


def test_the_haste_of_the_writers_changes_only_references():
    task = ToyTask(seed=3)
    careful = replace(task, min_haste=0.0, max_haste=0.0)
    for ours, theirs in zip(task.examples("train", 50), careful.examples("train", 50), strict=True):
        assert ours.prompt == theirs.prompt
        assert theirs.reference == task.ideal(str(theirs.prompt))
    with pytest.raises(ValueError, match=r"min_haste 1\.0 and max_haste 0\.5 must be in order"):
        ToyTask(min_haste=1.0, max_haste=0.5)


def test_summaries_with_the_same_facts_mean_the_same():
    task, first = ToyTask(), "boss angry rent late"
    for second, same in (
        ("rent late boss angry", True),
        ("boss angry rent late rent late", True),
        ("boss angry rent high", False),
        ("boss angry", False),
        ("angry boss late rent", False),
    ):
        assert task.same_meaning("", first, second) == task.same_meaning("", second, first) == same
