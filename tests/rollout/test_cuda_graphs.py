"""Tests of decode steps that are recorded as CUDA graphs: a step can be recorded (tested on any device), and a replayed
step gives identical bits (tested on a GPU).
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrlhf.algorithms.prefixes import make_roll_in
from fastrlhf.algorithms.roles import make_engine
from fastrlhf.config import PPOConfig
from fastrlhf.evaluation.held_out import evaluate
from fastrlhf.rollout.cuda_graphs import CapturedSteps
from fastrlhf.rollout.engine import TransformersEngine
from fastrlhf.rollout.kv_cache import SlotCache
from fastrlhf.types import Prefix
from tests import tiny

PREFIXES = [
    Prefix(token_ids=[3 + (i * j) % 20 for j in range(1, 5 + i % 4)], num_reset=i % 4, row=i, episode=i)
    for i in range(30)
]
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def engine(model, **settings) -> TransformersEngine:
    fields = {"eos_token_id": tiny.EOS, "response_length": 9, "temperature": 0.7, "seed": 3, "batch_size": 8}
    return TransformersEngine(model=model, **fields | settings)


class Work(TorchDispatchMode):
    """Records the operators of a step, the shapes of their inputs, and the addresses of inputs that exist before the
    step."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.outside, self._made = [], set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        self.operators.append((str(func), [tuple(x.shape) for x in inputs]))
        made = {x.untyped_storage().data_ptr() for x in self._made}
        self.outside |= {x.untyped_storage().data_ptr() for x in inputs} - made
        output = func(*args, **(kwargs or {}))
        # Keeps tensors alive, so that no address is reused
        self._made += [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        return output


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@torch.no_grad()
def test_every_step_does_the_same_work_on_the_same_memory_without_host_reads(name):
    sampler = engine(tiny.policy(name))
    episodes, cache, held = sampler._episodes(PREFIXES[:4]), SlotCache(4, 20), torch.arange(4)
    first = cache.prefill(sampler.model, [prefix.token_ids for prefix in PREFIXES[:4]], [0, 1, 2, 3])
    sampler._record(episodes, held, first)
    made = []
    for _ in range(3):
        with Work() as work:
            sampler._step(cache, episodes, held, 64)
        made.append(work)
    assert made[0].operators == made[1].operators == made[2].operators
    outside = {x.untyped_storage().data_ptr() for x in (*sampler.model.parameters(), *sampler.model.buffers())}
    state = (getattr(episodes, field) for field in episodes.__slots__)
    outside |= {x.untyped_storage().data_ptr() for x in state if isinstance(x, torch.Tensor)}
    outside |= {x.untyped_storage().data_ptr() for layer in cache._layers.values() for x in layer}
    assert all(work.outside <= outside | {held.untyped_storage().data_ptr()} for work in made)
    names = {name for name, _ in made[0].operators}
    assert not {name for name in names if "_local_scalar_dense" in name or "nonzero" in name or "rand" in name}


def test_every_sampler_of_a_run_gets_the_decode_setting():
    config, policy = PPOConfig(decode="cuda_graph", reset_prob=0.5, reset_source="sample"), tiny.policy()
    for sample in (
        lambda: make_engine(config, policy, tiny.EOS),
        lambda: make_roll_in(config, policy, tiny.EOS),
        lambda: evaluate(config, policy, policy, len, [], tiny.EOS),
    ):
        # refused, because the model is on the CPU
        with pytest.raises(ValueError, match=r"^decode: cuda_graph needs a CUDA GPU"):
            sample()


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_replayed_steps_sample_what_eager_ones_do_bit_for_bit(name, dtype):
    model = tiny.policy(name).to(torch.device("cuda"), dtype)
    eager, graphs = engine(model, stop_at_eos=False), engine(model, stop_at_eos=False, decode="cuda_graph")
    long = [replace(prefix, num_reset=0) for prefix in PREFIXES]
    first = eager.generate(long)
    assert graphs.generate(long) == first
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)  # an in-place change, as in an update
    second = eager.generate(long)
    assert graphs.generate(long) == second
    assert second != first
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # a replaced tensor, as some frameworks do
    assert graphs.generate(long) == second


@pytest.mark.parametrize(
    ("error", "expected"),
    [(torch.OutOfMemoryError("full"), "^full$"), (RuntimeError("sync"), "^decode: Linear cannot")],
)
def test_out_of_memory_while_recording_is_not_wrapped(error, expected, monkeypatch):
    """Needs no GPU, because the recorded step fails before it calls a CUDA function."""
    steps = object.__new__(CapturedSteps)
    steps._name, steps._pool, steps._stream = "Linear", None, None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())

    def step() -> None:
        raise error

    with pytest.raises(Exception, match=expected) as stop:
        steps._capture(step)
    assert (stop.value is error) == isinstance(error, torch.OutOfMemoryError)


@pytest.mark.gpu
@ON_GPU
def test_a_step_that_reads_on_the_host_is_refused_by_the_name_of_the_key():
    steps, total = CapturedSteps(torch.nn.Linear(1, 1)), torch.zeros(1, device="cuda")

    def step() -> None:
        total.add_(total.item())

    steps("key", step)
    with pytest.raises(ValueError, match="decode: Linear cannot be captured in a CUDA graph; set eager"):
        steps("key", step)
