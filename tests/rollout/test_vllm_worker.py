"""Tests of the functions that run inside a vLLM process. test_vllm.py tests the engine, and test_vllm_child.py the
process."""

from multiprocessing import Pipe
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from torch.nn import Embedding, Linear, Module

from fastrlhf.rollout.vllm_worker import forget_packed_experts, pack_tied_heads, serve


class Packed(Linear):
    """A layer like vLLM's on a CPU: it computes its output from a copy of the weight in a different layout."""

    def __init__(self):
        super().__init__(4, 8, bias=False)
        self.quant_method = SimpleNamespace(process_weights_after_loading=Packed.pack)
        self.times = 0
        self.pack()

    def pack(self):
        packed = self.weight.detach().clone()
        self.cpu_linear = lambda x: x @ packed.T
        self.times += 1


def test_a_head_tied_to_the_embedding_is_packed_with_the_new_weights():
    model = Module()
    model.embedding, model.other, model.head = Packed(), Packed(), Packed()
    model.head.weight = model.embedding.weight
    model.plain = Embedding(8, 4)
    model.plain.weight = model.embedding.weight
    x = torch.ones(1, 4)
    with torch.no_grad():
        model.embedding.weight += 1
    assert not torch.equal(model.head.cpu_linear(x), x @ model.embedding.weight.T)
    pack_tied_heads(model)
    assert torch.equal(model.head.cpu_linear(x), x @ model.embedding.weight.T)
    assert (model.embedding.times, model.other.times, model.head.times) == (1, 1, 2)


def test_experts_are_packed_again_when_their_kernel_is_forgotten():
    model = Module()
    model.experts, model.dense = Module(), Packed()
    model.experts.quant_method = SimpleNamespace(moe_kernel="packed once")
    forget_packed_experts(model)
    assert model.experts.quant_method.moe_kernel is None
    assert not hasattr(model.dense.quant_method, "moe_kernel")


class Failing:
    def double(self, number):
        return 2 * number

    def short(self):
        raise torch.OutOfMemoryError("Tried to allocate\n 20.00 GiB")

    def missing(self):
        raise ModuleNotFoundError("No module named 'vllm.new'")

    def silent(self):
        raise KeyError


@pytest.mark.parametrize(
    ("request_", "kind", "text"),
    [
        ("short", MemoryError, "Tried to allocate 20.00 GiB"),
        ("missing", ImportError, "No module named 'vllm.new'"),
        ("silent", ValueError, "KeyError"),
        ("unknown", ValueError, "'Failing' object has no attribute 'unknown'"),
    ],
)
def test_an_error_is_sent_as_one_line_with_its_traceback_and_the_next_request_served(request_, kind, text):
    ours, theirs = Pipe()
    thread = Thread(target=serve, args=(theirs, Failing()))
    thread.start()
    ours.send((request_, ()))
    done, error, trace = ours.recv()
    assert (done, type(error), str(error)) == (False, kind, text)
    assert trace.startswith("Traceback (most recent call last):")
    ours.send(("double", (21,)))
    assert ours.recv() == (True, 42)
    ours.close()
    thread.join(5)
    assert not thread.is_alive()
