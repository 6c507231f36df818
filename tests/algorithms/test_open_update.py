import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastrlhf.algorithms.open_update import OpenUpdate
from fastrlhf.types import Experience, Prefix, Rollout
from fastrlhf_kernels import Sum


def opened(truncated: bool = False) -> OpenUpdate:
    mask = torch.tensor([True, True, False])
    experience = Experience(
        cu_rows=torch.tensor([0, 1, 3], dtype=torch.int32),
        mask=mask,
        trained=mask,  # equals `mask`, as in runs without mask_truncated_completions
        sampler_logprob=torch.tensor([-0.1, -1 / 3, -2.0]),
        reference_logprob=torch.tensor([-0.5, -1.0, -1.5]),
        advantage=torch.tensor([1.0, -1.0, 0.1]),
        kl_coef=0.05,
        rewards={"score": torch.tensor([0.0, 0.0, 1.0]), "my.reward": torch.tensor([0.25, 0.5, 0.0])},
    )
    prefix = Prefix(token_ids=[7, 8, 1], num_reset=1, reset_depth=0.5, row=3, episode=9)
    rollouts = [
        Rollout(prefix=prefix, completion=[4], sampler_logprob=[-0.1], ended=False),
        Rollout(prefix=prefix, completion=[5, 0], sampler_logprob=[-1 / 3, -2.0], ended=True),
    ]
    if truncated:
        sets = iter(np.array(ids, dtype=np.int32) for ids in ([4], [2, 5, 6], [0, 3]))
        rollouts = [replace(rollout, kept=[next(sets) for _ in rollout.completion]) for rollout in rollouts]
    update = OpenUpdate()
    update.begin(rollouts, experience, {"objective/kl": 1 / 7}, [{"row": 3, "score": 0.5}])
    update.steps.append({"learning_rate": 1e-3, "grad_norm": 2.0})
    update.totals["policy"].add({"tokens": Sum(torch.tensor(3.0)), "loss": Sum(torch.tensor(1 / 3))})
    return update


def through_files(state, folder):
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    save_file(tensors, folder / "update.safetensors")
    rest = json.loads(json.dumps({key: value for key, value in state.items() if key not in tensors}))
    return rest | load_file(folder / "update.safetensors")


@pytest.mark.parametrize("truncated", [False, True])
def test_an_update_is_continued_from_the_files_of_a_checkpoint_bit_for_bit(tmp_path, truncated):
    before, after = opened(truncated), OpenUpdate()
    after.load_state_dict(through_files(before.state_dict(), tmp_path))
    assert after.rollouts == before.rollouts
    kept = [[[*map(int, ids)] for ids in rollout.kept or ()] for rollout in after.rollouts]
    assert kept == ([[[4]], [[2, 5, 6], [0, 3]]] if truncated else [[], []])
    assert (after.metrics, after.samples, after.steps) == (before.metrics, before.samples, before.steps)
    assert after.totals["policy"].means("tokens") == before.totals["policy"].means("tokens")
    assert before.experience is not None
    assert after.experience is not None
    for field in fields(Experience):
        ours, theirs = (getattr(one.experience, field.name) for one in (before, after))
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype
        elif field.name == "rewards":
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        else:
            assert ours == theirs


def test_between_two_updates_there_is_nothing_to_save_and_without_tensors_nothing_to_continue(tmp_path):
    update = opened()
    state = update.state_dict()
    update.end()
    assert update.state_dict() == {}
    update.load_state_dict({key: value for key, value in state.items() if not isinstance(value, torch.Tensor)})
    assert update.experience is None
    update.load_state_dict(state)
    assert update.experience is not None
    update.load_state_dict({})
    assert update.experience is None
