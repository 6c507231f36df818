"""Tests of checkpoints of two processes: each process writes its part, any number of processes can resume, and errors
name damaged files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastrlhf.models.loading import load_policy, load_reward_model
from fastrlhf.models.shards import describe_tensors, exists, is_sharded, read_into, read_tensors, write_tensors
from fastrlhf.runtime.checkpoint import checkpoints, find_checkpoint
from tests.shard_ranks import Trained, same

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("shards")
    one = Trained(place / "one")
    one.step()
    one.checkpointer.save(1)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launcher, str(ROOT / "tests" / "shard_ranks.py"), str(place)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode, "the second process was not killed as planned"
    assert (place / "rank-1.json").exists(), ended.stderr[-4000:]
    return place


@pytest.fixture
def two(place, tmp_path):
    return Path(shutil.copytree(place / "two", tmp_path / "two"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The state of a run of a single process after one step."""
    trained = Trained(tmp_path_factory.mktemp("expected"))
    trained.step()
    return trained.state()


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_continue_from_two_or_one_bit_for_bit_without_gathering(place, rank):
    seen = json.loads((place / f"rank-{rank}.json").read_text())
    assert seen["gathers"] == 0
    assert seen["steps"] == [1, 1]
    assert (seen["resumed"], seen["from_one"], seen["next step"]) == (True, True, True)


def test_one_process_continues_from_two_bit_for_bit(two, expected):
    trained = Trained(two)
    assert trained.checkpointer.load() == 1
    assert same(trained.state(), expected)


def test_each_process_writes_half_and_no_pickle(place):
    for name, files_each in (("model", 1), ("value_model/model", 2), ("optimizer", 6)):
        folder = place / "two" / "checkpoint-1" / f"{name}.shards"
        files = [sorted(folder.glob(f"shard-0000{rank}-*")) for rank in (1, 2)]
        assert len(files[0]) == len(files[1]) == files_each
        sizes = [sum(x.nbytes for file in own for x in load_file(file).values()) for own in files]
        assert abs(sizes[0] - sizes[1]) < 0.05 * sum(sizes)
    files = [file for file in (place / "two" / "checkpoint-1").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja"}
    assert {file.name for file in files if not file.name.startswith("shard-")} >= {"random.safetensors", "state.json"}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_process_is_an_error_on_all_and_leaves_the_older_checkpoint(place, rank):
    seen = json.loads((place / f"rank-{rank}.json").read_text())
    assert seen["full"].startswith(f"{str(place / 'two' / 'checkpoint-2')!r} cannot be written: [Errno 27] File too")
    assert seen["left"] == ["checkpoint-1"]


def test_a_kill_of_one_process_while_it_saves_leaves_the_older_checkpoint(place, two):
    written = place / "two" / ".checkpoint-3.partial" / "model.shards" / "shard-00002-model-00001-of-00001.safetensors"
    assert (place / "written").read_text() == str(written)
    assert [path.name for path in checkpoints(two)] == ["checkpoint-1"]
    trained = Trained(two)
    assert trained.checkpointer.load() == 1
    trained.checkpointer.save(3)
    assert sorted(path.name for path in two.iterdir()) == ["checkpoint-1", "checkpoint-3"]
    assert Trained(two).checkpointer.load() == 3


@pytest.mark.parametrize(
    "part", ["model.shards/shard-00002", "value_model/model.shards/shard-00001", "optimizer.shards"]
)
@pytest.mark.parametrize("gone", [True, False])
def test_a_damaged_or_missing_part_is_named(two, part, gone):
    file = next(file for file in (two / "checkpoint-1").rglob("*.safetensors") if part in str(file))
    if gone:
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-5] ^= 4
        file.write_bytes(content)
    told = "is missing" if gone else "has changed since it was written: its hash differs"
    name = file.relative_to(two / "checkpoint-1").as_posix()
    with pytest.raises(ValueError, match=f"no checkpoint in .* is whole .checkpoint-1: {name} {told}"):
        Trained(two).checkpointer.load()
    if part == "optimizer.shards":
        assert Trained(two).checkpointer.load(weights_only=True) == 1
    else:
        with pytest.raises(ValueError, match=f"{name} {told}"):
            find_checkpoint(two, weights_only=True)


def test_it_loads_as_a_model_with_the_numbers_that_were_saved(two, expected):
    policy = load_policy(str(two / "checkpoint-1"), dtype="bfloat16").state_dict()
    critic = load_reward_model(str(two / "checkpoint-1" / "value_model"), pad_token_id=0, must_be_trained=True)
    for at, found in (("", policy), ("value_model", critic.state_dict())):
        assert all(torch.equal(found[name], expected[f"{at}/{name}"]) for name in found)


@pytest.mark.parametrize(("part", "told"), [(1, "cannot be loaded: .* lacks a part"), (2, "lacks the weights")])
def test_a_model_without_one_of_its_parts_is_refused(two, part, told):
    (two / "checkpoint-1" / "model.shards" / f"shard-0000{part}-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=f"^model_name_or_path: .*{told}"):
        load_policy(str(two / "checkpoint-1"))


def test_one_process_writes_one_file_and_reads_only_what_is_needed(tmp_path):
    tensors = {"a": torch.arange(6.0).view(3, 2).t(), "step": torch.tensor(3.0), "bytes": torch.arange(3).byte()}
    write_tensors(tmp_path / "x", tensors)
    write_tensors(tmp_path / "none", {})
    write_tensors(tmp_path / "beside", {"a": torch.zeros(1)})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["beside.safetensors", "x.safetensors"]
    assert (exists(tmp_path / "x"), exists(tmp_path / "none"), is_sharded(tmp_path / "x")) == (True, False, False)
    assert describe_tensors(tmp_path / "x") == {name: (x.dtype, x.shape) for name, x in tensors.items()}
    assert same(read_tensors(tmp_path / "x"), tensors)
    room = {"step": torch.zeros(())}
    read_into(tmp_path / "x", room)
    assert room["step"] == 3.0
    with pytest.raises(RuntimeError, match="Missing key"):
        read_into(tmp_path / "x", {"b": torch.zeros(1)})
