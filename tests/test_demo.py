import json
from dataclasses import replace
from math import log

import pytest

from fastrlhf import demo
from fastrlhf.config import DemoConfig, DRPOConfig, PPOConfig, RLPConfig


@pytest.fixture
def short(monkeypatch):
    """Shortens every stage of the demo to two steps on a few posts; all other settings are the defaults."""
    full = demo.stage_config

    def shortened(name, config, out):
        settings = full(name, config, out)
        if isinstance(settings, RLPConfig):  # RLP uses the settings of other stages
            return settings
        batch = 16 if name == "grpo" else 8
        return replace(settings, max_steps=2, warmup_steps=0, per_device_train_batch_size=batch, progress=False)

    monkeypatch.setattr(demo, "stage_config", shortened)
    for name in ("NUM_SFT", "NUM_PAIRS", "NUM_PROMPTS", "NUM_ANSWERED"):
        monkeypatch.setattr(demo, name, 24)


def test_the_demo_writes_a_folder_per_stage_a_summary_and_a_report(short, tmp_path):
    out = tmp_path / "demo"
    summary = demo.run_demo(DemoConfig(out=str(out), num_eval=20, seed=3, methods=("all",)))
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (summary["task"], summary["seed"], summary["device"]) == ("toy", 3, "cpu")
    assert list(summary["methods"]) == [name for name in demo.STAGES if name != "reward"]
    sums = summary["methods"]["grpo"]
    assert 0 <= sums["accuracy_before"] <= 1
    assert sums["tokens"] == 2 * 16  # two updates of 16 responses of one token
    for name, row in summary["methods"].items():
        if name == "grpo":
            continue
        assert row["win_rate_ci"][0] <= row["win_rate"] <= row["win_rate_ci"][1]
        assert row["tokens"] > 0
        assert row["seconds"] > 0
        assert ("minus_sft" in row) == (name != "sft")
    assert summary["methods"]["sft"]["kl"] == 0.0
    for name in ("sft", "reward", "dpo", "ppo", "drpo"):
        assert (out / name / "model.safetensors").exists()
        assert len((out / name / "metrics.jsonl").read_text().splitlines()) == 2
    assert "drpo" in (out / "report.html").read_text()
    for name in ("rlp-uml", "rlp-spg"):
        assert (out / name / "round-1" / "policy" / "model.safetensors").exists()
        assert 0 < summary["rlp"][name]["rlp/rm_accuracy_policy_after"] <= 1
    assert "rlp/views_jsd" in summary["rlp"]["rlp-uml"]
    table = demo.format_summary(summary).splitlines()
    assert [line.split()[0] for line in table] == ["method", *summary["methods"]]
    with pytest.raises(ValueError, match="already holds a run"):
        demo.run_demo(DemoConfig(out=str(out)))


def test_grpo_runs_on_sums_without_any_other_stage(short, tmp_path):
    summary = demo.run_demo(DemoConfig(out=str(tmp_path / "a"), methods=("grpo",)))
    assert list(summary["methods"]) == ["grpo"]
    line = demo.format_summary(summary).splitlines()[-1]
    assert line.startswith("grpo     sums of two digits, from random weights: ")
    assert "<th>accuracy</th>" in (tmp_path / "a" / "report.html").read_text()


def test_stages_may_be_omitted_unless_others_start_from_them(short, tmp_path):
    summary = demo.run_demo(DemoConfig(out=str(tmp_path / "a"), num_eval=8, methods=("sft", "dpo")))
    assert list(summary["methods"]) == ["sft", "dpo"]
    assert summary["methods"]["dpo"]["rm_score"] is None
    assert len(demo.format_summary(summary).splitlines()) == 3
    for methods, message in (
        ("sft ppo drpo", "with reward, which judges drpo, ppo"),
        ("sft reward rto", "with dpo, which rewards the tokens of rto"),
        ("sft reward rlp-uml rlp-spg", "with ppo, which answers for rlp-spg, rlp-uml"),
        ("dpo", "with sft, from which every method except grpo starts"),
        ("sft dqo", "unknown method 'dqo'"),
    ):
        with pytest.raises(ValueError, match=message):
            demo.run_demo(DemoConfig(out=str(tmp_path / "b"), methods=tuple(methods.split())))
    assert not (tmp_path / "b").exists()


def test_ipo_and_cdpo_run_on_request_with_their_own_losses(short, tmp_path):
    out = tmp_path / "demo"
    summary = demo.run_demo(DemoConfig(out=str(out), num_eval=8, methods=("ipo", "sft", "cdpo")))
    assert list(summary["methods"]) == ["sft", "ipo", "cdpo"]
    first = {
        name: json.loads((out / name / "metrics.jsonl").read_text().splitlines()[0])["loss"] for name in ("ipo", "cdpo")
    }
    # At tau 0.02 the target of IPO is 1 / (2 * 0.02) = 25 nats per response
    assert first["ipo"] == pytest.approx((1 / (2 * 0.02)) ** 2, rel=1e-3)
    assert first["cdpo"] == pytest.approx(log(2), rel=1e-3)


def test_dpo_ipo_and_cdpo_differ_only_in_their_loss(tmp_path):
    dpo, ipo, cdpo = (vars(demo.stage_config(name, DemoConfig(), tmp_path)) for name in ("dpo", "ipo", "cdpo"))
    assert {name for name in dpo if dpo[name] != ipo[name]} == {"output_dir", "beta", "loss_type", "length_norm"}
    assert {name for name in dpo if dpo[name] != cdpo[name]} == {"output_dir", "label_smoothing"}


def test_ppo_and_drpo_differ_only_in_resets_and_number_of_updates(tmp_path):
    ppo, drpo = (demo.stage_config(name, DemoConfig(), tmp_path) for name in ("ppo", "drpo"))
    assert isinstance(ppo, PPOConfig)
    assert isinstance(drpo, DRPOConfig)
    own = {"reset_prob": 0.0, "reset_min": 1, "max_steps": ppo.max_steps, "output_dir": ppo.output_dir}
    assert vars(replace(drpo, **own)) == vars(ppo)


@pytest.mark.parametrize(("plain", "rewarded"), [("ppo", "rto"), ("drpo", "drpo+rto")])
def test_rto_adds_token_rewards_and_nothing_else(tmp_path, plain, rewarded):
    ours, base = (demo.stage_config(name, DemoConfig(), tmp_path) for name in (rewarded, plain))
    assert isinstance(ours, PPOConfig)
    assert isinstance(base, PPOConfig)
    assert ours.dpo_model_path == str(tmp_path / "dpo")
    own = {"dpo_model_path": "", "dpo_reward_scale": base.dpo_reward_scale, "output_dir": base.output_dir}
    assert vars(replace(ours, **own)) == vars(base)
