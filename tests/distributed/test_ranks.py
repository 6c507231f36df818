"""Compares runs of two processes under torchrun, on a CPU, with runs of a single process: losses, weights and files
must be equal."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bench.models.checks import write_model
from bench.models.configs import tiny_config
from fastrlhf import cli
from fastrlhf.algorithms import ppo
from fastrlhf.config import PPOConfig, SFTConfig
from fastrlhf.data.packing import own_micro_batches
from fastrlhf.distributed.ranks import on_each, on_first, start, world_size
from fastrlhf.models.sharding import _layers
from fastrlhf.runtime.inputs import open_inputs
from fastrlhf.runtime.metrics import read_metrics
from tests import ranks, resumable, tiny
from tests.cut_ranks import CUTS

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ROUNDING = ("sampling/",)
"""Prefixes of the names of metrics that are 0 up to rounding errors."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all finished runs: runs of two processes are in `two`, runs of a single process in `one`."""
    place = tmp_path_factory.mktemp("ranks")
    resumable.save_models(place)
    for family in ranks.FAMILIES:
        write_model(family, place / family, vocab_size=tiny.VOCAB)
        tiny.tokenizer().save_pretrained(place / family)
    examples = tiny.examples(11)
    rows = {
        "rows": [{"prompt": x.prompt, "completion": x.reference} for x in examples],
        "pairs": [{"prompt": x.prompt, "chosen": x.chosen, "rejected": x.rejected} for x in examples],
    }
    for name, content in rows.items():
        (place / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in content))
    with (place / "stdout").open("w") as stdout, (place / "stderr").open("w") as stderr:
        child = subprocess.Popen(
            [*TORCHRUN, str(ROOT / "tests" / "ranks.py"), str(place)],
            env=ENVIRONMENT,
            stdout=stdout,
            stderr=stderr,
        )
        try:
            for kind in ranks.SETTINGS:
                ranks.run(kind, place, place / "one" / kind)
            assert cli.main(ranks.command(place, place / "one" / "command")) == 0
            code = child.wait(timeout=300)
        finally:
            child.kill()
    assert code == 0, (place / "stderr").read_text()[-4000:]
    return place


def seen(place: Path) -> list[dict]:
    return [json.loads((place / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.relative_to(folder)}/{name}": tensor
        for file in sorted(folder.glob("**/*model.safetensors"))
        if "checkpoint" not in str(file)
        for name, tensor in load_file(file).items()
    }


def assert_same_run(one: Path, two: Path) -> None:
    """Logs and weights must agree within 1e-5; they differ only in the order in which micro-batches are summed."""
    log, other = read_metrics(one / "metrics.jsonl"), read_metrics(two / "metrics.jsonl")
    assert [row["step"] for row in log][-2:] == [1, 2]
    assert len(log) == len(other)
    for row, same in zip(map(resumable.untimed, log), map(resumable.untimed, other), strict=True):
        assert row.keys() == same.keys()
        for name in (name for name in row if not name.startswith(ROUNDING)):
            assert math.isclose(row[name], same[name], rel_tol=1e-5, abs_tol=2e-6), (row["step"], name, row, same)
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-5 * tensor.abs().max().item(), msg=name)


@pytest.mark.parametrize("kind", [*ranks.SETTINGS, "command", "chain"])
def test_two_processes_train_as_one(place, kind):
    assert_same_run(place / "one" / kind, place / "two" / kind)


def test_layers_at_any_depth_are_groups():
    for kind, name in (("gemma3", "language_model.layers"), ("opt", "decoder.layers"), ("mixtral", "layers")):
        with torch.device("meta"):
            backbone = AutoModelForCausalLM.from_config(tiny_config(kind)).base_model
        assert {*backbone.get_submodule(name)} <= {*_layers(backbone)}
        assert not any(module in _layers(backbone) for layer in _layers(backbone) for module in layer.children())


def test_training_moved_the_weights(place):
    before, after = weights(place / "policy"), weights(place / "two" / "sft")
    moved = [(a - b).abs().max().item() for a, b in zip(before.values(), after.values(), strict=True)]
    assert min(moved) > 1e-3  # if no weight changed, any two runs would agree


def test_only_rank_0_writes_and_prints(place):
    assert (place / "stdout").read_text().count("saved in") == 2  # once by SFT and once by DPO
    files = {path.name for path in (place / "two" / "command").iterdir()}
    assert files == {path.name for path in (place / "one" / "command").iterdir()}
    # The head is tied to the embedding, so it is not saved separately
    assert "lm_head.weight" not in load_file(place / "two" / "command" / "model.safetensors")


def test_only_rank_0_uploads_to_the_hub(place):
    requests = [
        *("POST /api/repos/create", "GET /api/models/ada/two/auth-check/write"),
        *("POST /api/repos/create", "POST /api/models/ada/two/preupload/main", "POST /api/models/ada/two/commit/main"),
    ]
    assert [rank["pushed"] for rank in seen(place)] == [requests, requests]


def test_a_signal_to_one_process_stops_all_and_the_run_resumes_bit_for_bit(place):
    assert [rank["interrupted"] for rank in seen(place)] == [True, True]
    whole, resumed = place / "two" / "ppo", place / "two" / "ppo-resumed"
    # Each of two processes writes one file of weights and one of moments
    assert len(list((resumed / "checkpoint-1").glob("*.shards/shard-*"))) == 4
    assert resumable.untimed_log(whole) == resumable.untimed_log(resumed)


@pytest.mark.parametrize("part", CUTS)
def test_a_signal_within_a_step_stops_all_processes_and_the_run_resumes_bit_for_bit(place, part):
    """The signal comes during a rollout, during a judge that only rank 0 calls, during the scoring of the first of
    several packs, and between two mini-batches. Checkpoints do not hold the hidden states of the reference."""
    kind = CUTS[part][0]
    folder = place / "two" / f"{kind} cut in the {part}"
    said = f"interrupted in step 2; step 1 is saved as {folder / 'checkpoint-1'}"
    messages, calls = zip(*(rank["cuts"][part] for rank in seen(place)), strict=True)
    assert messages == (said, said)
    if part == "scoring":
        assert [second for _, second in calls] == [1, 1]
        assert all(first > 1 for first, _ in calls)
    assert resumable.untimed_log(folder) == resumable.untimed_log(place / "two" / kind)
    state = json.loads((folder / "checkpoint-1" / "state.json").read_text())
    assert ("update" in state["parts"]) == part.startswith("update")
    if part.startswith("update"):
        saved = load_file(folder / "checkpoint-1" / "update.safetensors")
        assert "experience.advantage" in saved
        assert not any("reference_" in name and "logprob" not in name for name in saved)


def test_a_signal_to_one_process_after_the_last_step_ends_all_with_a_finished_run(place):
    folder = place / "two" / "sft finished"
    said = f"interrupted after the last step; the trained model is in {folder}; finished: True"
    assert [rank["finished"] for rank in seen(place)] == [said, said]
    assert not (folder / ".lock").exists()
    assert resumable.untimed_log(folder) == resumable.untimed_log(place / "two" / "sft")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "seed",
            "seed: the configuration of rank 1 on HOST is 43, but that of rank 0 on HOST is 42; start every process",
        ),
        ("key", "learning_rate: the configuration of rank 1 on HOST is 0.5, but that of rank 0 on HOST is 0.25; "),
        (
            "other rows",
            "train: the dataset of rank 1 on HOST is '10 rows of hash ID', but that of rank 0 on HOST is '10 ",
        ),
        (
            "fewer rows",
            "train: the dataset of rank 1 on HOST is '9 rows of hash ID', but that of rank 0 on HOST is '10 ",
        ),
        (
            "weights",
            "model 0 (LlamaForCausalLM from policy): the starting weights of rank 1 on HOST is 'ID', but that ",
        ),
        ("versions", "fastrlhf: the version of rank 1 on HOST is '9.9', but that of rank 0 on HOST is "),
        ("no reference", "train: row 0 has no reference; remove the row or add the field"),
    ],
)
def test_ranks_that_were_given_different_things_are_refused_on_every_rank(place, case, message):
    told = [rank["differences"][case] for rank in seen(place)]
    assert told[0] == told[1]
    pattern = re.escape(message).replace("HOST", r"\S+").replace("ID", r"\w+")
    assert re.match(pattern, told[0]), told[0]
    assert not (place / "two" / case).exists()


def test_an_error_that_every_rank_has_raised_is_rescued_and_the_run_ends_alike(place):
    folder = place / "two" / "drpo-resumed"
    note = f"saved as {folder / 'checkpoint-1'}; the same command continues"
    assert [rank["rescued"] for rank in seen(place)] == [[note], [note]]
    assert resumable.untimed_log(folder) == resumable.untimed_log(place / "two" / "drpo")


def test_one_process_continues_from_a_checkpoint_of_two(place):
    ranks.run("ppo", place, place / "one" / "ppo-resumed")
    assert_same_run(place / "one" / "ppo-resumed", place / "two" / "ppo")


def test_exchanges_between_processes(place):
    for rank, told in enumerate(rank["exchanges"] for rank in seen(place)):
        assert told == {
            "gathered": [0.0, 0.0, 1.0, 1.0, 1.0],
            "total": [1.0, 1.0],
            "largest": [1.0, 1.0],
            "untouched": [float(rank)] * (rank + 2),
            "from_all": [0, 1],
            "on_first": 0,
            "told": "integer division or modulo by zero",
            "on_each": [0, 1],
            "told_by_second": "integer division or modulo by zero",
            "strange": "Stubborn: of a judge",
            "share": [[0, 1], [2, 3, 4]][rank],
        }


@pytest.mark.parametrize("name", ["model", "limited"])
def test_each_process_holds_its_part_of_the_weights_and_sums_the_gradients(place, name):
    first, second = (rank[name] for rank in seen(place))
    assert first["held"] + second["held"] == first["all"]
    assert abs(first["held"] - second["held"]) < 0.05 * first["all"]
    for model in (first, second):
        assert model["whole"] == model["filled"] == 0.0
        assert model["begins"]
        assert max(model["logprob"], model["kl"]) < 1e-5
        assert (model["unlimited"] > 1e-4) == (name == "limited")
        assert model["kept"] > 0 == model["left"]
        assert model["gradient"] < 1e-5


def test_rows_stay_on_their_rank_and_only_needed_ones_are_sent(place):
    """Rank 0 holds 3 rows of 8 bytes, rank 1 holds 4. The ranks need their own rows, all rows of the other rank, and
    one row of each."""
    expected = [{"wrong": [0, 0, 0], "sent": sent} for sent in ([None, [0, 3], [1, 1]], [None, [4, 0], [1, 1]])]
    assert [each["spread"] for each in seen(place)] == expected


def test_each_rank_holds_the_reference_states_of_its_own_episodes_only(place):
    """The ranks hold parts of the rows in both steps of a run with an exact KL. They exchange states only before the
    mini-batches of the second pass, which are drawn anew, and sum no tensor of all states."""
    first, second = (each["states"] for each in seen(place))
    assert len(first["held"]) == len(second["held"]) == 2
    for (ours, rows), (theirs, same) in zip(first["held"], second["held"], strict=True):
        assert rows == same == ours + theirs
        assert max(ours, theirs) <= 0.7 * rows
    assert 0 < len(first["moved"]) == len(second["moved"]) <= 4
    assert max(first["summed"] + second["summed"]) <= max(rows for _, rows in first["held"])


def test_each_process_loads_its_parts_bit_for_bit(place):
    expected = {"whole": [], "fingerprint": True, "different": [], "logprob": 0.0}
    for rank in (0, 1):
        assert seen(place)[rank]["parts"] == dict.fromkeys(("policy", *ranks.FAMILIES), expected)


def test_rank_0_tokenises_and_the_other_ranks_map_its_rows(place):
    first, second = (each["stored"] for each in seen(place))
    assert (first["calls"], second["calls"]) == ([2, 0], [0, 0])  # training rows and held-out rows
    assert first["rows"] == second["rows"] == [9, 9]
    assert first["hash"][0] == first["hash"][1] == second["hash"][0] == second["hash"][1]


def test_processes_continue_a_stopped_pass_of_the_reference_bit_for_bit(place):
    """Each of the ranks has two packs and stops in the second. Only the second is computed again."""
    assert [rank["pass"] for rank in seen(place)] == [[2, 1], [2, 1]]
    assert resumable.untimed_log(place / "two" / "dpo stopped") == resumable.untimed_log(place / "two" / "dpo")


def test_processes_sample_at_their_own_pace_and_share_errors(place):
    expected = {"five": True, "one": True, "error": "of rank 1", "held": 0}
    assert [each["paces"] for each in seen(place)] == [expected, expected]


def test_sharded_models_share_their_base_and_an_adapter_belongs_to_one_of_them(place):
    for shared in (rank["shared"] for rank in seen(place)):
        assert shared["others"] == 0
        assert shared["adds"] > 0.1 > 1e-5 > max(shared["merged"], shared["kept"])


def test_compiled_layers_are_sharded_and_compiled_once_for_packs_of_all_lengths(place):
    for compiled in (rank["compiled"] for rank in seen(place)):
        assert compiled["gradient"] < 1e-5
        assert compiled["first"] > 0 == compiled["second"]


@pytest.mark.parametrize("name", ranks.OPTIMIZERS)
def test_an_update_of_sharded_weights_is_that_of_whole_ones_bit_for_bit(place, name):
    if not ranks.installed(ranks.OPTIMIZERS[name]):
        pytest.skip("needs bitsandbytes: pip install 'fastrlhf[bnb]'")
    assert [rank["optimised"][name] for rank in seen(place)] == [True, True]


def test_rounding_noise_depends_on_the_position_in_the_full_weight(place):
    assert [rank["uneven"] for rank in seen(place)] == [True, True]


@pytest.mark.skipif(
    not ranks.installed({"optim": "adamw_8bit"}), reason="needs bitsandbytes: pip install 'fastrlhf[bnb]'"
)
def test_parts_that_cut_a_block_of_8_bit_moments_are_refused(place):
    told = "optim: must be of 32 bits: 2 processes hold 4160 entries each of a weight of the shape [129, 64], not whole"
    assert all(rank["blocks"].startswith(told) for rank in seen(place))


def test_an_error_of_all_processes_is_printed_once():
    command = [*TORCHRUN, "-m", "fastrlhf", "sft", "--learning_rate", "-1"]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode != 0
    assert ended.stderr.count("fastrlhf sft: learning_rate: must be above 0; got -1.0") == 1, ended.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_other_ranks_report_an_error_after_rank_0_has_ended(monkeypatch, capsys, rank):
    slept = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", str(rank))
    assert cli.main(["sft", "--learning_rate", "-1"]) == 2
    assert slept == [cli.PATIENCE] * rank
    assert capsys.readouterr().err.startswith("fastrlhf sft: learning_rate: must be ")


def test_a_single_process_holds_everything():
    assert world_size() == 1
    assert on_first(lambda: 3) == 3
    assert on_each(lambda: 3) == [3]
    assert own_micro_batches([4, 4, 4], 8) == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_peft": True, "load_in_4bit": True}, "load_in_4bit: must be False in 2 processes"),
        ({"train_batch_size": 3}, "train_batch_size: must be a multiple of the 2 processes; got 3"),
        ({"device": "cuda:1"}, "device: must be auto, cpu or cuda in 2 processes"),
    ],
)
def test_what_two_processes_cannot_do_is_refused_before_anything_is_read(monkeypatch, settings, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=message):
        open_inputs(SFTConfig(model_name_or_path="nowhere", **settings), ["reference"], None, None)
    with pytest.raises(ValueError, match=message):
        start(SFTConfig(**settings))


@pytest.mark.parametrize(
    ("local", "message"),
    [
        (None, "WORLD_SIZE: must be 1, or set by torchrun"),
        ("4", "WORLD_SIZE: must be 4 processes on this machine at most"),
    ],
)
def test_each_process_needs_its_own_gpu(monkeypatch, local, message):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local:
        monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=message):
        start(SFTConfig(per_device_train_batch_size=8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_mini_batches": 4}, "num_mini_batches: must be such that the 1 trees of a mini-batch"),
        ({"num_generations": 4, "num_mini_batches": 1}, "num_mini_batches: must be such that the 1 trees"),
        ({"engine": "vllm", "vllm_devices": (1,)}, "vllm_devices: must be empty in 2 processes, each of which has"),
        ({"compat": "reference"}, "compat: must be fixed in 2 processes"),
        ({"decode": "cuda_graph"}, "decode: must be eager in 2 processes"),
    ],
)
def test_an_update_that_two_processes_cannot_share_is_refused(monkeypatch, settings, message):
    monkeypatch.setattr(ppo, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=message):
        ppo._check_ranks(PPOConfig(per_device_train_batch_size=4, **settings))
    ppo._check_ranks(PPOConfig(per_device_train_batch_size=4, num_generations=4, share_trunks=False))
