"""Prints how many variants of every kernel Triton would compile over ragged packs, and after which pack the last one is
new. Runs without a GPU and without the interpreter: a launch only computes the key of the compiled kernel."""

import json
import random
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastrlhf_kernels import _triton, gae, kl_estimate, linear_kl, linear_logprob, pair_loss, policy_loss, value_loss
from fastrlhf_kernels.linear_nll import linear_nll

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
PACKS, VOCAB, SIZE = 50, 640, 64
found: dict[str, dict[str, int]] = {}
now = 0


def record(self, *args, grid, warmup, **kwargs):
    binder = create_function_from_signature(self.signature, self.params, BACKEND)
    assert kwargs["enable_fp_fusion"] is True
    kwargs["debug"] = False
    found.setdefault(self.fn.__module__ + "." + self.fn.__name__, {}).setdefault(str(binder(*args, **kwargs)[1]), now)


JITFunction.run = record
_triton.INTERPRETED = True  # lets impl="triton" pass on a CPU
draw = random.Random(0)
for now in range(PACKS):
    lengths = [draw.randint(1, 60) for _ in range(4)]
    rows = sum(lengths)
    if now in (20, 30):
        lengths, rows = [8, 8, 8, 8], 32  # the first multiple of 16 may come late
    cu = torch.tensor([0, *lengths]).cumsum(0)
    hidden, weight = torch.randn(rows, SIZE, requires_grad=True), torch.randn(VOCAB, SIZE, requires_grad=True)
    targets, mask = torch.randint(0, VOCAB, (rows,)), torch.ones(rows, dtype=torch.bool)
    x, y = torch.randn(rows, requires_grad=True), torch.randn(rows)
    options = {"impl": "triton"}
    linear_logprob(hidden, weight, targets, entropy=True, **options).logprob.sum().backward()
    linear_nll(hidden, weight, targets, num_tokens=rows, form="one_shot", **options).loss.backward()
    linear_kl(hidden, weight, hidden.detach(), weight.detach(), **options).kl.sum().backward()
    policy_loss(x, y, y, mask, num_tokens=rows, **options)
    pair_loss(x, y, cu, mask, num_pairs=2, **options)
    value_loss(x, y, y, mask, num_tokens=rows, clip=0.2, **options)
    gae(y, y, cu, gamma=1.0, lam=0.9, **options)
    kl_estimate(x, y, **options)
sys.stdout.write(json.dumps({name: [len(keys), max(keys.values())] for name, keys in found.items()}))
