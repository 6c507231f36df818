"""Tests of the planned memory in each phase of a step, with values computed by hand."""

import dataclasses
import json

import pytest

from bench.models.configs import tiny_config
from fastrlhf.config import GRPOConfig
from fastrlhf.models.loading import build_policy
from fastrlhf.tools.plan.packs import read_rows
from fastrlhf.tools.plan.phases import count_phases, readable, sampling_facts
from fastrlhf.tools.plan.plan import plan_run
from tests.tools import measure

ACTIVATIONS = "activations, blocks of logits, temporaries"
MOMENTS = "optimiser state (float32, two per parameter)"
POLICY, SCORER = 5_261_568, 4_237_824
LORA = 4 * 16 * (4 * (256 + 256) + 3 * (256 + 704))
"""Number of adapter weights of 4 layers: per layer, rank 16 times the summed sides of 4 square and 3 MLP matrices."""


def test_parts_are_the_counts_of_the_models(folder):
    plan = plan_run(measure.config(folder, "ppo", measure.SIZES))
    assert "policy 5,261,568, critic 4,237,824, reference 5,261,568, reward model 4,237,824" in plan.facts[0]
    rollout, training = plan.phases
    assert training.parts["gradients"] == 4 * (5_261_568 + 4_237_824)
    assert training.parts["optimiser state (float32, two per parameter)"] == 8 * (5_261_568 + 4_237_824)
    # Keys and values (2), 4 layers of width 256, 8 episodes of 160 + 24 tokens, rounded up to 192, 4 bytes each
    assert rollout.parts["key-value cache"] == 2 * 4 * 256 * 8 * 192 * 4


GROUPS = {"advantage_estimator": "grpo", "num_generations": 4, "reward_model_path": ""}


def test_grpo_has_neither_a_critic_nor_a_reward_model_and_its_records_are_stated(folder):
    settings = GROUPS | {"reward_functions": ["exact_match"], "top_k": 50, "dynamic_sampling_factor": 2.5}
    plan = plan_run(measure.config(folder, "ppo", **settings))
    policy = 2 * measure.VOCAB * 64 + 4 * 64 * 64 + 3 * 64 * 192 + 3 * 64
    assert plan.facts[0] == f"parameters: policy {policy:,}, reference {policy:,}"
    _, training = plan.phases
    assert training.parts["gradients"] == 4 * policy
    assert training.parts[MOMENTS] == 8 * policy
    weights = {name: size for name, size in training.parts.items() if name.startswith("weights")}
    assert list(weights) == ["weights of the policy", "weights of the reference"]
    assert plan.facts[-2:] == sampling_facts(measure.config(folder, "ppo", **settings), measure.VOCAB)


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({}, []),
        # 2 groups of 4, and a budget of int(2.5 * 2) = 5 groups.
        (
            {"dynamic_sampling_factor": 2.5},
            ["sampled per update: 8 responses, and at most 12 more in place of groups with equal outcomes"],
        ),
        # 8 responses of 512 tokens, with 64 ids of 4 bytes for each token: 1 MiB.
        (
            {"top_k": 64, "top_p": 0.9},
            [
                "records of the tokens that could be drawn: at most 1 MiB of CPU memory, not counted below (64 for "
                "each of 4,096 sampled tokens)"
            ],
        ),
        (
            {"min_p": 0.1},
            [
                "records of the tokens that could be drawn: at most 512 MiB of CPU memory, not counted below (32,768 "
                "for each of 4,096 sampled tokens)"
            ],
        ),
    ],
)
def test_what_grpo_samples_and_records_by_hand(settings, facts):
    sizes = {"per_device_train_batch_size": 8, "num_generations": 4, "response_length": 512, "max_length": 1024}
    assert sampling_facts(GRPOConfig(**sizes, **settings), 32_768) == facts


def test_bfloat16_halves_weights_and_adds_float32_copies(folder):
    plan = plan_run(measure.config(folder, "sft", measure.SIZES, dtype="bfloat16"))
    step = plan.phases[-1]
    assert step.name == "optimiser step"
    assert step.parts["gradients"] == 2 * 5_261_568
    assert step.parts["float32 copies of bfloat16 weights"] == step.parts["gradients in float32"] == 4 * 5_261_568


def test_an_adapter_is_all_that_is_trained_and_weights_are_shared(folder):
    config = measure.config(folder, "lora", measure.SIZES)
    count = count_phases(config, read_rows(config), is_cuda=False)
    phases, facts = count.phases, count.facts
    assert f"of them trained: policy {LORA:,}, critic {LORA + 256:,}" in facts
    training = phases[1].parts
    assert training["gradients"] == 4 * (2 * LORA + 256)
    assert training[MOMENTS] == 8 * (2 * LORA + 256)
    assert training["weights of the policy"] == pytest.approx(4 * (POLICY + LORA), rel=1e-3)
    assert not {"weights of the reference", "weights of the reward model"} & training.keys()


def count_parts(config) -> dict[str, int]:
    return count_phases(config, read_rows(config), is_cuda=False).phases[0].parts


def test_8_bit_moments_take_two_bytes_and_paged_moments_are_listed_separately(folder):
    config = measure.config(folder, "sft", measure.SIZES, optim="adamw_8bit")
    parts = count_parts(config)
    # The embedding and 9 norms of 256 have float32 moments. The head is not tied to the embedding.
    small = measure.VOCAB * 256 + 9 * 256
    assert parts[MOMENTS] == 8 * small
    assert parts["optimiser state (8 bits)"] == (POLICY - small) * (2 + 8 / 256)
    paged = measure.config(folder, "sft", optim="paged_adamw_32bit")
    count = count_phases(paged, read_rows(paged), is_cuda=True)
    assert MOMENTS not in count.phases[0].parts
    assert count.facts[-1].startswith("optimiser state: ")


def test_stochastic_rounding_keeps_no_copies_and_makes_weights_in_float32_for_an_update(folder):
    settings = {"dtype": "bfloat16", "master_weights": "stochastic_rounding"}
    config = measure.config(folder, "sft", measure.SIZES, **settings)
    step = count_phases(config, read_rows(config), is_cuda=False).phases[-1]
    assert step.parts["float32 copies of bfloat16 weights"] == 0
    largest = measure.VOCAB * 256
    assert step.parts["gradients and weights in float32, noise"] == 8 * POLICY + 6 * largest


def test_activation_checkpointing_takes_less(folder):
    plain, again = (
        plan_run(measure.config(folder, "sft", measure.SIZES, activation_checkpointing=on)).phases[0].parts
        for on in (False, True)
    )
    assert again[ACTIVATIONS] < 0.8 * plain[ACTIVATIONS]


REFERENCE, JUDGE, DPO = (f"weights of the {name}" for name in ("reference", "reward model", "DPO model"))


def offloaded(folder, **changes):
    """Returns the phases with offloaded frozen models, and the phases with these models kept on the device."""
    start = {"model_config": "", "model_name_or_path": str(folder / "policy"), "dpo_model_path": str(folder / "policy")}
    config = measure.config(folder, "ppo", measure.SIZES, **start | changes)
    waits = dataclasses.replace(config, ref_reward_offload=True)
    counts = [count_phases(each, read_rows(each), is_cuda=True) for each in (waits, config)]
    return ((count.phases, count.facts) for count in counts)


def test_offloaded_models_are_on_the_gpu_only_while_they_score(folder):
    (phases, facts), (stayed, _) = offloaded(folder)
    assert [phase.name.split()[0] for phase in phases] == ["rollout", "scoring", "forward"]
    rollout, scoring, training = (phase.parts for phase in phases)
    frozen = {REFERENCE: 4 * POLICY, JUDGE: 4 * SCORER, DPO: 4 * POLICY}
    for before, after in zip((phase.parts for phase in stayed), (rollout, training), strict=True):
        assert before.keys() - after.keys() == frozen.keys()
        assert all(after[name] == before[name] for name in after)
        # The tolerance covers the buffers of the models
        assert {name: before[name] for name in frozen} == pytest.approx(frozen, rel=1e-3)
    kept = {name: size for name, size in scoring.items() if name != "activations of a forward without gradient"}
    assert kept.keys() == training.keys() - {"gradients", ACTIVATIONS} | frozen.keys()
    assert 0 < scoring["activations of a forward without gradient"] < training[ACTIVATIONS] / 2
    assert facts[-1] == "in CPU memory except while they are used: 56 MiB of frozen weights"


def test_a_reference_that_samples_responses_is_on_the_gpu_meanwhile(folder):
    (phases, _), _ = offloaded(folder, reset_prob=0.5, reset_source="sample")
    own, rollout = phases[:2]
    assert own.name.startswith("sampling by the reference of 8 episodes")
    assert own.total - rollout.total == sum(own.parts[name] for name in (REFERENCE, JUDGE, DPO))


def test_offloading_on_a_cpu_or_of_shared_weights_saves_nothing(folder):
    config = measure.config(folder, "ppo")
    assert plan_run(dataclasses.replace(config, ref_reward_offload=True)).phases == plan_run(config).phases
    (phases, _), (stayed, _) = offloaded(folder, use_peft=True, dpo_model_path="")
    assert phases == stayed


def test_only_one_layer_input_stays_on_the_device_with_offloading(folder):
    """Of the inputs of 8 layers, only those of the current and the previous layer are on the device. If there are two
    packs, gradients exist from the start.
    """
    settings = {"activation_checkpointing": True, "micro_batch_tokens": 900, "device": "auto"}
    config = measure.config(folder, "sft", measure.SIZES | {"num_hidden_layers": 8}, **settings)
    kept, offloaded = (
        plan_run(dataclasses.replace(config, activation_offloading=on), memory_gib=1) for on in (False, True)
    )
    name = "activations, blocks of logits, temporaries"
    tokens = int(kept.phases[0].name.split()[4].replace(",", ""))
    assert kept.phases[0].parts[name] - offloaded.phases[0].parts[name] == 6 * tokens * 256 * 4
    assert f"inputs of layers: {readable(8 * 2**20)}, not counted below" in " ".join(offloaded.facts)


def test_vllm_takes_its_share_of_the_device_in_every_phase_or_with_sleep_only_while_it_samples(folder):
    """The device has 4 GiB. If vLLM runs on other GPUs, it takes no memory on this GPU."""
    config = measure.config(folder, "ppo", measure.SIZES)
    built_in = plan_run(config, memory_gib=4)
    share = {"vLLM: weights and key-value cache": 2**30}
    vllm = dataclasses.replace(config, engine="vllm", vllm_gpu_memory_utilization=0.25)
    rollout, sampling, training = plan_run(vllm, memory_gib=4).phases
    assert [rollout.parts, training.parts] == [phase.parts | share for phase in built_in.phases]
    assert sampling.name == "sampling by vLLM"
    kept = {name: size for name, size in built_in.phases[0].parts.items() if name in built_in.phases[1].parts}
    assert sampling.parts == kept | share
    asleep = plan_run(dataclasses.replace(vllm, vllm_enable_sleep_mode=True), memory_gib=4)
    assert [asleep.phases[0].parts, asleep.phases[2].parts] == [phase.parts for phase in built_in.phases]
    assert asleep.phases[1].parts == sampling.parts
    apart = plan_run(dataclasses.replace(vllm, vllm_gpu_memory_utilization=0.3, vllm_devices=(1,)), memory_gib=4)
    assert [phase.parts for phase in apart.phases] == [phase.parts for phase in built_in.phases]


def test_a_model_that_runs_one_sequence_at_a_time_is_planned_so(folder, caplog):
    """The plan gives the reason in the words of the run's log, and counts a shared prompt once per response."""
    fields = tiny_config("lfm2").to_dict()
    keys = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "layer_types", "conv_L_cache")
    model = {key: fields[key] for key in keys} | {"num_attention_heads": 4, "num_key_value_heads": 2}
    for sizes, tokens in ((measure.SMALL, 160 + 61 + 81), (model, 160 + 61 + 160 + 81)):
        text = json.dumps({"model_type": "llama", **sizes})
        plan = plan_run(dataclasses.replace(measure.config(folder, "dpo"), max_steps=1, model_config=text))
        assert f"one pass over a batch: {8 * tokens:,} tokens" in "; ".join(plan.facts)
    build_policy(model, vocab_size=measure.VOCAB, eos_token_id=1, seed=0)
    (said,) = [message for message in caplog.messages if "one by one" in message]
    assert said == f"Lfm2ForCausalLM: {plan.facts[-1]}"


def test_if_it_is_not_known_whether_sequences_share_a_pass_the_plan_says_so(folder, monkeypatch):
    monkeypatch.setattr("fastrlhf.tools.plan.phases.foresee_alone", lambda *_: None)
    facts = plan_run(measure.config(folder, "sft", measure.SIZES)).facts
    assert facts[-1] == "whether the sequences of a pack can share a pass is measured at the start of the run"


def test_a_model_that_cannot_be_counted_is_one_line(folder, monkeypatch):
    config = measure.config(folder, "sft", measure.SIZES)
    monkeypatch.setattr("fastrlhf.tools.plan.phases.Fakes.peak", lambda *_, **__: {}["x"])
    message = r"^the memory of LlamaForCausalLM cannot be counted without data \(KeyError: 'x'\); measure a short run$"
    with pytest.raises(ValueError, match=message):
        count_parts(config)
