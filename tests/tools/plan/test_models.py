"""Tests which models a plan counts, and the bytes of each model, with values computed by hand."""

import pytest

from fastrlhf.tools.plan.memory import Fakes
from fastrlhf.tools.plan.models import open_models
from fastrlhf.tools.plan.packs import read_rows
from tests.tools import measure

POLICY, SCORER = 5_261_568, 4_237_824
LINEAR = 4 * (4 * 256 * 256 + 3 * 256 * 704)
"""Number of weights in the linear layers of the 4-layer model."""
BUFFERS = 1024
"""Tolerance in bytes, larger than the buffers of rotary positions."""


def adapter(rank: int) -> int:
    """Returns the float32 bytes of an adapter over 4 layers of 4 square matrices and 3 MLP matrices each. The adapter
    of an m x n matrix has rank * (m + n) weights.
    """
    return 4 * 4 * rank * (4 * (256 + 256) + 3 * (256 + 704))


def own(folder, command, sizes=measure.SIZES, **changes) -> dict[str, int]:
    config = measure.config(folder, command, sizes, **changes)
    return open_models(config, read_rows(config).tokenizer, Fakes.of(config.dtype, False)).own


def test_roles_that_are_adapters_cost_their_adapters_by_the_ranks_in_their_settings(folder):
    sizes = own(folder, "roles")
    head = 4 * 256
    assert sizes["policy"] == pytest.approx(4 * POLICY + adapter(16), abs=BUFFERS)
    assert sizes["reference"] == 0
    assert sizes["reward model"] == sizes["critic"] == adapter(measure.JUDGE_RANK) + head
    assert sizes["DPO model"] == adapter(measure.DPO_RANK)


def test_where_all_weights_are_trained_roles_share_those_of_the_reference(folder):
    sizes = own(folder, "roles", use_peft=False)
    assert sizes["policy"] == sizes["reference"] == pytest.approx(4 * POLICY, abs=BUFFERS)
    assert sizes["critic"] == pytest.approx(4 * SCORER, abs=BUFFERS)  # with the adapter merged
    assert sizes["reward model"] == adapter(measure.JUDGE_RANK) + 4 * 256
    second = own(folder, "roles", advantage_estimator="rloo", num_generations=2, **second_judge(folder))
    assert second["second reward model"] == sizes["reward model"]
    assert "critic" not in second


def test_token_rewards_that_learn_are_another_trained_model(folder):
    refined = {"dpo_refine": "outcome", "success_threshold": 0.0}
    adapted = own(folder, "roles", **refined)
    assert adapted["DPO model"] == adapter(measure.DPO_RANK)
    started = own(folder, "roles", **refined, dpo_model_path="")
    assert started["DPO model"] == adapter(16)  # a new adapter of rank 16 over the weights of the reference
    whole = own(folder, "roles", **refined, use_peft=False)
    assert whole["DPO model"] == pytest.approx(4 * POLICY, abs=BUFFERS)


def second_judge(folder) -> dict[str, str]:
    return {"eval_reward_model_path": str(folder / "judge" / "adapter")}


@measure.needs_bitsandbytes
def test_linear_layers_in_4_bits_take_half_a_byte_and_the_scales_of_double_quantisation(folder):
    # 1/2 byte per weight, 1 byte (scale) per 64 weights, 4 bytes per 256 scales, and the code tables of 7 * 4 matrices
    packed = LINEAR * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + 7 * 4 * 4 * (16 + 256 + 1)
    expected = packed + 4 * (POLICY - LINEAR)
    sizes = own(folder, "qlora")
    assert sizes["policy"] == pytest.approx(expected + adapter(16), rel=1e-4)
    roles = own(folder, "roles", load_in_4bit=True)
    assert roles["policy"] == sizes["policy"]
    assert roles["critic"] == adapter(measure.JUDGE_RANK) + 4 * 256
    judged = own(folder, "lora", load_in_4bit=True)  # the judge is a full model, which load_in_4bit does not quantise
    assert judged["critic"] == pytest.approx(4 * SCORER + adapter(16), abs=BUFFERS)


def test_a_separate_reference_is_counted_in_addition_to_an_adapter(folder):
    loaded = {"model_config": "", "model_name_or_path": str(folder / "tiny_policy"), "use_peft": True}
    settings = loaded | {"precompute_ref_log_probs": False}
    assert own(folder, "dpo", measure.SMALL, **settings)["reference"] == 0
    settings["ref_model_name_or_path"] = str(folder / "policy")
    assert own(folder, "dpo", measure.SMALL, **settings)["reference"] >= 4 * POLICY


def test_a_model_from_scratch_is_refused_an_adapter_as_the_run_refuses_it(folder):
    with pytest.raises(ValueError, match="use_peft: must be false with model_config: random weights need no adapter"):
        own(folder, "sft", use_peft=True)


def test_the_models_that_are_counted_are_those_that_the_run_loads(folder):
    whole, judge = str(folder / "policy"), str(folder / "reward")
    start = {"model_config": "", "model_name_or_path": whole, "dpo_model_path": whole, "dpo_ref_model_path": whole}
    names = {"DPO model", "DPO reference", "second reward model"}
    assert names & own(folder, "ppo", **start).keys() == {"DPO model"}  # the DPO model shares the reference of the run
    unpaid = own(folder, "ppo", **start, reward_shaping="none", eval_reward_model_path=judge)
    assert names & unpaid.keys() == {"second reward model"}
    assert unpaid["second reward model"] == unpaid["reward model"]
