"""End-to-end tests of QLoRA: training changes the adapter but not the 4-bit weights, models of a run share weights, and
saved models are not quantised.
"""

import dataclasses
import importlib.util
import json
import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.reward_model import train_reward_model
from fastrlhf.config import DPOConfig, EvalConfig, PPOConfig, RewardConfig, RTOConfig, SFTConfig
from fastrlhf.data.packing import pack
from fastrlhf.evaluation.evaluate import evaluate_models
from fastrlhf.models import four_bit
from fastrlhf.models.adapters import add_adapter, base_fingerprint, frozen_copy
from fastrlhf.models.forward import token_logprobs
from fastrlhf.models.loading import build_policy, load_policy, load_reward_model
from fastrlhf.models.roles import judge_and_critic, policy_role, score_role
from fastrlhf.tools.plan.plan import plan_run
from fastrlhf.types import Segment
from tests import resumable, tiny

BATCH = pack([Segment(token_ids=[3, 4, 5, 6, 1], num_scored=4), Segment(token_ids=[7, 8, 1], num_scored=2)])
LORA = {"use_peft": True, "load_in_4bit": True, "lora_r": 4, "progress": False}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: fastrlhf[bnb]"
)


def logprobs(model):
    with torch.no_grad():
        return token_logprobs(model, BATCH).logprob


def save_base(folder) -> str:
    """Saves a model with rows of 64, the quantisation block: bitsandbytes 0.50 reads shorter rows wrongly on a CPU."""
    config = tiny.model_config()
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 64, 16
    model = build_policy(config, vocab_size=tiny.VOCAB, eos_token_id=tiny.EOS, seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def dpo(path, **settings):
    fields = {"per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-2, **LORA}
    return train_dpo(DPOConfig(model_name_or_path=path, **fields | settings), tiny.examples(16))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Saves a base model, and trains a judge and a DPO model as adapters over its 4-bit weights."""
    place = tmp_path_factory.mktemp("runs")
    base = save_base(place / "base")
    settings = {"output_dir": str(place / "judge"), "max_steps": 3, "learning_rate": 1e-2, **LORA}
    return {
        "base": base,
        "judge": train_reward_model(RewardConfig(model_name_or_path=base, **settings), tiny.examples(16)),
        "dpo": dpo(base, output_dir=str(place / "dpo")),
    }


def adapter(result) -> str:
    return str(result.output_dir / "adapter")


def test_without_bitsandbytes_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(four_bit, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^load_in_4bit: bitsandbytes is not installed; pip install 'fastrlhf\[bnb\]'"
    ):
        dpo(save_base(tmp_path))
    with pytest.raises(ValueError, match="load_in_4bit: must be False when use_peft is false"):
        SFTConfig(load_in_4bit=True)


@needs_bitsandbytes
def test_only_the_trunk_is_quantised_and_gradients_work_after_a_pass_without(runs):
    model, full = (load_policy(runs["base"], load_in_4bit=on) for on in (True, False))
    for name, weight in full.named_parameters():
        ours = model.get_parameter(name)
        inside = ".layers." in name and weight.ndim == 2
        assert (ours.dtype == torch.uint8) == inside
        # The error of NF4 is at most half the largest gap between its 16 levels, times the largest weight of a block.
        error = (four_bit.plain_weight(ours) - weight).abs().max()
        assert 0 < error < 0.16 * weight.abs().max() if inside else error == 0
        if inside:
            assert ours.quant_state.quant_type == "nf4"
            assert ours.quant_state.nested  # the scales are quantised as well
    assert (logprobs(model) - logprobs(full)).abs().max() > 1e-3
    assert base_fingerprint(model) != base_fingerprint(full)
    add_adapter(model, SFTConfig(**LORA), runs["base"])
    reference = frozen_copy(model)
    assert torch.equal(logprobs(reference), logprobs(model))
    token_logprobs(model, BATCH).logprob.sum().backward()
    assert model.model.layers[0].mlp.up_proj.lora_B["default"].weight.grad.abs().max() > 0
    for ours, theirs in zip(
        reference.parameters(), load_policy(runs["base"], load_in_4bit=True).parameters(), strict=True
    ):
        assert torch.equal(ours.data, theirs.data)


@needs_bitsandbytes
def test_a_model_without_data_has_the_tensors_of_one_that_is_loaded(runs):
    real = load_policy(runs["base"], load_in_4bit=True)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(real.config)
        four_bit.quantize_without_data(empty, torch.float32)
    assert four_bit.is_four_bit(empty)
    for name, weight in real.named_parameters():
        pairs = [(weight, empty.get_parameter(name))]
        pairs += zip(four_bit.state_tensors(weight), four_bit.state_tensors(pairs[0][1]), strict=True)
        assert len(pairs) == (6 if weight.dtype == torch.uint8 else 1)
        assert [(x.shape, x.dtype) for x, _ in pairs] == [(x.shape, x.dtype) for _, x in pairs]


@needs_bitsandbytes
def test_adapter_off_is_the_precomputed_reference_and_training_moves(runs):
    live = dpo(runs["base"], precompute_ref_log_probs=False).history
    for row, other in zip(live, runs["dpo"].history, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert live[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert live[-1]["rewards/margins"] > 0.05


@needs_bitsandbytes
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_the_saved_model_is_plain_and_gives_the_numbers_of_the_4_bit_run(kind, runs, tmp_path):
    result = dpo(runs["base"], output_dir=str(tmp_path / "run"), **kind)
    left = load_policy(str(tmp_path / "run"))
    assert not hasattr(left.config, "quantization_config")
    assert {weight.dtype for weight in left.parameters()} == {torch.float32}
    assert torch.equal(logprobs(left), logprobs(result.model))
    base = load_policy(runs["base"], load_in_4bit=True)
    start = logprobs(base)
    adapted = PeftModel.from_pretrained(base, adapter(result)).get_base_model()
    four_bit.keep_layout(adapted)
    torch.testing.assert_close(logprobs(left), logprobs(adapted), rtol=1e-5, atol=1e-5)
    assert (logprobs(left) - start).abs().max() > 0.01


@needs_bitsandbytes
def test_five_roles_share_the_4_bits_and_train(runs, tmp_path):
    base = load_policy(runs["base"], load_in_4bit=True)
    add_adapter(base, SFTConfig(**LORA), runs["base"])
    reference = frozen_copy(base)
    scorer = score_role(adapter(runs["judge"]), reference, "reward_model_path", 0)
    config = PPOConfig(reward_model_path="judge", **LORA)
    roles = [*judge_and_critic(config, scorer), policy_role(adapter(runs["dpo"]), reference, "dpo_model_path")]
    quantised = {weight.data_ptr() for weight in reference.parameters() if weight.dtype == torch.uint8}
    assert len(quantised) == 14
    for role in (base, *roles):
        assert {weight.data_ptr() for weight in role.parameters() if weight.dtype == torch.uint8} == quantised

    fields = {"per_device_train_batch_size": 8, "response_length": 6, "learning_rate": 1e-2, "max_steps": 2}
    paths = {"reward_model_path": adapter(runs["judge"]), "dpo_model_path": adapter(runs["dpo"])}
    folder = {"output_dir": str(tmp_path / "run")}
    config = RTOConfig(model_name_or_path=runs["base"], **fields, **paths, **LORA, **folder)
    result = train_ppo(config, tiny.examples(12))
    assert result.history[0]["objective/kl"] == 0
    assert result.history[0]["val/ratio"] != 0
    assert result.history[1]["objective/kl"] != 0
    critic = load_reward_model(str(tmp_path / "run" / "value_model"), pad_token_id=0, must_be_trained=True)
    for name, weight in result.value_model.named_parameters():
        assert torch.equal(weight, critic.get_parameter(name)), name
    with pytest.raises(
        ValueError, match=r"^dpo_model_path: .* with load_in_4bit: true, but this run has load_in_4bit: false;"
    ):
        policy_role(adapter(runs["dpo"]), load_policy(runs["base"]).requires_grad_(False), "dpo_model_path")


@needs_bitsandbytes
def test_eval_uses_an_adapter_over_the_4_bit_weights_of_its_training(runs):
    settings = {"response_length": 6, "max_length": 32}
    over, left = (
        EvalConfig(models=(one,), reward_model_path=other, **settings)
        for one, other in (
            (adapter(runs["dpo"]), adapter(runs["judge"])),
            (str(runs["dpo"].output_dir), str(runs["judge"].output_dir)),
        )
    )
    [ours], [theirs] = (evaluate_models(config, tiny.examples(12)).values() for config in (over, left))
    assert ours.win_rate == theirs.win_rate
    assert ours.mean_difference == pytest.approx(theirs.mean_difference, rel=1e-5)


@needs_bitsandbytes
def test_a_killed_run_continues_with_the_same_bits(tmp_path, monkeypatch):
    watch, paths = resumable.Watch("lora", monkeypatch), {"policy": save_base(tmp_path / "policy"), "judge": ""}
    whole = resumable.run("lora", paths, tmp_path / "whole", load_in_4bit=True)
    watch.kill = (4, "before")
    with pytest.raises(resumable.Killed):
        resumable.run("lora", paths, tmp_path / "cut", load_in_4bit=True)
    watch.kill = None
    again = resumable.run("lora", paths, tmp_path / "cut", load_in_4bit=True)
    assert resumable.untimed_log(tmp_path / "cut", again) == resumable.untimed_log(tmp_path / "whole", whole)


@needs_bitsandbytes
def test_a_base_stored_in_4_bits_can_only_be_trained_with_an_adapter(runs, tmp_path):
    """Training an adapter over a base stored in 4 bits gives the losses of a base that the run itself quantises.
    Training without an adapter is refused before the first step.
    """
    made = load_policy(runs["base"], load_in_4bit=True)
    made.save_pretrained(tmp_path / "stored")
    tiny.tokenizer().save_pretrained(tmp_path / "stored")
    stored = load_policy(str(tmp_path / "stored"))
    assert four_bit.is_four_bit(stored)
    assert torch.equal(logprobs(stored), logprobs(made))
    place = str(tmp_path / "run")
    result = dpo(str(tmp_path / "stored"), load_in_4bit=False, output_dir=place)
    ours = dpo(runs["base"])
    saved = AutoModelForCausalLM.from_pretrained(place)
    assert torch.equal(saved.lm_head.weight, result.model.lm_head.weight)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(saved(ids).logits, result.model(ids).logits)
    config = DPOConfig(model_name_or_path=str(tmp_path / "stored"), dataset_name="a/b", max_steps=1, **LORA)
    plan = plan_run(dataclasses.replace(config, load_in_4bit=False))
    quantised = plan_run(dataclasses.replace(config, model_name_or_path=runs["base"]))
    assert plan.phases[0].parts == quantised.phases[0].parts
    with pytest.raises(
        ValueError, match=r"^use_peft: must be true for .*stored', whose weights are in 4 bits; only an"
    ):
        plan_run(dataclasses.replace(config, use_peft=False, load_in_4bit=False, lora_r=16))
    assert [row["loss"] for row in result.history] == [row["loss"] for row in ours.history]
    assert not four_bit.is_four_bit(result.model)
    with pytest.raises(
        ValueError, match=r"^use_peft: must be true for .*stored', whose weights are in 4 bits; only an"
    ):
        dpo(str(tmp_path / "stored"), use_peft=False, load_in_4bit=False, lora_r=16)


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "gptq, and such weights cannot be trained; give the model that it was ma",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits by bitsandbytes, and such weights cannot"),
        (
            {"quant_method": "mxfp4"},
            r"mxfp4, .*; save a plain copy once, by AutoModelForCausalLM\.from_pretrained\('.*base', "
            r"quantization_config=Mxfp4Config\(dequantize=True\)\)\.save_pretrained\(FOLDER\), and give FOLDER$",
        ),
        ({"quant_method": "fp8"}, r"fp8, .*FineGrainedFP8Config\(dequantize=True\)"),
    ],
)
def test_other_stored_forms_are_refused_before_weights_are_read(stored, told, tmp_path):
    path = save_base(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    with pytest.raises(ValueError, match=rf"^model_name_or_path: '.*base' is stored in {told}"):
        load_policy(path)
