"""Tests of the trainers on a CUDA device (`pytest -m gpu`): packed attention isolates sequences, and every stage runs
in both dtypes."""

import pytest
import torch

from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.reward_model import train_reward_model
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import DPOConfig, DRPOConfig, RewardConfig, SFTConfig
from fastrlhf.data.packing import pack
from fastrlhf.models import loading
from fastrlhf.models.forward import enable_activation_checkpointing, token_logprobs
from fastrlhf.models.layers import LayerOptions, prepare_layers
from fastrlhf.models.offload import HOST
from fastrlhf.models.probe import check_packed_forward
from fastrlhf.types import Segment
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
CUDA = torch.device("cuda")
DTYPES = ["float32", "bfloat16"]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"attn_implementation": "flash_attention_2"}, "bfloat16"),
        ({"attn_implementation": "flash_attention_3"}, "bfloat16"),
        ({"attn_implementation": "flash_attention_4"}, "bfloat16"),
        ({"attn_implementation": "varlen"}, "bfloat16"),
        ({"attn_implementation": "flex"}, "bfloat16"),
        ({"attn_implementation": "flex"}, "float32"),
        ({"torch_compile": True}, "float32"),
        ({"torch_compile": True}, "bfloat16"),
        ({"use_liger_kernel": True}, "float32"),
        ({"use_liger_kernel": True}, "bfloat16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_every_way_through_the_trunk_gives_the_log_probs_and_gradients_of_the_plain_one(name, options, dtype):
    plain, model = (tiny.policy(name).to(CUDA, getattr(torch, dtype)) for _ in range(2))
    try:
        prepare_layers(model, LayerOptions(**options))
    except ValueError as refused:
        if "not installed" in str(refused) or "compute capability" in str(refused) or "soft-capping" in str(refused):
            pytest.skip(str(refused))
        raise
    prepare_layers(plain, LayerOptions(attn_implementation="sdpa"))
    trunk = Segment(token_ids=[5, 6, 7, 8, 9, 10, 11])
    branches = [Segment(token_ids=[14, 15], num_scored=2, parent=0, cut=cut) for cut in (7, 3)]
    batch = pack([trunk, *branches, Segment(token_ids=list(range(3, 30)), num_scored=26)], CUDA)
    results = []
    for one in (model, plain):
        logprob = token_logprobs(one, batch).logprob
        logprob.sum().backward()
        results.append([logprob.detach(), *[p.grad for p in one.parameters() if p.grad is not None]])
    tolerance = 1e-3 if dtype == "float32" else 0.1  # relative to the largest entry
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() <= tolerance * expected.abs().max() + 1e-6


def test_offloaded_inputs_give_their_memory_back_and_change_no_number():
    """Runs packs of many lengths, because a race between copy and computation affects the results only sometimes."""
    config = tiny.model_config()
    config.num_hidden_layers, config.hidden_size = 12, 256
    kept, offloaded = (
        loading.build_policy(config, vocab_size=tiny.VOCAB, eos_token_id=tiny.EOS, seed=0, device=CUDA)
        for _ in range(2)
    )
    enable_activation_checkpointing(kept)
    enable_activation_checkpointing(offloaded, offload_to=HOST)
    for num in (64, 1, 33, *range(50, 64), 64):
        batch = pack([Segment(token_ids=[3 + i % 20 for i in range(100)], num_scored=99)] * num, CUDA)
        results, between, peak = [], [], []
        for model in (kept, offloaded):
            model.zero_grad()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            logprob = token_logprobs(model, batch).logprob
            between.append(torch.cuda.memory_allocated() - before)
            logprob.sum().backward()
            peak.append(torch.cuda.max_memory_allocated() - before)
            results.append([logprob.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
        inputs = batch.num_tokens * 256 * 4
        assert between[0] - between[1] >= 0.95 * 11 * inputs  # 11 of the 12 layer inputs; the last one is not offloaded
        if num >= 50:  # for smaller packs gradients dominate the memory
            assert peak[0] - peak[1] >= 0.95 * 9 * inputs  # while one input is in use, the next is being copied back
        for found, expected in zip(*results, strict=True):  # atomic adds sum gradients in no fixed order
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@torch.no_grad()
def test_a_forest_gives_the_log_probs_that_float64_gives_one_by_one(name: str, dtype: str):
    """Compares with float64 results of a CPU, which runs every path through the forest as a separate sequence."""
    model = tiny.policy(name)
    trunk, branch, other = [5, 6, 7, 8, 9, 10, 11], [14, 15], [20, 21, 22, 23, 24]
    segments = [
        Segment(token_ids=trunk),
        Segment(token_ids=branch, num_scored=2, parent=0, cut=7),
        Segment(token_ids=branch, num_scored=2, parent=0, cut=3),
        Segment(token_ids=other, num_scored=4),
    ]
    truth = []
    exact = tiny.policy(name).double()
    for ids, scored in (([*trunk, *branch], 2), ([*trunk[:3], *branch], 2), (other, 4)):
        logprobs = exact(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        truth.append(logprobs.gather(1, torch.tensor(ids[1:])[:, None])[-scored:, 0])
    model = model.to(CUDA, getattr(torch, dtype))
    check_packed_forward(model)
    found = token_logprobs(model, pack(segments, CUDA)).logprob.cpu().double()
    error = (found - torch.cat(truth)).abs().max()
    assert error < (1e-4 if dtype == "float32" else 0.3)  # an absolute tolerance for log-probs down to -20 nats


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_chain_trains_from_sft_to_drpo(tmp_path, dtype: str):
    common = {
        "model_name_or_path": tiny.save_policy(tmp_path / "base"),
        "per_device_train_batch_size": 16,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "max_length": 64,
        "device": "cuda",
        "dtype": dtype,
        "progress": False,
    }
    examples = tiny.examples(64)
    sft = train_sft(SFTConfig(**common, output_dir=str(tmp_path / "sft")), examples)
    assert sft.history[-1]["loss"] < sft.history[0]["loss"]
    common["model_name_or_path"] = str(tmp_path / "sft")
    train_reward_model(RewardConfig(**common, output_dir=str(tmp_path / "reward")), examples)
    dpo = train_dpo(DPOConfig(**common, output_dir=str(tmp_path / "dpo")), examples)
    assert dpo.history[0]["loss"] == pytest.approx(0.693147, abs=1e-3)
    drpo = DRPOConfig(**common, reward_model_path=str(tmp_path / "reward"), response_length=8, reset_prob=0.5)
    history = train_ppo(drpo, examples).history
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in history)
    assert history[0]["val/ratio"] == pytest.approx(1.0, abs=0.05)
