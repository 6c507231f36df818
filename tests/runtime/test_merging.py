"""Tests that a run with an adapter saves weights that include the trained adapter."""

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import SFTConfig
from fastrlhf.data.examples import Origin
from fastrlhf.models.adapters import add_adapter, has_adapter, merged_copy, plain_weights
from fastrlhf.models.loading import load_policy
from fastrlhf.publish.card import MARK
from fastrlhf.runtime import merging
from fastrlhf.runtime.inputs import Data
from fastrlhf.runtime.merging import Acceptance, card_of, save_trained, shift, write_card
from fastrlhf.types import TokenizedExample
from tests import tiny

ROWS = [TokenizedExample(prompt=[5, 6, 7], reference=[8, 9, 1], row=0), TokenizedExample(prompt=[4, 9], row=1)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


def trained(base, scale, **settings):
    """Makes a bfloat16 policy with an adapter that changes every weight, mostly by less than the spacing of
    bfloat16."""
    model = load_policy(base, dtype="bfloat16")
    add_adapter(model, SFTConfig(use_peft=True, lora_r=2, **settings), base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return model


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_bfloat16_would_lose_most_of_a_small_update_and_the_saved_weights_lose_none(base, settings, tmp_path):
    model = trained(base, 1e-5, **settings)
    before = {name: weight.float() for name, weight in load_policy(base, dtype="bfloat16").named_parameters()}
    exact = {name: weight.double() for name, weight in plain_weights(model, torch.float32)}
    layer = "model.layers.0.mlp.up_proj"
    own = model.get_submodule(layer)
    a, b = own.lora_A["default"].weight.double(), own.lora_B["default"].weight.double()
    update = 16 * b @ a  # lora_alpha / lora_r
    if not settings:
        torch.testing.assert_close(
            exact[f"{layer}.weight"], before[f"{layer}.weight"].double() + update, rtol=1e-7, atol=0
        )
    assert update.abs().min() > 0
    rounded = merged_copy(model).state_dict()[f"{layer}.weight"]
    assert rounded.dtype == torch.bfloat16
    unmoved = (rounded.float() == before[f"{layer}.weight"]).float().mean()
    assert unmoved > 0.5
    returned = save_trained(model, tiny.tokenizer(), tmp_path / "run")
    saved = load_file(tmp_path / "run" / "model.safetensors")
    for name, weight in exact.items():
        assert torch.equal(saved[name].double(), weight), name
    assert not has_adapter(returned)
    assert (returned.dtype, returned.device.type) == (torch.float32, "cpu")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == "float32"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert has_adapter(model)  # the model still has its adapter
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), returned.parameters(), strict=True))


def test_the_shift_is_the_mean_distance_of_log_probs_of_responses_and_of_prompts_without_any():
    one, other = tiny.policy(), tiny.policy(seed=1)

    def logprobs(model, ids, first):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return [logits[i - 1, ids[i]].item() for i in range(first, len(ids))]

    ids = [([5, 6, 7, 8, 9, 1], 3), ([4, 9], 1)]
    distances = [abs(a - b) for x in ids for a, b in zip(logprobs(one, *x), logprobs(other, *x), strict=True)]
    assert shift(one, other, ROWS) == pytest.approx(sum(distances) / 4, rel=1e-5)
    assert shift(one, one, ROWS) == 0


def test_for_reward_models_the_scores_are_compared(tmp_path):
    from fastrlhf.models.loading import load_reward_model

    one, other = (load_reward_model(tiny.save_reward_model(tmp_path / str(i), seed=i), pad_token_id=0) for i in (1, 2))

    def score(model):
        with torch.no_grad():
            return model(torch.tensor([[5, 6, 7, 8, 9, 1]])).logits[0, 0].item()

    assert shift(one, other, ROWS[:1]) == pytest.approx(abs(score(one) - score(other)), rel=1e-5)


def run(base, folder: Path, rate: float, **settings):
    config = SFTConfig(
        model_name_or_path=base,
        output_dir=str(folder),
        dtype="bfloat16",
        use_peft=True,
        lora_r=2,
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=rate,
        progress=False,
        **settings,
    )
    return train_sft(config, tiny.examples(8), tiny.examples(4, seed=1))


@pytest.mark.parametrize(("most", "dtype"), [(1e-6, "float32"), (1e9, "bfloat16")])
def test_bfloat16_is_used_and_reported_if_the_shift_is_accepted(base, most, dtype, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="fastrlhf"):
        result = run(base, tmp_path / "run", 1e-2, merged_dtype="bfloat16", max_merge_shift=most)
    assert result.model.dtype == getattr(torch, dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "run" / "model.safetensors").values()} == {
        result.model.dtype
    }
    told = f"the adapter is merged in {dtype}: bfloat16 shifts 4 rows by "
    line = (tmp_path / "run" / "config.yaml").read_text().splitlines()[-1]
    assert line.startswith(f"# {told}")
    assert line.endswith(f"nats per token (max_merge_shift {most:g})")
    assert f"merged_dtype: {told}" in caplog.text
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["max_merge_shift"] == most


def test_the_measured_shift_compares_trained_and_saved_weights(base):
    model = trained(base, 1e-2)
    acceptance = Acceptance(ROWS, 0.5)
    merged = merged_copy(model, torch.bfloat16)
    moved = shift(model, merged, ROWS)
    assert acceptance(model, merged) == (moved <= 0.5)
    assert moved > 0
    assert f"by {moved:.2g} nats per token (max_merge_shift 0.5)" in acceptance.told


def test_where_saving_fails_the_adapter_is_still_there(tmp_path, monkeypatch):
    """Saving the merged model fails. The model must keep its adapter, so that the run can still save a checkpoint of
    the adapter."""
    model = tiny.policy()
    add_adapter(model, SFTConfig(use_peft=True, lora_r=2), "base")
    monkeypatch.setattr(merging, "save_weights", lambda *_: (_ for _ in ()).throw(OSError("no luck")))
    with pytest.raises(OSError, match="no luck"):
        save_trained(model, tiny.tokenizer(), tmp_path / "run")
    assert has_adapter(model)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_a_readme_that_fastrlhf_did_not_write_stays(tmp_path, caplog):
    write_card(tmp_path, f"{MARK}\nfirst")
    write_card(tmp_path, f"{MARK}\nsecond")
    assert (tmp_path / "README.md").read_text() == f"{MARK}\nsecond"
    (tmp_path / "README.md").write_text("my notes")
    write_card(tmp_path, f"{MARK}\nthird")
    assert (tmp_path / "README.md").read_text() == "my notes"
    assert (tmp_path / "MODEL_CARD.md").read_text() == f"{MARK}\nthird"
    assert "README.md was not written by fastrlhf and stays; the card of the model is MODEL_CARD.md" in caplog.text


def test_each_model_of_a_run_gets_its_card_and_the_adapter_its_own(base, tmp_path):
    config = SFTConfig(use_peft=True, model_name_or_path=base, dataset_name="rows.jsonl")
    data = Data(train=[], eval=[], report=None, origin=Origin(sources=("rows.jsonl",)))
    card = card_of(config, data, {"eval_loss": 1.5}, {"loss": 2.0}, steps=5, best_step=3)
    assert (card.datasets, card.num_train, card.num_eval, card.final) == (("rows.jsonl",), 0, 0, {"eval_loss": 1.5})
    assert (card.last, card.steps, card.best_step) == ({"loss": 2.0}, 5, 3)
    save_trained(trained(base, 1e-3), tiny.tokenizer(), tmp_path / "run", card=card)
    assert (tmp_path / "run" / "README.md").read_text() == card.text()
    assert (tmp_path / "run" / "adapter" / "README.md").read_text() == card.adapter_text()
    assert card_of(config, None, {}, {}, steps=5) is None
