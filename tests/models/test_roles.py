"""Tests that models that are adapters over the base of a run give the numbers of separate models, with less memory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import PPOConfig, RTOConfig, SFTConfig
from fastrlhf.data.packing import pack
from fastrlhf.models import adapters
from fastrlhf.models import roles as models_roles
from fastrlhf.models.adapters import add_adapter, frozen_copy, has_adapter, share_weights
from fastrlhf.models.forward import sequence_scores, token_logprobs, token_values
from fastrlhf.models.loading import load_policy, load_reward_model
from fastrlhf.models.roles import holds_adapter, judge_and_critic, policy_role, score_role
from fastrlhf.types import Segment
from tests import tiny

BATCH = pack([Segment(token_ids=[3, 4, 5, 6, 1], num_scored=4), Segment(token_ids=[7, 8, 1], num_scored=2)])
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    base = tiny.save_policy(place / "base")
    return {
        "base": base,
        "other": tiny.save_policy(place / "other", seed=5),
        "judge": tiny.save_adapter(place / "judge", base, 1, scores=True),
        "dpo": tiny.save_adapter(place / "dpo", base, 2, lora_r=3),
    }


def reference(path, **settings):
    """Returns a policy with an adapter, and a reference that shares the base weights of the policy."""
    policy = load_policy(path)
    add_adapter(policy, SFTConfig(**LORA | settings), path)
    return policy, frozen_copy(policy)


def storages(*models) -> dict[int, int]:
    """Returns memory address -> number of bytes of all weights and buffers of the models."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, {}) for name in tiny.ARCHITECTURES), ("llama", {"use_dora": True}), ("gpt_neox", {"use_rslora": True})],
)
def test_a_role_gives_the_numbers_of_peft_over_a_separate_base(name, kind, tmp_path):
    base = str(tmp_path / "base")
    tiny.policy(name).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    _, ours = reference(base)
    dpo = tiny.save_adapter(tmp_path / "dpo", base, 1, **kind)
    judge = tiny.save_adapter(tmp_path / "judge", base, 2, scores=True, **kind)
    with torch.no_grad():
        start = token_logprobs(ours, BATCH).logprob
        found = token_logprobs(policy_role(dpo, ours, "dpo_model_path"), BATCH).logprob
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), dpo).get_base_model()
        assert torch.equal(found, token_logprobs(theirs, BATCH).logprob)
        assert (found - start).abs().max() > 0.1
        found = sequence_scores(score_role(judge, ours, "reward_model_path", 0), BATCH)
        with torch.random.fork_rng():  # peft draws random numbers for a head before it loads the saved one
            plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
        theirs = PeftModel.from_pretrained(plain, judge).get_base_model()
        theirs.score = theirs.score.modules_to_save["default"]
        assert torch.equal(found, sequence_scores(theirs, BATCH))
        # Equal up to rounding: the merged weights, which the run also saved, sum in a different order.
        merged = load_reward_model(str(tmp_path / "judge"), pad_token_id=0, must_be_trained=True)
        torch.testing.assert_close(found, sequence_scores(merged, BATCH), rtol=1e-5, atol=1e-5)
        assert torch.equal(token_logprobs(ours, BATCH).logprob, start)  # the base is unchanged


def test_five_roles_need_the_memory_of_one_base_and_their_adapters(paths):
    policy, shared = reference(paths["base"])
    dpo = policy_role(paths["dpo"], shared, "dpo_model_path").requires_grad_(False)
    config = PPOConfig(reward_model_path=paths["judge"], **LORA)
    judge, critic = judge_and_critic(config, score_role(paths["judge"], shared, "reward_model_path", 0))
    base = storages(load_policy(paths["base"]))
    own = {place: storages(role).keys() - storages(shared).keys() for place, role in
           {"policy": policy, "dpo": dpo, "judge": judge, "critic": critic}.items()}  # fmt: skip
    assert storages(shared).keys() <= storages(policy).keys()
    assert not own["judge"] & own["critic"]
    saved = {place: load_file(f"{paths[place]}/adapter_model.safetensors") for place in ("judge", "dpo")}
    sizes = {place: sum(4 * weight.numel() for weight in weights.values()) for place, weights in saved.items()}
    adapter = sum(4 * weight.numel() for name, weight in policy.named_parameters() if ".lora_" in name)
    expected = sum(base.values()) + adapter + sizes["dpo"] + 2 * sizes["judge"]
    assert sum(storages(policy, shared, dpo, judge, critic).values()) == expected
    assert [name for name, weight in critic.named_parameters() if weight.requires_grad] == [
        name for name, _ in critic.named_parameters() if ".lora_" in name or name == "score.weight"
    ]
    assert not any(weight.requires_grad for role in (judge, dpo, shared) for weight in role.parameters())


def test_an_adapter_that_judges_may_start_a_critic_of_which_all_weights_are_trained(paths):
    _, shared = reference(paths["base"])
    role = score_role(paths["judge"], shared, "reward_model_path", 0)
    judge, critic = judge_and_critic(PPOConfig(reward_model_path=paths["judge"]), role)
    assert all(weight.requires_grad for weight in critic.parameters())
    assert not share_weights(critic, judge)
    with torch.no_grad():
        torch.testing.assert_close(sequence_scores(critic, BATCH), sequence_scores(judge, BATCH), rtol=1e-5, atol=1e-5)


def test_an_adapter_works_over_a_base_of_either_dtype(paths):
    shared = load_policy(paths["base"], dtype="bfloat16").requires_grad_(False)
    policy_role(paths["dpo"], shared, "dpo_model_path")  # no error, although trained over a float32 base


def test_policy_and_critic_over_one_base_have_the_gradients_of_two_models(paths):
    """Runs policy, critic, policy, critic, as an update does. The critic uses checkpointing with offloaded layer
    inputs."""
    policy, shared = reference(paths["base"])
    memory = {"activation_checkpointing": True, "activation_offloading": True}
    config = PPOConfig(reward_model_path=paths["judge"], **memory, **LORA)
    judge, critic = judge_and_critic(config, score_role(paths["judge"], shared, "reward_model_path", 0))
    assert "offloaded" in repr(critic.model.layers[0]._gradient_checkpointing_func)
    alone, _ = reference(paths["base"])
    for model in (policy, alone):
        for name, weight in model.named_parameters():
            if ".lora_B" in name:  # B starts at 0, so the gradient of A is 0 at first
                torch.nn.init.eye_(weight)
    apart = score_role(paths["judge"], reference(paths["base"])[1], "reward_model_path", 0)
    for _ in range(2):
        token_logprobs(policy, BATCH).logprob.square().sum().backward()
        token_values(critic, BATCH).square().sum().backward()
    for _ in range(2):
        token_logprobs(alone, BATCH).logprob.square().sum().backward()
    for _ in range(2):
        token_values(apart, BATCH).square().sum().backward()
    for ours, theirs in ((policy, alone), (critic, apart)):
        for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert weight.requires_grad == other.requires_grad
            if weight.requires_grad:
                assert weight.grad.abs().max() > 0, name
                assert torch.equal(weight.grad, other.grad), name
    assert all(weight.grad is None for weight in judge.parameters())


def run(paths, folder="", **settings):
    fields = {
        "model_name_or_path": paths["base"],
        "reward_model_path": paths["judge"],
        "dpo_model_path": paths["dpo"],
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "response_length": 6,
        "num_ppo_epochs": 2,
        "learning_rate": 1e-2,
        "reset_prob": 0.5,
        "output_dir": str(folder) if folder else "",
        "progress": False,
    }
    return train_ppo(RTOConfig(**fields | settings), tiny.examples(12), tiny.examples(4, seed=1))


def untimed(history):
    return [{name: value for name, value in row.items() if not name.startswith("timing/")} for row in history]


def whole(path: str) -> str:
    """Returns the folder of the run that trained an adapter. The folder holds the weights with the merged adapter."""
    return path.removesuffix("/adapter")


@pytest.mark.parametrize("settings", [LORA, {}], ids=["adapters", "full"])
def test_a_run_of_roles_is_bit_for_bit_the_run_of_separate_models(settings, paths, monkeypatch):
    roles = run(paths, **settings).history
    with monkeypatch.context() as patched:  # every model loads its own copy of the base
        for module in (adapters, models_roles):
            patched.setattr(module, "frozen_tensors", lambda model: {})
        separate = run(paths, **settings).history
    assert untimed(roles) == untimed(separate)
    assert roles[0]["objective/kl"] == 0
    assert roles[2]["objective/kl"] != 0


def test_a_run_of_five_roles_over_one_base_leaves_policy_and_critic_each_added_to_the_base(paths, tmp_path):
    result = run(paths, tmp_path / "run", **LORA)
    assert result.history[0]["objective/kl"] == 0
    assert result.history[2]["objective/kl"] != 0
    assert not has_adapter(result.model)
    assert not has_adapter(result.value_model)
    base = load_policy(paths["base"])
    with torch.no_grad():
        policy = token_logprobs(load_policy(str(tmp_path / "run")), BATCH).logprob
        assert torch.equal(policy, token_logprobs(result.model, BATCH).logprob)
        assert (policy - token_logprobs(base, BATCH).logprob).abs().max() > 0.01
        again = policy_role(str(tmp_path / "run" / "adapter"), base.requires_grad_(False), "dpo_model_path")
        torch.testing.assert_close(token_logprobs(again, BATCH).logprob, policy, rtol=1e-5, atol=1e-5)
        folder = tmp_path / "run" / "value_model"
        values = token_values(load_reward_model(str(folder), pad_token_id=0, must_be_trained=True), BATCH)
        assert torch.equal(values, token_values(result.value_model, BATCH))
        start = token_values(score_role(paths["judge"], base, "reward_model_path", 0), BATCH)
        assert (values - start).abs().max() > 0.01
        critic = score_role(str(folder / "adapter"), base, "reward_model_path", 0)
        torch.testing.assert_close(token_values(critic, BATCH), values, rtol=1e-5, atol=1e-5)


def test_an_adapter_over_another_base_is_refused_and_both_are_named(paths, tmp_path):
    moved = tmp_path / "moved"
    tiny.policy().save_pretrained(moved)  # the same weights in a different folder
    tiny.tokenizer().save_pretrained(moved)
    run(paths | {"base": str(moved)}, max_steps=1)
    message = (
        rf"^{{}}: '{{}}' was trained over the weights of '{paths['base']}', but the policy of this run starts from "
        rf"the weights of '{paths['other']}'; use a model_name_or_path with the same weights"
    )
    judge, dpo = (whole(paths[name]) for name in ("judge", "dpo"))
    other = paths | {"base": paths["other"]}
    with pytest.raises(ValueError, match=message.format("reward_model_path", paths["judge"])):
        run(other | {"dpo": dpo})
    with pytest.raises(ValueError, match=message.format("dpo_model_path", paths["dpo"])):
        run(other | {"judge": judge})
    with pytest.raises(ValueError, match=message.format("eval_reward_model_path", paths["judge"])):
        run(other | {"judge": judge, "dpo": dpo}, eval_reward_model_path=paths["judge"])


def test_an_adapter_over_4_bits_is_refused_over_the_same_base_in_full_and_the_key_is_named(paths, tmp_path):
    shutil.copytree(paths["dpo"], tmp_path / "dpo")
    file = tmp_path / "dpo" / "adapter_model.safetensors"
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    assert metadata["load_in_4bit"] == "false"
    save_file(load_file(file), file, metadata | {"load_in_4bit": "true"})
    shared = load_policy(paths["base"]).requires_grad_(False)
    policy_role(paths["dpo"], shared, "dpo_model_path")
    with pytest.raises(
        ValueError, match=r"^dpo_model_path: .* load_in_4bit: true, but this run has load_in_4bit: false; set"
    ):
        policy_role(str(tmp_path / "dpo"), shared, "dpo_model_path")


def test_an_adapter_of_another_program_is_matched_by_the_name_of_its_base(paths, tmp_path):
    def save(base, where):
        with torch.random.fork_rng():
            settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_dropout=0.1)
            get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(where)
        return str(where)

    shared = load_policy(paths["base"]).requires_grad_(False)
    role = policy_role(save(paths["base"], tmp_path / "same"), shared, "dpo_model_path")
    # A critic with checkpointing is in training mode, where dropout would be active.
    assert not any(isinstance(module, torch.nn.Dropout) and module.p for module in role.modules())
    with pytest.raises(ValueError, match=f"was trained over the weights of '{paths['other']}'"):
        policy_role(save(paths["other"], tmp_path / "other"), shared, "dpo_model_path")


def test_adapters_that_cannot_be_roles_are_refused(paths, tmp_path):
    shared = load_policy(paths["base"]).requires_grad_(False)

    def copied(name, place, change=None):
        """Saves a copy of an adapter with changed weights or settings."""
        weights, settings = load_file(f"{paths[name]}/adapter_model.safetensors"), tmp_path / place
        settings.mkdir()
        content = json.loads(Path(paths[name], "adapter_config.json").read_text())
        if change:
            change(weights, content)
        save_file(weights, settings / "adapter_model.safetensors")
        (settings / "adapter_config.json").write_text(json.dumps(content))
        return str(settings)

    with pytest.raises(ValueError, match=r"^dpo_model_path: '.*' is a reward model$"):
        policy_role(paths["judge"], shared, "dpo_model_path")
    with pytest.raises(ValueError, match=r"^reward_model_path: '.*' has no trained score head; train one with"):
        score_role(paths["dpo"], shared, "reward_model_path", 0)
    lacking = copied("dpo", "lacking", lambda weights, _: weights.popitem())
    with pytest.raises(ValueError, match=r"does not fit: base_model.*is in its settings but not its weights"):
        policy_role(lacking, shared, "dpo_model_path")
    extra = copied(
        "dpo", "extra", lambda weights, _: weights.update({"base_model.model.lm_head.weight": torch.ones(1)})
    )
    with pytest.raises(ValueError, match=r"base_model.model.lm_head.weight is in its weights but not a part of a LoRA"):
        policy_role(extra, shared, "dpo_model_path")
    rank = copied("dpo", "rank", lambda _, content: content.update(r=7))
    with pytest.raises(ValueError, match=r"is \[3, 32\] there and \[7, 32\] in the base"):
        policy_role(rank, shared, "dpo_model_path")
    with torch.random.fork_rng():
        get_peft_model(AutoModelForCausalLM.from_pretrained(paths["base"]), IA3Config()).save_pretrained(
            tmp_path / "ia3"
        )
    with pytest.raises(ValueError, match=r"holds an adapter of type .*IA3; only LoRA is supported"):
        policy_role(str(tmp_path / "ia3"), shared, "dpo_model_path")
    (tmp_path / "lacking" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"^dpo_model_path: the weights of '.*lacking' cannot be loaded"):
        policy_role(lacking, shared, "dpo_model_path")
    assert not holds_adapter(paths["base"])
    assert not holds_adapter(whole(paths["judge"]))
    assert holds_adapter(paths["judge"])
