"""Tests of the changes of settings that `fastrlhf plan` advises, and that these changes suffice."""

import dataclasses

from fastrlhf.tools.plan import changes
from fastrlhf.tools.plan.packs import read_rows
from fastrlhf.tools.plan.phases import GIB, count_phases
from fastrlhf.tools.plan.plan import USABLE, plan_run
from tests.tools import measure


def test_the_change_it_names_makes_it_fit(folder):
    config = measure.config(folder, "sft")
    memory = 0.97 * plan_run(config).peak / USABLE / GIB
    plan = plan_run(config, memory_gib=memory)
    assert not plan.fits
    name, value = plan.change.partition("fits: ")[2].split()[:2]
    assert name == "--micro_batch_tokens"
    assert plan_run(dataclasses.replace(config, micro_batch_tokens=int(value.strip(":"))), memory_gib=memory).fits


def test_if_the_rollout_is_too_large_a_smaller_rollout_batch_is_advised(folder):
    wide = {"per_device_train_batch_size": 64, "rollout_batch_size": 64, "micro_batch_tokens": 184}
    config = measure.config(folder, "ppo", reward_model_path=str(folder / "tiny_reward"), **wide)
    whole = plan_run(config)
    assert whole.peak == whole.phases[0].total
    assert "--rollout_batch_size 32" in plan_run(config, memory_gib=0.99 * whole.peak / USABLE / GIB).change


def test_precomputing_the_reference_is_advised_first(folder):
    config = measure.config(folder, "dpo", precompute_ref_log_probs=False)
    memory = (plan_run(config).peak - 2**19) / USABLE / GIB
    plan = plan_run(config, memory_gib=memory)
    assert "weights of the reference" in plan.phases[0].parts
    assert "fits: --precompute_ref_log_probs True: " in plan.change


def test_offloading_frozen_models_is_advised_before_checkpointing(folder):
    """On a GPU the plan advises offloading, except if the loss needs the reference's head in every step of the
    update."""
    small = {"per_device_train_batch_size": 2, "reward_model_path": str(folder / "tiny_reward")}
    config = measure.config(folder, "ppo", **small)
    exact = dataclasses.replace(config, kl_placement="loss", kl_estimator="exact")
    for each, may_offload, advised in ((config, True, True), (config, False, False), (exact, True, False)):
        rows = read_rows(each)
        phases = count_phases(each, rows, is_cuda=True).phases
        limit = max(phase.total for phase in phases) - 2**20
        change = changes.cheapest_change(each, rows, phases, limit, memory=0, is_cuda=True, may_offload=may_offload)
        assert ("fits: --ref_reward_offload True: " in change) == advised, change


def test_if_nothing_helps_the_plan_says_so(folder):
    change = plan_run(measure.config(folder, "sft"), memory_gib=0.001).change
    assert change.startswith("no change of settings is enough: the smallest configuration needs ")


def test_changes_that_keep_the_numbers_are_advised_first(folder):
    """Packs are already as small as possible, so the plan first advises checkpointing. LoRA changes the numbers and is
    advised last."""
    loaded = {"model_config": "", "model_name_or_path": str(folder / "policy"), "micro_batch_tokens": 256}
    config = measure.config(folder, "sft", **loaded)
    peak = plan_run(config).peak
    for share, last in ((0.97, "--activation_checkpointing True: "), (0.3, "--use_peft True: ")):
        change = plan_run(config, memory_gib=share * peak / USABLE / GIB).change
        assert last in change
        assert change.startswith("the cheapest change that fits: --")
        assert "--activation_checkpointing True" in change


def test_several_processes_are_not_advised_what_they_refuse(folder, monkeypatch):
    config = measure.config(folder, "ppo", device="auto")
    assert any(base.ref_reward_offload for base in changes._bases(config, may_offload=True))
    monkeypatch.setattr(changes, "world_size", lambda: 2)
    assert not any(base.ref_reward_offload for base in changes._bases(config, may_offload=True))


def test_offloading_activations_is_only_advised_for_a_gpu(folder):
    """`--memory_gib` may give the memory of a GPU, except for a run with `device: cpu`."""
    sizes = measure.SIZES | {"num_hidden_layers": 8}
    config = measure.config(folder, "sft", sizes, activation_checkpointing=True, micro_batch_tokens=256, device="auto")
    offloaded = plan_run(dataclasses.replace(config, activation_offloading=True), memory_gib=1)
    memory = 1.001 * offloaded.peak / USABLE / GIB
    assert "fits: --activation_offloading True: " in plan_run(config, memory_gib=memory).change
    on_cpu = plan_run(dataclasses.replace(config, device="cpu"), memory_gib=memory)
    assert "--activation_offloading" not in on_cpu.change
    assert not on_cpu.fits
