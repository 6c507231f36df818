"""Tests of the vLLM engine with a stand-in for the library (stand_in/vllm.py); its worker runs in a thread.

`test_vllm_child.py` has the tests with a real process.
"""

import json
import os
import sys
from dataclasses import replace
from importlib import import_module
from multiprocessing import Pipe
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig

from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.roles import make_engine
from fastrlhf.config import DRPOConfig, SFTConfig
from fastrlhf.models.adapters import add_adapter, merged_copy
from fastrlhf.models.loading import load_policy
from fastrlhf.models.vocabulary import limit_vocabulary
from fastrlhf.rollout import vllm as engine_module
from fastrlhf.rollout.engine import checked_rollouts
from fastrlhf.rollout.vllm import check_vllm, checkpoint_weights, write_model_config
from fastrlhf.rollout.vllm_child import Child
from fastrlhf.rollout.vllm_memory import SharedMemory
from fastrlhf.rollout.vllm_worker import Worker, serve
from fastrlhf.types import Prefix
from tests import tiny

STAND_IN = Path(__file__).parent / "stand_in"


class InThread(Child):
    """Runs the program of the vLLM process in a thread of this process, so that a test can access its engine."""

    def __init__(self, memory, environment):
        self.environment = environment
        self.folder = TemporaryDirectory()
        os.chdir(self.folder.name)
        self._connection, theirs = Pipe()
        self._process = SimpleNamespace(poll=lambda: None)
        self.close = self._connection.close
        Thread(target=serve, args=(theirs, Worker(SharedMemory(memory))), daemon=True).start()

    @property
    def pid(self):
        return 0


@pytest.fixture(autouse=True)
def vllm(monkeypatch, tmp_path):
    """Imports the stand-in library afresh and removes its modules after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_DIST_IDENT", "")
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.setattr(engine_module, "Child", InThread)
    monkeypatch.setattr(torch, "manual_seed", torch.manual_seed)
    module = import_module("vllm")
    # Workers share a registry in this test; in separate processes each worker has its own.
    factory = module.WeightTransferEngineFactory
    monkeypatch.setattr(factory, "register_engine", factory.registry.__setitem__)
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture
def paths(tmp_path):
    return {
        "model_name_or_path": tiny.save_policy(tmp_path / "sft"),
        "reward_model_path": tiny.save_reward_model(tmp_path / "reward"),
    }


def config(paths, **settings):
    fields = {
        "engine": "vllm",
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "response_length": 6,
        "max_length": 32,
        "temperature": 0.8,
        "learning_rate": 1e-2,
        "progress": False,
    }
    return DRPOConfig(**paths, **fields | settings)


def prefixes(count: int) -> list[Prefix]:
    return [
        Prefix(token_ids=[3 + (i * j) % 20 for j in range(1, 6 + i % 4)], num_reset=i % 4, row=i, episode=i)
        for i in range(count)
    ]


def test_a_run_samples_with_the_weights_of_every_update(paths, vllm):
    """The engine's log-probs must equal those of the trainer's forward before and after weight updates."""
    result = train_ppo(config(paths), tiny.examples(20))
    [llm] = vllm.LLM.made
    assert llm.updates == 3
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-5 for row in result.history)
    assert result.history[-1]["objective/kl"] > 0.01


def test_rollouts_satisfy_the_engine_contract(paths):
    cfg = config(paths)
    policy = load_policy(cfg.model_name_or_path)
    starts = prefixes(60)
    engine = make_engine(cfg, policy, tiny.EOS)
    rollouts = checked_rollouts(engine.generate(starts), starts, eos_token_id=tiny.EOS, stops_at_eos=True)
    assert {r.ended for r in rollouts} == {True, False}
    assert all(len(r.completion) == 6 - r.prefix.num_reset for r in rollouts if not r.ended)


def test_a_seed_belongs_to_an_episode_and_to_the_run(paths):
    cfg = config(paths)
    policy = load_policy(cfg.model_name_or_path)
    starts = prefixes(20)

    def completions(starts, **settings):
        return [r.completion for r in make_engine(replace(cfg, **settings), policy, tiny.EOS).generate(starts)]

    assert completions(starts) == completions(starts[::-1])[::-1]
    assert completions(starts) != completions(starts, seed=cfg.seed + 1)
    same = [replace(starts[0], episode=i) for i in range(20)]
    assert len({tuple(tokens) for tokens in completions(same)}) > 10


def test_each_episode_is_drawn_at_its_temperature(paths):
    """In a run with two temperatures the engine's log-probs must equal the trainer's. In a batch with several
    temperatures, each episode must equal the sample of an engine with only this temperature."""
    groups = {"temperatures": (0.5, 1.5), "num_generations": 4, "advantage_estimator": "rloo", "max_steps": 2}
    row, *_ = train_ppo(config(paths, **groups), tiny.examples(20)).history
    assert row["sampling/sampling_logp_difference/max"] < 1e-5
    engine = make_engine(config(paths), load_policy(paths["model_name_or_path"]), tiny.EOS)
    heats = [0.5, 1.5, None] * 4
    starts = [replace(prefix, temperature=heat) for prefix, heat in zip(prefixes(12), heats, strict=True)]
    mixed = engine.generate(starts)
    for i, heat in enumerate((0.5, 1.5, 0.8)):
        alike = replace(engine, temperature=heat).generate(prefixes(12))
        assert [r.completion for r in mixed[i::3]] == [r.completion for r in alike[i::3]]
        assert [r.sampler_logprob for r in mixed[i::3]] == [r.sampler_logprob for r in alike[i::3]]


def test_with_stop_at_eos_off_the_engine_samples_past_the_eos(paths):
    cfg = config(paths, compat="reference")
    engine = make_engine(cfg, load_policy(cfg.model_name_or_path), tiny.EOS)
    rollouts = engine.generate(prefixes(60))
    assert all(len(r.completion) == 6 - r.prefix.num_reset for r in rollouts)
    assert any(r.ended and r.completion[-1] != tiny.EOS for r in rollouts)


def test_a_policy_with_a_larger_vocabulary_than_its_folder_is_handed_over_whole(paths, vllm):
    cfg = config(paths)
    policy = load_policy(cfg.model_name_or_path)
    policy.resize_token_embeddings(tiny.VOCAB + 3)
    make_engine(cfg, policy, tiny.EOS).generate(prefixes(2))
    assert torch.equal(vllm.LLM.made[0].model.lm_head.weight, policy.lm_head.weight)


def test_weights_are_handed_over_in_groups(paths, vllm, monkeypatch):
    cfg = config(paths)
    engine = make_engine(cfg, load_policy(cfg.model_name_or_path), tiny.EOS)
    monkeypatch.setattr(engine_module, "groups", lambda weights: ([weight] for weight in weights))
    rollouts = engine.generate(prefixes(4))
    [llm] = vllm.LLM.made
    assert llm.loads == len(list(llm.model.parameters()))
    monkeypatch.undo()
    assert [r.completion for r in rollouts] == [r.completion for r in engine.generate(prefixes(4))]
    assert llm.loads == len(list(llm.model.parameters())) + 1


def test_several_processes_share_the_prefixes_and_have_the_weights_each(paths, vllm, monkeypatch):
    cfg = config(paths)
    policy = load_policy(cfg.model_name_or_path)
    single = [r.completion for r in make_engine(cfg, policy, tiny.EOS).generate(prefixes(21))]
    monkeypatch.setattr(engine_module, "_visible_devices", lambda *_: ["4", "7"])
    engine = make_engine(cfg, policy, tiny.EOS)
    assert [child.environment for child in engine.children] == [
        {"CUDA_VISIBLE_DEVICES": "4"},
        {"CUDA_VISIBLE_DEVICES": "7"},
    ]
    assert [r.completion for r in engine.generate(prefixes(21))] == single
    assert [llm.updates for llm in vllm.LLM.made] == [1, 1, 1]
    assert [r.completion for r in engine.generate(prefixes(1))] == single[:1]
    assert engine.generate([]) == []


def test_numbers_of_gpus_refer_to_those_that_the_trainer_sees(monkeypatch):
    visible = engine_module._visible_devices
    gpu = SimpleNamespace(device=torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible(DRPOConfig(), SimpleNamespace(device=torch.device("cpu"))) == [""]
    assert visible(DRPOConfig(), gpu) == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8a,7")
    assert visible(DRPOConfig(), gpu) == ["GPU-8a"]
    assert visible(DRPOConfig(engine="vllm", vllm_devices=(2, 0)), gpu) == ["7", "5"]


def test_the_engine_sleeps_while_the_trainer_trains(paths, vllm, monkeypatch):
    cfg = replace(config(paths), vllm_enable_sleep_mode=True)
    monkeypatch.setattr(engine_module, "check_vllm", lambda config: None)
    policy = load_policy(cfg.model_name_or_path)
    engine = make_engine(cfg, policy, tiny.EOS)
    [llm] = vllm.LLM.made
    assert llm.awake == set()
    for _ in range(2):
        checked_rollouts(engine.generate(prefixes(2)), prefixes(2), eos_token_id=tiny.EOS, stops_at_eos=True)
        assert llm.awake == set()
        assert llm.model.lm_head.weight.isnan().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode: must be false without a GPU: on a CPU vLLM cannot"),
        ({"vllm_devices": (0,)}, r"vllm_devices: must be empty without a GPU; got \(0,\)"),
    ],
)
def test_what_needs_a_gpu_is_refused_before_anything_is_loaded(paths, settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        train_ppo(config(paths | {"model_name_or_path": "nowhere"}, device="cpu", **settings), tiny.examples(4))


def test_a_gpu_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setattr(engine_module, "resolve_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_vllm(DRPOConfig(engine="vllm", vllm_devices=(1, 0)))
    with pytest.raises(ValueError, match=r"^vllm_devices: must be numbers of GPUs below 2; got \(2,\)"):
        check_vllm(DRPOConfig(engine="vllm", vllm_devices=(2,)))


def test_the_model_is_the_policys_and_not_its_folders(tmp_path):
    """vLLM gets a config.json made from the policy object, not the file in the policy's folder. It names the model
    class and has no 4-bit settings. Remote code is copied from the policy's folder.
    """
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "modeling_x.py").write_text("# code")
    policy = tiny.policy()
    policy.config.quantization_config = {"load_in_4bit": True}
    settings = DRPOConfig(model_name_or_path=str(tmp_path / "source"), trust_remote_code=True)
    write_model_config(policy, settings, tmp_path / "made")
    written = json.loads((tmp_path / "made" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["vocab_size"] == tiny.VOCAB
    assert "quantization_config" not in written
    assert policy.config.quantization_config
    assert (tmp_path / "made" / "modeling_x.py").read_text() == "# code"


def test_keys_and_values_of_old_weights_stop_the_run(paths, vllm, monkeypatch):
    engine = make_engine(config(paths), load_policy(paths["model_name_or_path"]), tiny.EOS)
    monkeypatch.setattr(vllm.LLM, "drops_its_cache", False)
    with pytest.raises(ValueError, match=r"^engine: vllm did not drop its cached keys and values"):
        engine.generate(prefixes(2))


def test_weights_that_do_not_arrive_stop_the_run_at_its_first_update(paths, vllm, monkeypatch):
    """Simulates an engine that keeps the random weights with which it started."""
    monkeypatch.setattr(vllm.LLM, "_load_weights", lambda self, weights: self.missing.clear())
    with pytest.raises(
        ValueError,
        match=r"^max_sampling_logp_difference: engine vllm samples from another model than the trainer's: for update 1 "
        r"its log-probs differ by \d\.\d+ nats per token .*: the weights of the policy did not reach vLLM",
    ):
        train_ppo(config(paths), tiny.examples(20))


def test_a_prefix_without_room_for_a_response_is_an_error(paths):
    engine = make_engine(config(paths), load_policy(paths["model_name_or_path"]), tiny.EOS)
    fits = Prefix(token_ids=[5] * 28, num_reset=2, row=7, episode=0)
    assert len(engine.generate([fits])) == 1
    with pytest.raises(ValueError, match=r"^max_length: row 8 needs 33 tokens .*, more than 32; vLLM would cut"):
        engine.generate([replace(fits, token_ids=[5] * 29, row=8)])


def test_the_seed_of_the_engine_is_the_runs(paths, vllm):
    make_engine(config(paths, seed=11), load_policy(paths["model_name_or_path"]), tiny.EOS)
    assert vllm.LLM.made[0].seed == 11


def test_another_version_than_the_tested_one_is_named(paths, vllm, monkeypatch, caplog):
    policy = load_policy(paths["model_name_or_path"])
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    make_engine(config(paths), policy, tiny.EOS)
    assert "engine: vLLM 0.33.1 is not the version that is tested, 0.32" in caplog.messages
    monkeypatch.setattr(vllm, "__version__", "0.9.2")
    with pytest.raises(
        ValueError,
        match=r"^engine: vllm cannot be used \(version 0.9.2 is older than 0.32\); pip install 'fastrlhf\[vllm\]'",
    ):
        make_engine(config(paths), policy, tiny.EOS)


@pytest.mark.parametrize("holes", [set(), {4, 17, 30}])
def test_ids_without_a_token_are_never_sampled(paths, holes):
    policy = load_policy(paths["model_name_or_path"])
    policy.resize_token_embeddings(tiny.VOCAB + 3)
    idle = sorted({*range(tiny.VOCAB, tiny.VOCAB + 3), *holes})
    with torch.no_grad():
        policy.lm_head.weight[idle] = 10 * policy.lm_head.weight[: len(idle)]
    limit_vocabulary(policy, tiny.tokenizer(holes))
    rollouts = make_engine(config(paths), policy, tiny.EOS).generate(prefixes(40))
    assert not {token for rollout in rollouts for token in rollout.completion} & {*idle}
    assert max(max(rollout.completion) for rollout in rollouts) > 17
    for rollout in rollouts[:9]:
        n = len(rollout.prefix.token_ids)
        with torch.no_grad():
            logits = policy(torch.tensor([rollout.prefix.token_ids + rollout.completion])).logits[0, n - 1 : -1]
        allowed = (logits / config(paths).temperature).index_fill(1, torch.tensor(idle), -torch.inf).log_softmax(-1)
        told = allowed.gather(1, torch.tensor(rollout.completion)[:, None])[:, 0]
        assert rollout.sampler_logprob == pytest.approx(told.tolist(), abs=1e-5)


def test_experts_are_handed_over_by_the_names_of_a_checkpoint(tmp_path):
    """In memory, Mixtral's experts are fused into one tensor and carry an adapter. vLLM must get the merged weights
    under the names of a checkpoint, one tensor per expert."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": tiny.VOCAB}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes))
    add_adapter(model, SFTConfig(use_peft=True, lora_r=2), "base")
    merged_copy(model).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    handed = dict(checkpoint_weights(model))
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in handed
    assert set(handed) == set(saved)
    assert all(torch.equal(handed[name], saved[name]) for name in saved)


def test_a_reset_that_leaves_nothing_to_sample_is_refused(paths):
    cfg = config(paths)
    engine = make_engine(cfg, load_policy(cfg.model_name_or_path), tiny.EOS)
    with pytest.raises(ValueError, match="leaves nothing to sample after the 6 reset tokens of row 4"):
        engine.generate([Prefix(token_ids=[5] * 10, num_reset=6, row=4, episode=0)])


def test_without_vllm_a_run_says_how_to_install_it_before_anything_is_loaded(paths, monkeypatch):
    monkeypatch.setattr(engine_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^engine: vllm is not installed; pip install 'fastrlhf\[vllm\]', or set engine"
    ):
        train_ppo(config(paths | {"model_name_or_path": "nowhere"}), tiny.examples(4))
