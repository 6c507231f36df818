import pytest
import torch
from torch import Tensor

from fastrlhf_kernels.linear_logprob import linear_logprob
from fastrlhf_kernels.linear_pair_loss import linear_pair_loss, linear_pair_loss_reference
from fastrlhf_kernels.pair_loss import pair_loss
from tests.tolerance import assert_op_matches

CU_SEQLENS = torch.tensor([0, 4, 9, 12, 20], dtype=torch.int32)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(20, 8, generator=generator),
        "weight": torch.randn(30, 8, generator=generator),
        "targets": torch.randint(0, 30, (20,), generator=generator),
        "reference_logprob": torch.randn(20, generator=generator) - 3,
        "cu_seqlens": CU_SEQLENS,
        "mask": torch.rand(20, generator=generator) > 0.2,
    }


@pytest.mark.parametrize("options", [{}, {"kind": "ipo", "length_norm": "mean"}, {"label_smoothing": 0.1, "beta": 0.5}])
def test_it_equals_the_two_definitions_composed(impl: str, options: dict):
    given = inputs()
    leaves = {name: given.pop(name) for name in ("hidden", "weight")}
    reference_logprob = given.pop("reference_logprob")

    def op(**tensors: Tensor):
        fixed = {"reference_logprob": reference_logprob, "num_pairs": 2, "softcap": 5.0, "impl": impl}
        return (linear_pair_loss(**tensors, **given, **fixed, **options).loss,)

    def reference(**tensors: Tensor):
        cast = reference_logprob.to(tensors["hidden"].dtype)
        return (
            linear_pair_loss_reference(**tensors, **given, reference_logprob=cast, num_pairs=2, softcap=5.0, **options),
        )

    assert_op_matches(op, reference, leaves)


def test_every_option_reaches_the_two_ops(impl: str):
    given = inputs()
    given["targets"][3] = -7
    head = {"bias": torch.linspace(-1, 1, 30), "temperature": torch.linspace(0.5, 2, 20), "logit_scale": 1.5}
    head |= {"softcap": 4.0, "ignore_index": -7}
    loss = {"num_pairs": torch.tensor(2.0), "beta": 0.3, "length_norm": "pair_mean"}
    loss |= {"label_prob": torch.tensor([0.9, 0.6]), "margin": torch.tensor([0.1, -0.2])}
    pair_weight = torch.tensor([1.0, 0.5])
    one = linear_pair_loss(**given, **head, **loss, pair_weight=pair_weight, impl=impl)
    logprob = linear_logprob(given["hidden"], given["weight"], given["targets"], **head, impl=impl).logprob
    two = pair_loss(
        logprob, given["reference_logprob"], CU_SEQLENS, given["mask"], **loss, weight=pair_weight, impl=impl
    )
    assert torch.equal(one.loss, two.loss)
    assert all(torch.equal(one.metrics[name].value, metric.value) for name, metric in two.metrics.items())
    ipo = {"num_pairs": 2, "kind": "ipo", "target": torch.tensor([1.0, 2.0])}
    other = linear_pair_loss(**given, **head, **ipo, impl=impl).loss
    assert torch.equal(
        other, pair_loss(logprob, given["reference_logprob"], CU_SEQLENS, given["mask"], **ipo, impl=impl).loss
    )
