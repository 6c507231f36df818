"""Tests that the plan counts the packs of the data that the run reads."""

from fastrlhf.tools.plan.packs import find_packs, read_rows
from tests.tools import measure


def test_steps_and_tokens_are_those_of_the_run(folder):
    config = measure.config(folder, "sft", max_steps=-1, num_train_epochs=1.0)
    rows = read_rows(config)
    assert rows.steps == 4  # 32 rows in batches of 8
    packs = find_packs(config, rows)
    # 8 sequences of 160 prompt and 60 response tokens and an EOS: 221 each
    assert (packs.tokens_per_step, packs.num_packs, packs.longest) == (1768, 2, 221)
    assert packs.largest.num_tokens == 4 * 221


def test_planned_episodes_have_full_length(folder):
    config = measure.config(folder, "ppo")
    packs = find_packs(config, read_rows(config))
    assert packs.longest == 160 + 24
    assert packs.tokens_per_step == 8 * 184


def test_a_hub_dataset_is_not_downloaded_and_row_lengths_are_assumed(folder):
    config = measure.config(folder, "dpo", dataset_name="owner/name", max_steps=-1)
    rows = read_rows(config)
    assert rows.steps is None
    assert "rows of 256 tokens are assumed" in rows.note
    assert find_packs(config, rows).longest == 256
