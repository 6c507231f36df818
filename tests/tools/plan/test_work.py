"""Tests that the tools (plan, inspect) open the data on which the trainers train."""

import json
import re

import pytest
import transformers

from fastrlhf.algorithms.prefixes import draw_prefixes
from fastrlhf.config import DPOConfig, DRPOConfig, RewardConfig, SFTConfig
from fastrlhf.runtime.optim import index_batches
from fastrlhf.tools.plan.work import first_prefixes, open_work, to_tree
from tests import tiny


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("work")
    tiny.tokenizer().save_pretrained(folder)
    rows = [
        {"prompt": e.prompt, "completion": e.reference, "chosen": e.chosen, "rejected": e.rejected}
        for e in tiny.examples(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "tokenizer_name_or_path": str(folder),
        "dataset_name": str(folder / "rows.jsonl"),
        "columns": "reference=completion",
        "per_device_train_batch_size": 4,
        "max_length": 32,
        "seed": 5,
    }


def test_batches_are_those_that_training_draws(settings):
    work = open_work(SFTConfig(**settings, num_train_epochs=1), most_batches=2)
    assert work.steps == 3
    assert work.batches == list(index_batches(12, 4, 3, 5))[:2]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", [RewardConfig, DPOConfig])
def test_a_pair_is_the_tree_of_its_trainer(settings, kind, share):
    config = kind(**settings, share_prompts=share)
    example = open_work(config).examples[0]
    tree = to_tree(config)(example)
    assert [list(s.token_ids) for s in tree][-1] == ([] if share else example.prompt) + example.rejected
    assert sum(s.num_scored for s in tree) == (len(example.chosen + example.rejected) if kind is DPOConfig else 0)


def test_episodes_start_where_the_updates_of_the_run_start_them(settings):
    config = DRPOConfig(**settings, response_length=12, max_steps=3, reset_curriculum=0.5)
    work = open_work(config, most_batches=2)
    second = draw_prefixes(config, [work.examples[i] for i in work.batches[1]], 4, progress=1 / 3)
    assert first_prefixes(config, work)[4:] == second
    assert any(prefix.num_reset for prefix in second)


def test_without_sampled_references_episodes_are_shown_from_their_prompts(settings):
    config = DRPOConfig(**settings, response_length=12, max_steps=3, reset_source="sample", reset_curriculum=0.5)
    work = open_work(config)
    prefixes = first_prefixes(config, work)
    assert [prefix.token_ids for prefix in prefixes] == [work.examples[i].prompt for i in work.batches[0]]
    assert not any(prefix.num_reset for prefix in prefixes)


def test_a_model_that_the_run_refuses_is_refused(settings, tmp_path):
    transformers.T5Config(d_model=16, num_layers=1).save_pretrained(tmp_path / "t5")
    what = f"model_name_or_path: '{tmp_path / 't5'}' is an encoder-decoder model (t5); give a causal language model"
    with pytest.raises(ValueError, match=rf"^{re.escape(what)}"):
        open_work(SFTConfig(**settings, model_name_or_path=str(tmp_path / "t5")))
    assert open_work(SFTConfig(**settings, model_name_or_path=str(tmp_path / "not_trained_yet"))).examples


def test_a_folder_that_holds_a_run_is_accepted(settings, tmp_path):
    (tmp_path / "config.yaml").write_text("")
    assert open_work(SFTConfig(**settings, output_dir=str(tmp_path))).examples
