"""Tests that errors in a later run of a chain are reported before an earlier run starts."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from fastrlhf.config import DPOConfig, PPOConfig, RewardConfig, RLPConfig, RTOConfig, SFTConfig
from fastrlhf.models import four_bit, layers
from fastrlhf.tools.plan.preflight import check_chain, rlp_stages
from tests import hub_server, tiny


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The configurations of a chain sft -> reward -> dpo -> rto that starts from an existing model. No run has
    started."""
    folder = tmp_path_factory.mktemp("chain")
    rows = [
        {"prompt": e.prompt, "completion": e.reference, "chosen": e.chosen, "rejected": e.rejected}
        for e in tiny.examples(8)
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "mine.py").write_text("def brief(rollout):\n    return 0.0\n")
    shared = {
        "dataset_name": str(folder / "rows.jsonl"),
        "columns": "reference=completion",
        "max_length": 32,
        "per_device_train_batch_size": 4,
    }

    def of(kind, name, start="sft", **settings):
        return kind(output_dir=str(folder / name), model_name_or_path=str(folder / start), **shared | settings)

    base = tiny.save_policy(folder / "base")
    judged = {"reward_model_path": str(folder / "reward"), "dpo_model_path": str(folder / "dpo"), "response_length": 6}
    return {
        "sft": replace(of(SFTConfig, "sft"), model_name_or_path=base),
        "reward": of(RewardConfig, "reward"),
        "dpo": of(DPOConfig, "dpo"),
        "rto": of(RTOConfig, "rto", **judged, reward_functions=(f"{folder}/mine.py:brief",)),
    }


def told(chain, name: str, **settings) -> str:
    with pytest.raises(ValueError, match=f"^{name}: ") as refusal:
        check_chain(list((chain | {name: replace(chain[name], **settings)}).items()))
    return str(refusal.value).removeprefix(f"{name}: ")


def test_a_chain_with_models_that_do_not_exist_yet_is_accepted(chain):
    check_chain(list(chain.items()))
    middle = f"{chain['sft'].output_dir}/checkpoint-2"
    check_chain(list((chain | {"dpo": replace(chain["dpo"], ref_model_name_or_path=middle)}).items()))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("rto", {"dataset_name": "nowhere.jsonl"}, "nowhere.jsonl: no such file or folder"),
        ("dpo", {"columns": "rejected=worse"}, "columns: .* has no column 'worse' for rejected"),
        ("rto", {"max_length": 7}, "max_length: no train prompt leaves room for a response of 6 tokens"),
        ("rto", {"micro_batch_tokens": 8}, "micro_batch_tokens: must be at least .*, the tokens of row"),
        ("reward", {"micro_batch_tokens": 8}, "micro_batch_tokens: must be at least .*, the tokens of row"),
        ("rto", {"reward_functions": ("nowhere.py:brief",)}, "reward_functions: no file 'nowhere.py'"),
        ("rto", {"psi": "logits"}, "psi: 'logits' is unknown; give identity"),
        ("dpo", {"report_to": ("tensorbord",)}, "report_to: unknown reporter 'tensorbord'"),
        (
            "dpo",
            {"model_name_or_path": "nowhere/at/all"},
            "model_name_or_path: 'nowhere/at/all' is neither a local folder",
        ),
        ("rto", {"eval_reward_model_path": "nowhere/at/all"}, "eval_reward_model_path: 'nowhere/at/all' is neither"),
        ("rto", {"tokenizer_name_or_path": "nowhere/at/all"}, "tokenizer nowhere/at/all: no such folder"),
        ("rto", {"dpo_model_path": ""}, "dpo_model_path: give the DPO model"),
    ],
)
def test_an_error_in_a_later_run_is_reported_with_its_name(chain, name, settings, message):
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        check_chain(list((chain | {name: replace(chain[name], **settings)}).items()))


def test_a_model_of_the_wrong_kind_is_reported_before_it_is_trained(chain):
    folders = {name: config.output_dir for name, config in chain.items()}
    message = told(chain, "rto", reward_model_path=folders["dpo"])
    assert message == f"reward_model_path: {folders['dpo']!r} will hold a policy, trained by dpo; give a reward model"
    message = told(chain, "rto", dpo_model_path=folders["reward"])
    assert (
        message == f"dpo_model_path: {folders['reward']!r} will hold a reward model, trained by reward; give a policy"
    )


def test_an_adapter_may_be_a_role_of_an_on_policy_run_and_no_model_to_start_from(chain, tmp_path):
    base = chain["sft"].model_name_or_path
    judge = tiny.save_adapter(tmp_path / "judge", base, 1, scores=True)
    dpo = tiny.save_adapter(tmp_path / "dpo", base, 2)
    roles = {"reward_model_path": judge, "eval_reward_model_path": judge, "dpo_model_path": dpo}
    check_chain(list((chain | {"rto": replace(chain["rto"], **roles, dpo_ref_model_path=dpo)}).items()))
    for name, key in (("rto", "model_name_or_path"), ("dpo", "ref_model_name_or_path")):
        assert told(chain, name, **{key: dpo}).startswith(f"{key}: {dpo!r}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "paged_adamw_8bit"}, "optim: must be .* without a CUDA GPU"),
        ({"optim": "adamw_8bit"}, "optim: adamw_8bit needs bitsandbytes"),
        ({"load_in_4bit": True, "use_peft": True}, "load_in_4bit: bitsandbytes is not installed"),
        ({"use_liger_kernel": True}, "use_liger_kernel: "),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation: flash_attention_2 needs a CUDA GPU"),
        (
            {"activation_checkpointing": True, "activation_offloading": True, "device": "auto"},
            "activation_offloading: needs a CUDA GPU, and the run is on cpu",
        ),
    ],
)
def test_missing_devices_and_packages_are_reported(chain, settings, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(four_bit, "find_spec", lambda name: None)
    monkeypatch.setattr(layers._triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"^dpo: {message}"):
        check_chain(list((chain | {"dpo": replace(chain["dpo"], **{"device": "cpu"} | settings)}).items()))


def test_two_runs_of_one_folder_are_refused(chain):
    message = told(chain, "dpo", output_dir=chain["sft"].output_dir)
    assert message.startswith(f"output_dir: {chain['sft'].output_dir!r} is also the output_dir of sft")


def test_later_runs_that_could_not_upload_are_refused(chain, monkeypatch, tmp_path):
    pushes = {"push_to_hub": True, "hub_model_id": "ada/one"}
    with hub_server.serving() as hub:
        hub_server.use(monkeypatch, hub.url)
        both = chain | {name: replace(chain[name], **pushes) for name in ("reward", "dpo")}
        with pytest.raises(ValueError, match=r"^dpo: hub_model_id: reward uploads there too; give another repository"):
            check_chain(list(both.items()))
        check_chain(list((both | {"dpo": replace(both["dpo"], hub_revision="dpo")}).items()))
        assert ("ada/one", "dpo") in hub.files
        assert told(chain, "dpo", push_to_hub=True, hub_model_id="others/x").startswith(
            "hub_model_id: the token cannot write to 'others/x'"
        )
        rlp = RLPConfig(output_dir=str(tmp_path), push_to_hub=True, hub_model_id="others/x")
        policy = PPOConfig(model_name_or_path=chain["sft"].output_dir)
        with pytest.raises(ValueError, match=r"^hub_model_id: the token cannot write to 'others/x'"):
            rlp_stages(rlp, chain["reward"], policy)


def test_the_tokenizer_of_an_earlier_run_is_taken_from_its_source(chain):
    """The rows of rto are conversations, which need a chat template. The chain is refused without one, and accepted if
    sft has the key chat_template, because the runs that start from sft inherit it."""
    talk = [{"role": "user", "content": "w1"}], [{"role": "assistant", "content": "w2"}]
    path = chain["sft"].dataset_name.replace("rows", "talk")
    with open(path, "w") as file:
        file.write(json.dumps({"prompt": talk[0], "completion": talk[1]}) + "\n")
    rto = replace(chain["rto"], dataset_name=path)
    with pytest.raises(ValueError, match=r"^rto: .*chat.?template"):
        check_chain(list((chain | {"rto": rto}).items()))
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    sft = replace(chain["sft"], chat_template=template)
    check_chain(list((chain | {"sft": sft, "rto": rto}).items()))


def test_the_stages_of_rlp_are_checked_as_runs_and_the_policy_waits_for_its_judge(chain, tmp_path):
    policy = PPOConfig(model_name_or_path=chain["sft"].output_dir, dataset_name="nowhere.jsonl", response_length=6)
    rlp = RLPConfig(output_dir=str(tmp_path / "rlp"))
    stages = rlp_stages(rlp, replace(chain["reward"], output_dir=""), policy)
    with pytest.raises(ValueError, match=r"^ppo: nowhere.jsonl: no such file"):
        check_chain([("sft", chain["sft"]), *stages])
    good = replace(policy, dataset_name=chain["sft"].dataset_name, columns="reference=completion")
    check_chain([("sft", chain["sft"]), *rlp_stages(rlp, chain["reward"], good)])
