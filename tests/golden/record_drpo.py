"""Runs the lines of DR-PO's released code (Cornell-RL/drpo, commit bd825df, src/tldr/drpo.py) that turn rollouts into
rewards, advantages and losses, on tiny models, and writes the numbers to drpo.json for tests/test_drpo_golden.py.

The rollouts are written out below: resets of different lengths, tokens after the EOS, an EOS in the last place, and
responses without EOS. The lines are read from a checkout of the released code, which is needed only here:

    PYTHONPATH=.:kernels DRPO_REPO=../drpo python tests/golden/record_drpo.py
"""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests import tiny
from tests.golden import record_trl as shared

FILE = Path(__file__).with_name("drpo.json")

ROLLOUTS = [  # prompt, response of 6 tokens, number of its tokens that a reset copied
    ([5, 9, 14], [7, 12, 20, 1, 8, 30], 2),
    ([22, 4], [16, 3, 3, 25, 11, 6], 3),
    ([13, 13, 8, 27], [9, 28, 1, 17, 17, 5], 0),
    ([31, 10], [6, 21, 15, 4, 19, 1], 4),
    ([18, 7, 7, 24, 3], [29, 1, 12, 23, 26, 9], 1),
    ([11, 30, 6], [14, 18, 10, 22, 5, 27], 0),
]
RESPONSE_LENGTH, TEMPERATURE, PENALTY, KL_COEF = 6, 0.7, -1.5, 0.1
GAMMA, LAM, CLIP, CLIP_VALUE, VF_COEF = 0.95, 0.9, 0.1, 0.05, 0.2
NUM_EPOCHS, LEARNING_RATE = 2, 0.02  # for plain SGD; some ratios are clipped in the second epoch


def rows_of(model: PreTrainedModel, read: Any) -> Tensor:
    """Returns the outputs of `read` at the position before each response token, [N, 6], computed one sequence at a
    time."""
    found = []
    for prompt, response, _ in ROLLOUTS:
        ids = torch.tensor([[*prompt, *response]])
        found.append(read(model, ids, torch.tensor(response))[len(prompt) - 1 : -1])
    return torch.stack(found)


def log_probs(model: PreTrainedModel, ids: Tensor, response: Tensor) -> Tensor:
    logits = model(ids).logits[0, :-1] / (TEMPERATURE + 1e-7)
    picked = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return torch.cat([picked, picked[-1:]])


def values_of(model: PreTrainedModel, ids: Tensor, response: Tensor) -> Tensor:
    hidden = model.base_model(ids).last_hidden_state
    return model.score(hidden)[0, :, 0]


def block(source: str, start: str, stop: str) -> str:
    """Returns the part of the released code from the first occurrence of `start` up to the next occurrence of
    `stop`."""
    begin = source.index(start)
    return textwrap.dedent(source[begin : source.index(stop, begin)])


def main() -> None:
    source = Path(os.environ["DRPO_REPO"], "src", "tldr", "drpo.py").read_text(encoding="utf-8")
    torch.set_num_threads(1)
    policy, reference = shared.causal_lm(shared.POLICY), shared.causal_lm(shared.REFERENCE)
    reward_model, critic = shared.reward_model(), shared.reward_model()
    responses = torch.tensor([response for _, response, _ in ROLLOUTS])
    ends = [response.index(tiny.EOS) if tiny.EOS in response else RESPONSE_LENGTH - 1 for _, response, _ in ROLLOUTS]
    cut = torch.arange(RESPONSE_LENGTH) > torch.tensor(ends)[:, None]
    with torch.no_grad():
        scores = []
        for (prompt, response, _), end in zip(ROLLOUTS, ends, strict=True):
            ids = torch.tensor([[*prompt, *response[: end + 1]]])
            scores.append(values_of(reward_model, ids, responses[0])[-1])
        args = SimpleNamespace(
            task=SimpleNamespace(penalty_reward_value=PENALTY, response_length=RESPONSE_LENGTH),
            ppo=SimpleNamespace(
                whiten_rewards=True, gamma=GAMMA, lam=LAM, cliprange=CLIP, cliprange_value=CLIP_VALUE, vf_coef=VF_COEF
            ),
        )
        names: dict[str, Any] = {
            "torch": torch, "args": args, "tokenizer": SimpleNamespace(pad_token_id=0),
            "accelerator": SimpleNamespace(device="cpu"), "kl_ctl": SimpleNamespace(value=KL_COEF),
            "logprobs": rows_of(policy, log_probs), "ref_logprobs": rows_of(reference, log_probs),
            "values": rows_of(critic, values_of), "scores": torch.stack(scores),
            "sequence_lengths": torch.tensor(ends), "postprocessed_responses": responses.masked_fill(cut, 0),
        }  # fmt: skip
        exec(block(source, "def whiten(", "\n\n\n"), names)
        exec(block(source, "            contain_pad_token =", '            accelerator.print(f"{scores=}'), names)
        exec(block(source, "            # 4. compute rewards", "            return_mean, return_var"), names)
    kept = {name: names[name].tolist() for name in ("logprobs", "values", "scores", "advantages", "returns")}
    copied = torch.tensor([num for *_, num in ROLLOUTS])
    names |= {
        "mb_return": names["returns"], "mb_advantage": names["advantages"], "mb_values": names["values"],
        "mb_logprobs": names["logprobs"], "mb_rollin_masks": torch.arange(RESPONSE_LENGTH) >= copied[:, None],
    }  # fmt: skip
    steps = []
    optimizer = torch.optim.SGD([*policy.parameters(), *critic.parameters()], lr=LEARNING_RATE)
    loss = block(source, "                        vpredclipped =", "                        accelerator.backward(loss)")
    for _ in range(NUM_EPOCHS):
        names |= {"new_logprobs": rows_of(policy, log_probs), "vpred": rows_of(critic, values_of)}
        exec(loss, names)
        names["loss"].backward()
        losses = {"policy": names["pg_loss"].item(), "value": names["vf_loss"].item()}
        gradients = {"policy": shared.gradients_of(policy), "critic": shared.gradients_of(critic)}
        steps.append({"loss": losses, **gradients})
        optimizer.step()
        optimizer.zero_grad()
    FILE.write_text(json.dumps(shared.rounded({**kept, "steps": steps}), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
