"""Runs the examples of kernels/README.md unchanged; defines the names that they use as tiny models and batches."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

README = (Path(__file__).parents[2] / "kernels" / "README.md").read_text(encoding="utf-8")
EXAMPLES = {
    section.split("\n")[0]: section.split("```python\n")[1].split("```")[0]
    for section in README.split("\n## ")
    if "```python\n" in section
}
ROWS, SIZE, VOCAB = 12, 8, 40


def names(model: nn.Module) -> dict[str, Any]:
    """Returns name -> value of the variables in the examples: models, and batches of two sequences with 5 and 7
    tokens."""
    generator = torch.Generator().manual_seed(0)

    def rows(scale: float = 0.1) -> Tensor:
        return scale * torch.randn(ROWS, generator=generator)

    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    batch = SimpleNamespace(
        ids=targets,
        targets=targets,
        positions=torch.cat([torch.arange(5), torch.arange(7)]),
        scored=rows() > 0,
        mask=torch.ones(ROWS, dtype=torch.bool),
        num_scored=6,
        num_tokens=ROWS,
        num_pairs=1,
        cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32),
        last=torch.tensor([4, 11]),
        was_cut=torch.tensor([0.0, 1.0]),
        advantage=rows(1.0),
        returns=rows(1.0),
        rollout_value=rows(1.0),
        sampler_logprob=rows() - 3.7,
        reference_logprob=rows() - 3.7,
        hidden=torch.randn(ROWS, SIZE, generator=generator),
    )
    trunk, value, head, reference_head = (nn.Linear(SIZE, n) for n in (SIZE, 1, VOCAB, VOCAB))
    parameters = [*model.parameters(), *trunk.parameters(), *value.parameters(), *head.parameters()]
    return {
        "model": model,
        "head": head,
        "reference_head": reference_head,
        "loader": [batch],
        "micro_batches": [batch, batch],
        "rollouts": batch,
        "sampler_logprob": batch.sampler_logprob,
        "reference_logprob": batch.reference_logprob,
        "trunk": lambda batch: trunk(batch.hidden),
        "policy": lambda batch: trunk(batch.hidden),
        "reference": lambda batch: batch.hidden,
        "critic": lambda batch: value(batch.hidden)[:, 0],
        "critic_after": lambda rollouts: torch.ones(2),
        "reward_model": lambda rollouts: torch.ones(2),
        "my_loss": lambda logprob, batch: -logprob.sum() / batch.num_tokens,
        "tokens_of_step": 2 * ROWS,
        "temperature": 0.7,
        "optimizer": torch.optim.SGD(parameters, lr=0.1),
        "critic_optimizer": torch.optim.SGD(parameters, lr=0.1),
        "torch": torch,
    }


@pytest.fixture(scope="module")
def model() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=SIZE, intermediate_size=SIZE, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB
    )
    return transformers.LlamaForCausalLM(config)


def test_every_op_has_an_example_of_at_most_twelve_lines():
    import fastrlhf_kernels

    ops = {name for name in fastrlhf_kernels.__all__ if name[0].islower()} - {"merge"}
    assert set(EXAMPLES) == ops
    assert all(len(example.splitlines()) <= 12 for example in EXAMPLES.values())


@pytest.mark.parametrize("op", EXAMPLES)
def test_an_example_runs_and_moves_the_weights(op: str, model: nn.Module):
    scope = names(model)
    optimizer = scope["critic_optimizer" if op == "value_loss" else "optimizer"]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in weights]
    exec(EXAMPLES[op], scope)
    assert all(p.isfinite().all() for p in weights)
    if op == "gae":
        assert scope["advantage"].isfinite().all()
    else:
        assert any(not torch.equal(p, old) for p, old in zip(weights, before, strict=True))


@pytest.mark.parametrize("op", ["linear_logprob", "logprob_from_logits"])
def test_the_packed_forward_of_an_example_keeps_sequences_apart(op: str, model: nn.Module):
    """The example must set use_cache=False: transformers ignores `position_ids` when it makes a cache, which is the
    default."""
    scope = names(model)
    (call,) = (line.split(" = ", 1)[1] for line in EXAMPLES[op].splitlines() if "position_ids=" in line)
    batch = scope["batch"] = scope["loader"][0]
    packed = eval(call, scope)[5:]
    batch.ids, batch.positions = batch.ids[5:], batch.positions[5:]
    torch.testing.assert_close(packed, eval(call, scope), atol=1e-6, rtol=0)
