"""The implementations that `python -m bench kernels` compares: ours, plain torch, and other libraries.

To add an implementation, add a line to PROVIDERS; to add a computation, add a Task. Other libraries are imported when
they run. The packages TRL and verl import a whole training stack, so only the file with the kernel is imported.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Tensors
from bench.problems import FLOORS, TASKS, Problem, Task, pairs, policy, sft
from fastrlhf_kernels import gae, linear_kl, linear_logprob, linear_nll, linear_policy_loss, logprob_from_logits


@dataclass(frozen=True)
class Provider:
    name: str
    task: str
    function: Callable[[Problem], Tensors]
    """Returns (logprob,), (logprob, entropy) or (loss,), depending on the task."""
    package: str = ""
    """Package that must be installed."""
    gpu: bool = False
    """Whether the implementation runs only on a GPU, because it needs a GPU or is pointless on a CPU."""
    ours: bool = False
    """Whether the implementation is one of our ops, which are compared with float64 before they are timed."""

    @property
    def asked(self) -> Task:
        return TASKS[self.task]

    @property
    def missing(self) -> bool:
        return bool(self.package) and importlib.util.find_spec(self.package) is None


class Products(torch.autograd.Function):
    """Computes only the matrix products of a head: logits, dhidden, dweight and, if `passes` is 4, the logits a second
    time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, passes: int) -> Tensor:
        logits = hidden @ weight.T
        ctx.save_for_backward(hidden, weight, logits if passes == 3 else None)
        return logits[:, 0].clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor, Tensor, None]:
        hidden, weight, logits = ctx.saved_tensors
        logits = hidden @ weight.T if logits is None else logits
        return logits @ weight, logits.T @ hidden, None


def products(p: Problem, passes: int) -> Tensors:
    return (Products.apply(p.hidden, p.weight, passes),)  # pyright: ignore[reportReturnType]


def eager(p: Problem, entropy: bool = False, dtype: torch.dtype | None = None) -> Tensors:
    """Plain torch: computes logits in `dtype` (None: the dtype of the weights), and everything else in float32."""
    hidden, weight, bias = (x if x is None else x.to(dtype or p.weight.dtype) for x in (p.hidden, p.weight, p.bias))
    z = F.linear(hidden, weight, bias).float()  # pyright: ignore[reportArgumentType]
    z = z if p.softcap is None else p.softcap * torch.tanh(z / p.softcap)
    z = z / p.temperature[:, None] if isinstance(p.temperature, Tensor) else z
    if not entropy:
        return (-F.cross_entropy(z, p.targets, reduction="none"),)
    logprobs = z.log_softmax(-1)
    return logprobs.gather(1, p.targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@cache
def _compiled() -> Callable[..., Tensors]:
    return torch.compile(eager, dynamic=False)


def compiled(p: Problem, entropy: bool = False) -> Tensors:
    return _compiled()(p, entropy)


def chunked_torch(p: Problem, reduction: str = "none") -> Tensors:
    options = torch.nn.LinearCrossEntropyOptions()
    loss = F.linear_cross_entropy(p.hidden, p.weight, p.targets, reduction=reduction, options=options)
    return (loss if reduction == "sum" else -loss,)


def ours(p: Problem, entropy: bool = False, impl: str = "auto") -> Tensors:
    out = linear_logprob(p.hidden, p.weight, p.targets, **p.options, entropy=entropy, impl=impl)
    return (out.logprob,) if out.entropy is None else (out.logprob, out.entropy)


def one_shot_policy(p: Problem) -> Tensors:
    rows = (p.targets, p.sampler_logprob, p.advantage, p.mask)
    return (linear_policy_loss(p.hidden, p.weight, *rows, num_tokens=len(p.targets)).loss,)


def one_shot_sft(p: Problem) -> Tensors:
    return (linear_nll(p.hidden, p.weight, p.targets, num_tokens=1).loss,)


def eager_given_logits(p: Problem) -> Tensors:
    assert p.logits is not None
    return (p.logits.float().log_softmax(-1).gather(1, p.targets[:, None])[:, 0],)


def our_given_logits(p: Problem) -> Tensors:
    assert p.logits is not None
    return (logprob_from_logits(p.logits, p.targets).logprob,)


def eager_kl(p: Problem) -> Tensors:
    logprobs = F.linear(p.hidden, p.weight).float().log_softmax(-1)
    with torch.no_grad():
        reference = F.linear(p.reference_hidden, p.weight).float().log_softmax(-1)
    return ((logprobs.exp() * (logprobs - reference)).sum(-1),)


def our_kl(p: Problem) -> Tensors:
    return (linear_kl(p.hidden, p.weight, p.reference_hidden, p.weight).kl,)


def through(loss: Callable[..., Tensors], logprob: Callable[[Problem], Tensors]) -> Callable[[Problem], Tensors]:
    return lambda p: loss(p, *logprob(p))


def liger_ce(p: Problem, reduction: str = "none", budget: int = 1) -> Tensors:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

    options = (None, None, -100, 0.0, 0.0, reduction, None, False, None, False, False, False, None, None, budget)
    loss = Function.apply(p.hidden, p.weight, p.targets, *options)[0]  # pyright: ignore[reportOptionalSubscript]
    return (loss if reduction == "sum" else -loss,)


def liger_scaled(p: Problem, entropy: bool = False, fallback: bool = False) -> Tensors:
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as liger

    if fallback:
        out = liger._FusedLinearPPOFallbackFunction.apply(p.hidden, p.weight, p.targets, 1.0, -100, entropy)
    else:
        out = liger.LigerFusedLinearScaledCrossEntropyFunction.apply(
            p.hidden, p.weight, p.targets, return_entropy=entropy
        )
    return (-out[0], out[1]) if entropy else (-out,)


def _padded(p: Problem, tensor: Tensor) -> Tensor:
    """Reshapes packed rows of N sequences of equal length to [N, T / N, ...]."""
    return tensor.view(len(p.cu_seqlens) - 1, -1, *tensor.shape[1:])


def liger_grpo(p: Problem) -> Tensors:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    targets, mask, old, advantage = (_padded(p, x) for x in (p.targets, p.mask, p.sampler_logprob, p.advantage))
    op = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
    return (op(_padded(p, p.hidden), p.weight, targets, mask, advantage[:, 0], old_per_token_logps=old)[0],)


def liger_dpo(p: Problem) -> Tensors:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    op = LigerFusedLinearDPOLoss(use_ref_model=False)
    return (op(p.weight, _padded(p, p.hidden), _padded(p, p.targets))[0],)


def cut_cross_entropy(p: Problem, filter_eps: str | None = "auto", reduction: str = "none") -> Tensors:
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(p.hidden, p.weight, p.targets, reduction=reduction, filter_eps=filter_eps)
    return (loss if reduction == "sum" else -loss,)


def _without_init(*packages: str) -> None:
    """Makes it possible to import modules of these packages without running the packages' __init__."""
    for name in packages:
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)


def trl(p: Problem, entropy: bool = False) -> Tensors:
    _without_init("trl", "trl.trainer")
    if "trl.trainer.utils" not in sys.modules:  # TRL's backward looks up a DeepSpeed context in this module
        utils = sys.modules["trl.trainer.utils"] = ModuleType("trl.trainer.utils")
        utils.maybe_gather_lm_head_ctx = lambda *_: nullcontext()  # pyright: ignore[reportAttributeAccessIssue]
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction as Function

    options = (1.0, min(32768, len(p.weight)), None, 1.0, ("entropy",) if entropy else ())
    out = Function.apply(p.hidden, p.weight, None, p.targets, *options)
    assert out is not None
    return (out[0], out[1]) if entropy else (out[0],)


def verl(p: Problem) -> Tensors:
    _without_init("verl", "verl.utils")
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(p.hidden, p.weight, p.targets, 1.0, "none", None)


def eager_policy_loss(p: Problem) -> Tensors:
    ratio = (p.logprob - p.sampler_logprob).exp()
    gain = torch.minimum(ratio * p.advantage, ratio.clamp(0.8, 1.2) * p.advantage)
    return (-gain.where(p.mask, 0).sum() / len(ratio),)


def eager_pair_loss(p: Problem) -> Tensors:
    lengths = p.cu_seqlens.diff()
    segment = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=len(p.logprob))
    difference = (p.logprob - p.sampler_logprob).where(p.mask, 0)
    sums = difference.new_zeros(len(lengths)).index_add(0, segment, difference)
    return (-F.logsigmoid(0.1 * (sums[::2] - sums[1::2])).mean(),)


def eager_gae(p: Problem) -> Tensors:
    """Computes GAE in plain torch with gamma 1 and lambda .95, by a loop over the time steps of padded sequences."""
    reward, value = _padded(p, p.advantage), _padded(p, p.logprob)
    last, after, steps = torch.zeros_like(value[:, 0]), torch.zeros_like(value[:, 0]), []
    for t in reversed(range(value.shape[1])):
        last = reward[:, t] + after - value[:, t] + 0.95 * last
        after = value[:, t]
        steps.append(last)
    advantage = torch.stack(steps[::-1], 1).flatten()
    return advantage, advantage + p.logprob


@cache
def _buffer(num_bytes: int, device: torch.device) -> Tensor:
    return torch.ones(num_bytes, dtype=torch.uint8, device=device)


def copy(p: Problem) -> Tensors:
    return (_buffer(TASKS["copy"].row_bytes // 2 * len(p.logprob), p.logprob.device).clone(),)


LIGER, CCE = "liger_kernel", "cut_cross_entropy"
PROVIDERS = (
    Provider("3 products", "products", partial(products, passes=3)),
    Provider("4 products", "products", partial(products, passes=4)),
    Provider("eager", "logprob", eager),
    Provider("eager, float32 head", "logprob", partial(eager, dtype=torch.float32), gpu=True),
    Provider("torch.compile", "logprob", compiled, gpu=True),
    Provider("F.linear_cross_entropy", "logprob", chunked_torch),
    Provider("Liger CE", "logprob", liger_ce, LIGER, gpu=True),
    Provider("Liger CE, 16 x the memory", "logprob", partial(liger_ce, budget=16), LIGER, gpu=True),
    Provider("Liger scaled CE", "logprob", liger_scaled, LIGER, gpu=True),
    Provider("Liger scaled CE, torch", "logprob", partial(liger_scaled, fallback=True), LIGER),
    Provider("CCE", "logprob", cut_cross_entropy, CCE, gpu=True),
    Provider("CCE, unfiltered", "logprob", partial(cut_cross_entropy, filter_eps=None), CCE, gpu=True),
    Provider("TRL chunked", "logprob", trl, "trl"),
    Provider("ours", "logprob", ours, ours=True),
    Provider("ours, torch path", "logprob", partial(ours, impl="torch"), gpu=True, ours=True),
    Provider("eager", "entropy", partial(eager, entropy=True)),
    Provider("torch.compile", "entropy", partial(compiled, entropy=True), gpu=True),
    Provider("Liger scaled CE", "entropy", partial(liger_scaled, entropy=True), LIGER, gpu=True),
    Provider("Liger scaled CE, torch", "entropy", partial(liger_scaled, entropy=True, fallback=True), LIGER),
    Provider("TRL chunked", "entropy", partial(trl, entropy=True), "trl"),
    Provider("verl", "entropy", verl, "verl", gpu=True),
    Provider("ours", "entropy", partial(ours, entropy=True), ours=True),
    Provider("eager", "frozen head", eager),
    Provider("Liger CE", "frozen head", liger_ce, LIGER, gpu=True),
    Provider("TRL chunked", "frozen head", trl, "trl"),
    Provider("ours", "frozen head", ours, ours=True),
    Provider("eager", "all options", eager),
    Provider("ours", "all options", ours, ours=True),
    Provider("eager", "given logits", eager_given_logits),
    Provider("ours", "given logits", our_given_logits, ours=True),
    Provider("eager", "kl", eager_kl),
    Provider("ours", "kl", our_kl, ours=True),
    Provider("eager", "sft", through(sft, eager)),
    Provider("F.linear_cross_entropy", "sft", partial(chunked_torch, reduction="sum")),
    Provider("Liger CE", "sft", partial(liger_ce, reduction="sum"), LIGER, gpu=True),
    Provider("Liger CE, 16 x the memory", "sft", partial(liger_ce, reduction="sum", budget=16), LIGER, gpu=True),
    Provider("CCE", "sft", partial(cut_cross_entropy, reduction="sum"), CCE, gpu=True),
    Provider("ours", "sft", through(sft, ours), ours=True),
    Provider("ours, one shot", "sft", one_shot_sft, ours=True),
    Provider("eager", "policy", through(policy, eager)),
    Provider("Liger GRPO", "policy", liger_grpo, LIGER, gpu=True),
    Provider("ours", "policy", through(policy, ours), ours=True),
    Provider("ours, one shot", "policy", one_shot_policy, ours=True),
    Provider("eager", "policy, frozen head", through(policy, eager)),
    Provider("ours", "policy, frozen head", through(policy, ours), ours=True),
    Provider("ours, one shot", "policy, frozen head", one_shot_policy, ours=True),
    Provider("eager", "dpo", through(pairs, eager)),
    Provider("Liger DPO", "dpo", liger_dpo, LIGER, gpu=True),
    Provider("ours", "dpo", through(pairs, ours), ours=True),
    Provider("copy", "copy", copy),
    Provider("eager", "policy_loss", eager_policy_loss),
    Provider("ours", "policy_loss", lambda p: policy(p, p.logprob), ours=True),
    Provider("eager", "pair_loss", eager_pair_loss),
    Provider("ours", "pair_loss", lambda p: pairs(p, p.logprob), ours=True),
    Provider("eager", "gae", eager_gae),
    Provider("ours", "gae", lambda p: gae(p.advantage, p.logprob, p.cu_seqlens), ours=True),
)


def select(device: torch.device, tasks: Sequence[str] = (), only: Sequence[str] = ()) -> list[Provider]:
    """Selects implementations that can run on `device`, by task and by prefix of the name; () selects all.

    Hardware floors are selected for every task.
    """
    return [
        p
        for p in PROVIDERS
        if (device.type == "cuda" or not p.gpu)
        and (not tasks or p.task in (*tasks, *FLOORS))
        and (not only or p.name.startswith(tuple(only)))
    ]
