"""The parts of a step, counted by hand."""

import dataclasses

import pytest

from fastrlhf.tools.packs import read_rows
from fastrlhf.tools.phases import count_phases, readable
from fastrlhf.tools.plan import plan_run
from tests.tools import measure

MOMENTS = "optimiser state (float32, two per parameter)"
POLICY, SCORER = 5_261_568, 4_237_824
LORA = 4 * 16 * (4 * (256 + 256) + 3 * (256 + 704))
"""Of each of 4 layers: rank 16 times the sides of 4 square matrices and of 3 of the MLP."""


def test_parts_are_the_counts_of_the_models(folder):
    plan = plan_run(measure.config(folder, "ppo", measure.SIZES))
    assert "policy 5,261,568, critic 4,237,824, reference 5,261,568, reward model 4,237,824" in plan.facts[0]
    rollout, training = plan.phases
    assert training.parts["gradients"] == 4 * (5_261_568 + 4_237_824)
    assert training.parts["optimiser state (float32, two per parameter)"] == 8 * (5_261_568 + 4_237_824)
    # keys and values of 4 layers of 256, for 8 episodes of 160 + 24 tokens, 192 with those that are never used
    assert rollout.parts["key-value cache"] == 2 * 4 * 256 * 8 * 192 * 4


def test_bfloat16_halves_weights_and_adds_float32_copies(folder):
    plan = plan_run(measure.config(folder, "sft", measure.SIZES, dtype="bfloat16"))
    step = plan.phases[-1]
    assert step.name == "optimiser step"
    assert step.parts["gradients"] == 2 * 5_261_568
    assert step.parts["float32 copies of bfloat16 weights"] == step.parts["gradients in float32"] == 4 * 5_261_568


def test_an_adapter_is_all_that_is_trained_and_weights_are_shared(folder):
    phases, facts = count_phases(
        config := measure.config(folder, "lora", measure.SIZES), read_rows(config), is_cuda=False
    )
    assert f"of them trained: policy {LORA:,}, critic {LORA + 256:,}" in facts
    training = phases[1].parts
    assert training["gradients"] == 4 * (2 * LORA + 256)
    assert training[MOMENTS] == 8 * (2 * LORA + 256)
    assert training["weights of the policy"] == pytest.approx(4 * (POLICY + LORA), rel=1e-3)
    assert not {"weights of the reference", "weights of the reward model"} & training.keys()


def test_a_reference_of_its_own_is_counted_beside_an_adapter(folder):
    loaded = {"model_config": "", "model_name_or_path": str(folder / "tiny_policy"), "use_peft": True}
    settings = loaded | {"precompute_ref_log_probs": False}
    own = count_parts(measure.config(folder, "dpo", **settings))
    settings["ref_model_name_or_path"] = str(folder / "policy")
    assert "weights of the reference" not in own
    assert count_parts(measure.config(folder, "dpo", **settings))["weights of the reference"] >= 4 * POLICY


def test_a_model_from_scratch_is_refused_an_adapter_as_the_run_refuses_it(folder):
    with pytest.raises(ValueError, match="use_peft: must be false: a model from scratch has no weights to adapt"):
        count_parts(measure.config(folder, "sft", use_peft=True))


def test_the_models_that_are_counted_are_those_that_the_run_loads(folder):
    whole, judge = str(folder / "policy"), str(folder / "reward")
    start = {"model_config": "", "model_name_or_path": whole, "dpo_model_path": whole, "dpo_ref_model_path": whole}
    names = {"weights of the DPO model", "weights of the DPO reference", "weights of the second reward model"}
    paid = count_parts(measure.config(folder, "ppo", **start))
    assert names & paid.keys() == {"weights of the DPO model"}  # its reference is the run's own
    unpaid = measure.config(folder, "ppo", **start, reward_shaping="none", eval_reward_model_path=judge)
    parts = count_parts(unpaid)
    assert names & parts.keys() == {"weights of the second reward model"}
    assert parts["weights of the second reward model"] == parts["weights of the reward model"]


def test_a_role_that_is_an_adapter_is_not_guessed_at(folder, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^reward_model_path: must be a whole model: plan does not count a role"):
        count_parts(measure.config(folder, "ppo", reward_model_path=str(tmp_path)))


def count_parts(config) -> dict[str, int]:
    return count_phases(config, read_rows(config), is_cuda=False)[0][0].parts


def test_moments_of_8_bits_take_two_bytes_and_paged_ones_are_told_apart(folder):
    config = measure.config(folder, "sft", measure.SIZES, optim="adamw_8bit")
    parts = count_parts(config)
    # In float32: the embedding and 9 norms of 256. The head is not tied to the embedding.
    small = measure.VOCAB * 256 + 9 * 256
    assert parts[MOMENTS] == 8 * small
    assert parts["optimiser state (8 bits)"] == (POLICY - small) * (2 + 8 / 256)
    paged = measure.config(folder, "sft", optim="paged_adamw_32bit")
    phases, facts = count_phases(paged, read_rows(paged), is_cuda=True)
    assert MOMENTS not in phases[0].parts
    assert facts[-1].startswith("optimiser state: ")


def test_stochastic_rounding_keeps_no_copies_and_makes_weights_in_float32_for_an_update(folder):
    settings = {"dtype": "bfloat16", "master_weights": "stochastic_rounding"}
    config = measure.config(folder, "sft", measure.SIZES, **settings)
    step = count_phases(config, read_rows(config), is_cuda=False)[0][-1]
    assert step.parts["float32 copies of bfloat16 weights"] == 0
    largest = measure.VOCAB * 256
    assert step.parts["gradients and weights in float32, noise"] == 8 * POLICY + 6 * largest


def test_activation_checkpointing_takes_less(folder):
    plain, again = (
        plan_run(measure.config(folder, "sft", measure.SIZES, activation_checkpointing=on)).phases[0].parts
        for on in (False, True)
    )
    name = "activations, blocks of logits, temporaries"
    assert again[name] < 0.8 * plain[name]


def test_offloaded_inputs_of_layers_leave_the_device_all_but_one_and_are_told_apart(folder):
    """Of 8 layers the one at work and the one before it are there. Two packs: so are the gradients, from the start."""
    settings = {"activation_checkpointing": True, "micro_batch_tokens": 900, "device": "auto"}
    config = measure.config(folder, "sft", measure.SIZES | {"num_hidden_layers": 8}, **settings)
    kept, offloaded = (
        plan_run(dataclasses.replace(config, activation_offloading=on), memory_gib=1) for on in (False, True)
    )
    name = "activations, blocks of logits, temporaries"
    tokens = int(kept.phases[0].name.split()[4].replace(",", ""))
    assert kept.phases[0].parts[name] - offloaded.phases[0].parts[name] == 6 * tokens * 256 * 4
    assert f"inputs of layers: {readable(8 * 2**20)}, not counted below" in " ".join(offloaded.facts)
