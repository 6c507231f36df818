"""Losses for preference learning on packed tokens. Each op has its own file and a section in kernels/README.md.

    linear_logprob       hidden states -> log-probs of the targets, without the logits
    linear_kept_logprob  hidden states -> log-probs under a softmax over a given set of tokens per row
    logprob_from_logits  logits -> log-probs of the targets
    linear_kl            hidden states of two models -> exact KL per token, without the logits
    kl_estimate          per-token estimates of KL to a reference
    policy_loss          PPO's clipped objective        value_loss   clipped squared error of the critic
    pair_loss            DPO, cDPO, robust DPO, IPO, hinge, APO, ORPO
    gae                  advantages and returns
    linear_nll           hidden states -> negative log-likelihood, the loss of supervised fine-tuning
    linear_policy_loss   hidden states -> PPO's loss    linear_pair_loss   hidden states -> a pair loss

Every op takes flat, packed rows in float32, bfloat16 or float16, computes in float32 and returns float32.
`impl` is "auto" (Triton on CUDA, torch elsewhere), "triton" or "torch".
"""

from fastrlhf_kernels.gae import gae
from fastrlhf_kernels.kl_estimate import kl_estimate
from fastrlhf_kernels.linear_kept_logprob import linear_kept_logprob
from fastrlhf_kernels.linear_kl import linear_kl
from fastrlhf_kernels.linear_logprob import linear_logprob
from fastrlhf_kernels.linear_nll import linear_nll
from fastrlhf_kernels.linear_pair_loss import linear_pair_loss
from fastrlhf_kernels.linear_policy_loss import linear_policy_loss
from fastrlhf_kernels.logprob_from_logits import logprob_from_logits
from fastrlhf_kernels.pair_loss import pair_loss
from fastrlhf_kernels.policy_loss import policy_loss
from fastrlhf_kernels.types import LossOutput, Max, Metric, Sum, TokenKL, TokenLogprobs, merge
from fastrlhf_kernels.value_loss import value_loss

__all__ = [
    "LossOutput",
    "Max",
    "Metric",
    "Sum",
    "TokenKL",
    "TokenLogprobs",
    "gae",
    "kl_estimate",
    "linear_kept_logprob",
    "linear_kl",
    "linear_logprob",
    "linear_nll",
    "linear_pair_loss",
    "linear_policy_loss",
    "logprob_from_logits",
    "merge",
    "pair_loss",
    "policy_loss",
    "value_loss",
]
