"""Compares runs of 20 optimiser steps of a tiny Qwen3 with runs of TRL 1.16 recorded by tests/golden/record_trl.py.

IPO over sums, which TRL does not have, is compared with a plain loop.

From the second step on, loss and gradient norm depend on clipping, AdamW, weight decay and the schedule. TRL sums
two padded batches of three. Here the six rows are packed and split by tokens, so sums have a different order, which
changes these numbers by less than 2e-6, relatively. Not compared, because they differ from TRL:

    order of the data    each library has its own shuffle; TRL gets the rows in our order
    warm-up              TRL's first step has rate 0 and trains nothing; our n steps have 1/(n+1) ... n/(n+1) of it
    precision            TRL's default is autocast to bfloat16; our default is the dtype of the weights, float32
    dropout              always off here; TRL's SFT keeps the model's setting
    epochs               TRL's default is 3; ours is 3 for SFT, and 1 for reward models and DPO
    a new score head     drawn from N(0, 1/sqrt(D + 1)) (arXiv 2009.01325); TRL uses transformers' default
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.reward_model import train_reward_model
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import DPOConfig, RewardConfig, SFTConfig
from fastrlhf.runtime.optim import index_batches
from tests import tiny
from tests.golden import record_trl as recorded

GOLDEN = json.loads(recorded.FILE.read_text(encoding="utf-8"))
TOLERANCE = 1e-5
LOCAL = {"micro_batch_tokens": 40, "progress": False}  # a batch has 55 tokens or more


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    models = {"policy": recorded.causal_lm(recorded.POLICY, "qwen3"), "reward": recorded.reward_model("qwen3")}
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in models}
    for name, model in models.items():
        model.save_pretrained(folders[name])
        tiny.tokenizer().save_pretrained(folders[name])
    return folders


def history_of(paths, case):
    settings = recorded.RUN | recorded.RUNS[case] | LOCAL
    if case == "sft_run":
        config = SFTConfig(model_name_or_path=paths["policy"], response="chosen", **settings)
        return train_sft(config, recorded.RUN_EXAMPLES).history
    if case == "reward_run":
        config = RewardConfig(model_name_or_path=paths["reward"], **settings)
        return train_reward_model(config, recorded.RUN_EXAMPLES).history
    return train_dpo(DPOConfig(model_name_or_path=paths["policy"], **settings), recorded.RUN_EXAMPLES).history


def assert_same_steps(history, expected):
    for name, values in expected.items():
        assert [row[name] for row in history] == pytest.approx(values, rel=TOLERANCE), name


@pytest.mark.parametrize("case", recorded.RUNS)
def test_every_step_of_a_run_is_that_of_trl(paths, case):
    golden = {name: GOLDEN[case][name] for name in ("loss", "grad_norm", "learning_rate")}
    assert len(golden["loss"]) == recorded.RUN["max_steps"]
    assert max(golden["grad_norm"]) > recorded.RUN["max_grad_norm"]  # gradients are clipped in some steps
    assert golden["loss"][-1] < 0.7 * golden["loss"][0]
    assert_same_steps(history_of(paths, case), golden)


def response_logprob(model, prompt: str, response: str):
    """Returns the sum of the log-probs of a response and its EOS, a scalar, computed from full logits."""
    target = torch.tensor([*tiny.ids(response), tiny.EOS])
    ids = torch.cat([torch.tensor(tiny.ids(prompt)), target])
    logprobs = model(ids[None]).logits[0, -len(target) - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, target[:, None]).sum()


def test_a_run_of_ipo_over_sums_follows_the_definition_of_openrlhf(paths):
    """The loss is (log pi(y_w) - log pi(y_l) - (log pi_ref(y_w) - log pi_ref(y_l)) - 1 / (2 beta))^2 with log-probs of
    whole responses (arXiv 2310.12036, eq. 17), averaged over pairs. The plain loop takes one response at a time,
    without accumulation."""
    beta, steps, batch_size = 0.05, 5, 6
    settings = recorded.RUN | LOCAL | {"max_steps": steps, "lr_scheduler_type": "constant"}
    config = DPOConfig(model_name_or_path=paths["policy"], loss_type="ipo", length_norm="sum", beta=beta, **settings)
    history = train_dpo(config, recorded.RUN_EXAMPLES).history

    policy, reference = (AutoModelForCausalLM.from_pretrained(paths["policy"]) for _ in range(2))
    groups = [
        {"params": [param for param in policy.parameters() if param.ndim == dimensions], "weight_decay": decay}
        for dimensions, decay in ((2, recorded.RUN["weight_decay"]), (1, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=recorded.RUN["learning_rate"])
    losses, norms = [], []
    for indices in index_batches(len(recorded.RUN_EXAMPLES), batch_size, steps, recorded.RUN["seed"]):
        errors = []
        for row in (recorded.RUN_EXAMPLES[index] for index in indices):
            chosen, rejected = (response_logprob(policy, row.prompt, y) for y in (row.chosen, row.rejected))
            with torch.no_grad():
                aims = [response_logprob(reference, row.prompt, y) for y in (row.chosen, row.rejected)]
            errors.append((chosen - rejected) - (aims[0] - aims[1]) - 1 / (2 * beta))
        loss = torch.stack(errors).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), recorded.RUN["max_grad_norm"]).item())
        optimizer.step()
        losses.append(loss.item())
    assert_same_steps(history, {"loss": losses, "grad_norm": norms})
