"""Tests that offloaded models and layer inputs are copied back unchanged and before they are used. On a CPU the copies
are real and the streams are stand-ins; tests/test_on_gpu.py uses real streams.
"""

import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastrlhf.algorithms import ppo, roles
from fastrlhf.config import RTOConfig, SFTConfig
from fastrlhf.data.packing import pack
from fastrlhf.models import loading, offload
from fastrlhf.models.adapters import add_adapter, frozen_copy
from fastrlhf.models.forward import enable_activation_checkpointing, token_logprobs
from fastrlhf.models.offload import HOST, Waiting
from fastrlhf.types import Segment
from tests import tiny


class Poisoned(Waiting):
    """A model whose weights are NaN while they are offloaded, so that a read of an offloaded weight is detected."""

    def _leave(self):
        for weight in self._weights:
            weight.data = torch.full_like(weight, torch.nan)


def weights(*models):
    return [weight.clone() for model in models for weight in model.parameters()]


def test_weights_come_back_unchanged_when_they_are_needed():
    reference, judge = (tiny.policy(seed=seed).requires_grad_(False) for seed in (0, 1))
    before = weights(reference, judge)
    for kind in (Waiting, Poisoned):
        waiting = kind([reference, judge, judge], [tiny.policy()], torch.device("cpu"))
        for _ in range(2):
            with waiting.present():
                assert all(map(torch.equal, before, weights(reference, judge)))
            assert all(weight.isnan().all() == (kind is Poisoned) for weight in weights(reference, judge))


def test_weights_shared_with_a_trained_model_are_not_offloaded():
    policy = tiny.policy()
    add_adapter(policy, SFTConfig(use_peft=True), "base")
    Poisoned([frozen_copy(policy)], [policy], torch.device("cpu"))
    assert not any(weight.isnan().any() for weight in weights(policy))


def test_a_run_that_offloads_reads_no_weight_while_it_waits(tmp_path, monkeypatch):
    base = tiny.save_policy(tmp_path / "base")
    fields = {
        "model_name_or_path": base,
        "reward_model_path": tiny.save_reward_model(tmp_path / "judge"),
        "eval_reward_model_path": tiny.save_reward_model(tmp_path / "second", seed=8),
        "dpo_model_path": tiny.save_policy(tmp_path / "dpo", seed=1),
        "dpo_ref_model_path": tiny.save_policy(tmp_path / "dpo_ref", seed=2),
        "reset_prob": 1.0,
        "reset_source": "sample",
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "num_ppo_epochs": 2,
        "response_length": 5,
        "learning_rate": 1e-2,
        "progress": False,
    }

    def history(**settings):
        result = ppo.train_ppo(RTOConfig(**fields | settings), tiny.examples(8), tiny.examples(3, seed=1))
        return [{name: value for name, value in row.items() if "timing/" not in name} for row in result.history]

    plain = history()
    monkeypatch.setattr(roles, "Waiting", Poisoned)
    assert history(ref_reward_offload=True) == plain


def test_weights_are_copied_to_pinned_memory_without_a_second_copy(monkeypatch):
    """Without a GPU, pinned memory is simulated. The test records the requests for it, and whether a second copy is
    made."""
    asked, empty_like = [], torch.empty_like

    def unpinned(tensor, *, device, pin_memory):
        asked.append(pin_memory)
        return empty_like(tensor, device=device)

    monkeypatch.setattr(torch, "empty_like", unpinned)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _: pytest.fail("a second copy"))
    model = tiny.policy()
    before = weights(model)
    Waiting([model], [], torch.device("cuda"))
    assert asked == [True] * len(before)
    assert all(map(torch.equal, before, weights(model)))


# Inputs of layers. ----------------------------------------------------------

FOREST = [
    Segment(token_ids=[5, 6, 7, 8, 9, 10, 11]),
    Segment(token_ids=[14, 15], num_scored=2, parent=0, cut=7),
    Segment(token_ids=[16, 17, 18], num_scored=3, parent=0, cut=3),
    Segment(token_ids=[20, 21, 22, 23], num_scored=3),
]
OTHER = [Segment(token_ids=[3 + i % 20 for i in range(30)], num_scored=29)]


def deep(num_layers: int, offload_to: torch.device | None):
    """A model with many layers and tied weights."""
    config = tiny.model_config()
    config.num_hidden_layers, config.tie_word_embeddings = num_layers, True
    model = loading.build_policy(config, vocab_size=tiny.VOCAB, eos_token_id=tiny.EOS, seed=0)
    enable_activation_checkpointing(model, offload_to=offload_to)
    return model


def two_packs(model) -> list[torch.Tensor]:
    """Returns log-probs and gradients of two packs; both forwards run before the first backward."""
    first, second = (token_logprobs(model, pack(segments)).logprob for segments in (FOREST, OTHER))
    second.sum().backward()
    first.square().sum().backward()
    return [first.detach(), second.detach(), *[parameter.grad for parameter in model.parameters()]]


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_offloaded_inputs_change_no_bit(name):
    """Runs the forwards of two packs before the first backward, so that both autograd graphs exist at once."""
    results = []
    for offload_to in (None, HOST):
        model = tiny.policy(name)
        enable_activation_checkpointing(model, offload_to=offload_to)
        results.append(two_packs(model))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.T, lambda x: x[::2, 1:]])
def test_an_input_may_be_a_view_and_may_be_asked_for_twice(view):
    x, grads = torch.arange(9.0).reshape(3, 3) / 10, []
    for wrap in (lambda checkpoint: checkpoint, offload.offloaded):
        run, weight = wrap(partial(checkpoint, use_reentrant=False)), torch.full((3, 3), 0.5, requires_grad=True)
        hidden = view(torch.cat([x * weight] * 2))
        output = run(lambda h: (h.T @ h).tanh(), run(lambda h: h.sin() * h, hidden)).sum()
        output.backward(retain_graph=True)
        output.backward()
        grads.append(weight.grad)
    assert torch.equal(*grads)
    assert grads[0].abs().max() > 0


def test_an_adapters_run_is_the_same_too():
    results = []
    for offload_to in (None, HOST):
        model = deep(3, None)
        add_adapter(model, SFTConfig(use_peft=True), "base")
        enable_activation_checkpointing(model, offload_to=offload_to)
        token_logprobs(model, pack(FOREST)).logprob.sum().backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    assert max(x.abs().max() for x in results[0]) > 0
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("offload_to", [None, HOST])
def test_between_forward_and_backward_only_the_last_layers_input_is_on_the_device(offload_to, monkeypatch):
    model, inputs, left = deep(6, offload_to), [], []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(weakref.ref(arguments[0].untyped_storage())))

    def leave(self, tensor):
        left.append(tensor.nbytes)
        assert tensor.data_ptr() not in {parameter.data_ptr() for parameter in model.parameters()}
        return plain(self, tensor)

    plain = offload._LayerInputs.leave
    monkeypatch.setattr(offload._LayerInputs, "leave", leave)
    batch = pack(FOREST)
    logprob = token_logprobs(model, batch).logprob
    alive = [storage() is not None for storage in inputs]
    assert alive == ([True] * 6 if offload_to is None else [False] * 5 + [True])
    # float32 inputs [T, D], each offloaded once
    assert left == ([] if offload_to is None else [batch.num_tokens * 32 * 4] * 6)
    logprob.sum().backward()
    assert not any(storage() for storage in inputs)


class LateStreams:
    """A stand-in for `torch.cuda` that runs a copy as late as possible: when the computation waits for the copy. A
    pending copy does not keep its memory alive, and its target is NaN until the copy runs.
    """

    def __init__(self, monkeypatch) -> None:
        self.asked, self.side, self.side_has_waited = [], False, False
        self._copy = torch.Tensor.copy_
        monkeypatch.setattr(torch.Tensor, "copy_", lambda *arguments, **keywords: self.copy(*arguments, **keywords))
        monkeypatch.setattr(torch, "get_device_module", lambda device: self)

    class Stream:
        def __init__(self, streams=None) -> None:
            self.computes = streams

        def wait_stream(self, other) -> None:
            if self.computes:
                self.computes.run()
            else:
                other.computes.side_has_waited = True

    def current_stream(self):
        return self.Stream(self)

    @contextmanager
    def stream(self, stream):
        assert self.side_has_waited, "the source may not be computed yet, or the target may still be in use"
        self.side = True
        yield
        self.side = self.side_has_waited = False

    def copy(self, target, source, non_blocking=False):
        if not self.side:
            return self._copy(target, source)
        assert non_blocking, "the host would wait"
        self.asked.append((weakref.ref(target), weakref.ref(source)))
        return target.fill_(torch.nan)

    def run(self) -> None:
        for target, source in self.asked:
            assert None not in (target(), source()), "memory was freed during a copy"
            self._copy(target(), source())
        self.asked.clear()


def test_no_computation_overtakes_a_late_copy(monkeypatch):
    expected = two_packs(deep(4, None))
    streams = LateStreams(monkeypatch)
    assert all(map(torch.equal, two_packs(deep(4, HOST)), expected))
    assert not streams.asked


def test_an_empty_saved_tensor_does_not_end_a_running_copy(monkeypatch):
    """torch 2.11 saves empty tensors on the CPU. Reading an empty tensor must not complete the copy of another
    tensor."""
    streams, inputs, x = LateStreams(monkeypatch), offload._LayerInputs(HOST), torch.arange(3.0)
    expected = x.clone()
    one, empty = inputs.leave(x), inputs.leave(torch.empty(0, requires_grad=True))
    del x
    assert [target().numel() for target, _ in streams.asked] == [3]
    assert inputs.come_back(empty).numel() == 0
    assert [target().numel() for target, _ in streams.asked] == [3]
    assert torch.equal(inputs.come_back(one), expected)


def test_an_input_is_on_its_way_back_while_the_layer_after_it_is_computed_again(monkeypatch):
    streams, model = LateStreams(monkeypatch), deep(4, HOST)
    logprob, under_way = token_logprobs(model, pack(FOREST)).logprob, []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: under_way.append(len(streams.asked)))
    logprob.sum().backward()
    assert under_way == [1, 1, 1, 0]


def test_a_run_on_a_cpu_and_one_without_checkpointing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^activation_offloading: must be false when activation_checkpointing is fa"):
        SFTConfig(activation_offloading=True)
    settings = {"activation_checkpointing": True, "activation_offloading": True}
    with pytest.raises(ValueError, match=r"^activation_offloading: must be false when device is cpu"):
        SFTConfig(device="cpu", **settings)
    with pytest.raises(ValueError, match=r"^activation_offloading: needs a CUDA GPU, and the run is on cpu"):
        loading.make_trainable(tiny.policy(), SFTConfig(**settings), "")


def test_the_reference_of_a_run_offloads_nothing():
    """A copy of a model must not share the stream and the offloaded tensors of the original."""
    model = deep(2, HOST)
    token_logprobs(model, pack(FOREST)).logprob.sum().backward()
    frozen = frozen_copy(model)
    assert not any("offloaded" in repr(vars(module)) for module in frozen.modules())
    assert any("offloaded" in repr(vars(module)) for module in model.modules())
