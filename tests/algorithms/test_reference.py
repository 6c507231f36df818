"""Tests that precomputed, cached and live references give equal numbers, and that no other run's cache is used."""

import logging
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM

from fastrlhf.algorithms import reference
from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.config import DPOConfig
from tests import tiny


def config(model, **settings):
    fields = {"per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-3, "progress": False}
    return DPOConfig(model_name_or_path=model, micro_batch_tokens=60, **fields | settings)


def run(cfg, count=12):
    return train_dpo(cfg, tiny.examples(count), tiny.examples(6, seed=1)).history


@pytest.mark.parametrize("own", [False, True], ids=["the start", "a reference of its own"])
def test_live_precomputed_and_cached_references_give_the_same_run(model, other, tmp_path, own):
    cfg = config(model, ref_model_name_or_path=other if own else "")
    expected = run(cfg)
    live = run(replace(cfg, precompute_ref_log_probs=False))
    for row, other_row in zip(live, expected, strict=True):
        assert row == pytest.approx(other_row, rel=1e-4, abs=1e-5)  # different packs, so rounding differs
    cached = replace(cfg, ref_cache_dir=str(tmp_path / "cache"))
    assert run(cached) == expected
    assert run(cached) == expected
    [entry] = (tmp_path / "cache").iterdir()
    assert [chunk.name for chunk in entry.iterdir()] == ["all"]


def test_a_reference_that_is_cached_is_not_loaded(model, other, tmp_path, monkeypatch, caplog):
    cfg = config(model, ref_model_name_or_path=other, ref_cache_dir=str(tmp_path))
    expected = run(cfg)

    def refuse(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(reference, "load_policy", refuse)
    with caplog.at_level(logging.INFO):
        assert run(cfg) == expected
    assert "log-probs of 36 responses read from" in caplog.text


@pytest.mark.parametrize("change", ["weights", "own weights", "data", "sharing", "dtype"])
def test_what_changes_the_numbers_changes_the_fingerprint(model, other, tmp_path, change):
    folder = tmp_path / "cache"
    cfg = config(model, ref_model_name_or_path="" if change == "own weights" else other, ref_cache_dir=str(folder))
    run(replace(cfg, max_steps=1))
    match change:
        case "weights":
            copy = tmp_path / "copy"
            changed = AutoModelForCausalLM.from_pretrained(other)
            changed.lm_head.weight.data[3, 3] += 1e-3
            changed.save_pretrained(copy)
            run(replace(cfg, ref_model_name_or_path=str(copy), max_steps=1))
        case "own weights":
            run(replace(cfg, model_name_or_path=other, max_steps=1))
        case "data":
            run(replace(cfg, max_steps=1), count=11)
        case "sharing":
            run(replace(cfg, share_prompts=False, max_steps=1))
        case _:
            run(replace(cfg, dtype="bfloat16", max_steps=1))
    assert len(list(folder.iterdir())) == 2


def test_another_configuration_of_the_same_weights_is_another_reference(model, tmp_path):
    copy = tmp_path / "copy"
    same = AutoModelForCausalLM.from_pretrained(model)
    same.config.rope_parameters["rope_theta"] = 500.0
    same.save_pretrained(copy)
    tiny.tokenizer().save_pretrained(copy)
    for path in (model, str(copy)):
        run(config(path, ref_cache_dir=str(tmp_path / "cache"), max_steps=1))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_adapter_that_is_yet_to_be_trained_has_the_reference_of_its_base(model, tmp_path):
    lora = {"use_peft": True, "lora_r": 4}
    for settings in ({}, lora, lora | {"seed": 7}):
        run(config(model, ref_cache_dir=str(tmp_path), max_steps=1, **settings))
    assert len(list(tmp_path.iterdir())) == 1


def test_unused_rows_are_only_computed_for_a_cache(model, tmp_path, monkeypatch):
    compute, sizes = reference._compute, []
    monkeypatch.setattr(reference, "_compute", lambda *given: sizes.append(len(given[2])) or compute(*given))
    run(config(model, max_steps=1), count=30)
    run(config(model, max_steps=1, ref_cache_dir=str(tmp_path)), count=30)
    assert sizes == [8 + 6, 30 + 6]


def test_a_cache_folder_that_cannot_be_made_is_named(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"ref_cache_dir: .*file/cache' cannot be made: '.*file' is a file$"):
        run(config(model, ref_cache_dir=str(tmp_path / "file" / "cache")))
