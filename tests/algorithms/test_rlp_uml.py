"""Tests of the RLP-UML loss on views (pairs of answers to a prompt), with values computed by hand."""

from dataclasses import replace
from math import exp, log

import pytest
import torch
import torch.nn.functional as F

from fastrlhf.algorithms.completions import Answers
from fastrlhf.algorithms.rlp_uml import (
    Gaussian,
    ViewHeads,
    Views,
    beta_at,
    info_nce,
    is_active,
    jensen_shannon,
    symmetrised_kl,
    view_loss,
)
from fastrlhf.config import RLPConfig

CONFIG = RLPConfig(refinement="uml", view_width=16, view_latent=4, views_per_step=3)


def heads(config=CONFIG, hidden_size=8):
    return ViewHeads(config, hidden_size, torch.device("cpu"))


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_symmetrised_kl_of_a_worked_example_is_1_75():
    first = Gaussian(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 2.0]]).log())
    second = Gaussian(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 1.0]]).log())
    assert symmetrised_kl(first, second).item() == pytest.approx(1.75, rel=1e-6)


def test_symmetrised_kl_is_0_for_equal_views_and_else_the_mean_of_torchs_two_kls():
    means, stds = normals(2, 5, 4), normals(2, 5, 4, seed=1).exp()
    p, q = (Gaussian(mean, std.log()) for mean, std in zip(means, stds, strict=True))
    torch_p, torch_q = (torch.distributions.Normal(*both) for both in zip(means, stds, strict=True))
    both = torch.distributions.kl_divergence(torch_p, torch_q) + torch.distributions.kl_divergence(torch_q, torch_p)
    torch.testing.assert_close(symmetrised_kl(p, q), both.sum(-1) / 2, rtol=1e-5, atol=1e-5)
    assert symmetrised_kl(p, p).tolist() == [0.0] * 5
    assert bool((symmetrised_kl(p, q) > 0).all())


def test_a_critic_that_says_0_gives_minus_log_4():
    assert jensen_shannon(torch.zeros(5, 5)).tolist() == pytest.approx([-log(4)] * 5)


def test_jensen_shannon_by_hand_over_all_negatives_and_over_one():
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.5], [1.0, 0.0, 4.0]])

    def value(positive, *negatives):
        return -log(1 + exp(-positive)) - sum(log(1 + exp(x)) for x in negatives) / len(negatives)

    assert jensen_shannon(scores).tolist() == pytest.approx([value(2, 0, 1), value(3, 1, 0), value(4, 0, 0.5)])
    rolled = [value(2, 1), value(3, 1), value(4, 0.5)]  # column i with row i - 1
    assert jensen_shannon(scores, "roll").tolist() == pytest.approx(rolled)


def test_one_negative_and_all_negatives_agree_in_expectation():
    scores = normals(6, 6)
    orders = [torch.randperm(6, generator=torch.Generator().manual_seed(i)) for i in range(4000)]
    rolled = torch.stack([jensen_shannon(scores[order][:, order], "roll").mean() for order in orders])
    # the tolerance is four standard errors of the mean, std / sqrt(4000) each
    assert (rolled.mean() - jensen_shannon(scores).mean()).abs() < 4 * rolled.std() / 4000**0.5


@pytest.mark.parametrize("loss", ["mib", "cl"])
def test_a_batch_of_one_has_no_negative(loss):
    config = replace(CONFIG, mib_loss=loss)
    with pytest.raises(ValueError, match="views_per_step: must be at least 2 prompts"):
        view_loss(config, heads(config), normals(2, 8), normals(2, 4), beta=1.0, num_views=1)


def test_the_loss_is_minus_information_plus_beta_skl_of_reparametrised_latents():
    module, hidden, noise = heads(), normals(6, 8), normals(6, 4, seed=1)
    output = view_loss(CONFIG, module, hidden, noise, beta=0.3, num_views=3)
    mean, std = module.mean(hidden), F.softplus(module.std(hidden)) + 1e-4
    z = mean + std * noise
    assert module.critic is not None
    scores = torch.stack([module.critic(torch.cat([z[0::2][j].expand(3, 4), z[1::2]], 1))[:, 0] for j in range(3)])
    skl = symmetrised_kl(Gaussian(mean[::2], std[::2].log()), Gaussian(mean[1::2], std[1::2].log()))
    information = jensen_shannon(scores)
    torch.testing.assert_close(output.loss, (-information + 0.3 * skl).mean(), rtol=1e-5, atol=1e-6)
    found = {name: metric.value.item() for name, metric in output.metrics.items()}
    assert found["views"] == 3
    assert found["jsd"] == pytest.approx(information.sum().item(), rel=1e-5)
    assert found["skl"] == pytest.approx(skl.sum().item(), rel=1e-5)
    assert found["std"] == pytest.approx(3 * std.mean().item(), rel=1e-5)
    negative = scores.exp().sum() - scores.diagonal().exp().sum()
    expected = scores.diagonal().mean() - negative / 6 + 1
    assert found["mutual_information"] == pytest.approx(3 * expected.item(), rel=1e-4)
    half = view_loss(CONFIG, module, hidden, noise, beta=0.3, num_views=6)
    assert half.loss.item() == pytest.approx(output.loss.item() / 2)  # num_views is the divisor of the sum


@pytest.mark.parametrize("critic", ["mlp", "dot"])
def test_the_gradient_of_the_loss_is_that_of_finite_differences(critic):
    config = replace(CONFIG, view_critic=critic)
    module, noise = heads(config, 3).double(), normals(6, 4, seed=1).double()

    def loss(hidden):
        return view_loss(config, module, hidden, noise, beta=0.5, num_views=3).loss

    # The module's own forward computes in float32, which gradcheck does not accept.
    module.forward = lambda hidden: Gaussian(module.mean(hidden), (F.softplus(module.std(hidden)) + 1e-4).log())
    assert torch.autograd.gradcheck(loss, normals(6, 3).double().requires_grad_())


def test_each_ablation_leaves_out_what_its_name_says():
    hidden, noise = normals(6, 8), normals(6, 4, seed=1)

    def run(loss, hidden=hidden, beta=1.0):
        config = replace(CONFIG, mib_loss=loss)
        return view_loss(config, heads(config), hidden, noise, beta=beta, num_views=3)

    assert run("mib").loss != run("mib", beta=0.0).loss
    assert run("mib", beta=0.0).loss == run("mvi").loss == run("mvi", beta=0.0).loss
    other = hidden.clone()
    other[1::2] = normals(3, 8, seed=2)  # replaces the second view of each prompt
    assert run("infomax").loss == run("infomax", hidden=other).loss
    assert run("mvi").loss != run("mvi", hidden=other).loss
    mean = heads(replace(CONFIG, mib_loss="cl")).mean(hidden)
    torch.testing.assert_close(run("cl").loss, info_nce(mean[::2], mean[1::2]).mean())
    assert "jsd" not in run("cl").metrics


def test_info_nce_of_orthogonal_pairs_by_hand():
    # cosine 1 with the second view of the same prompt and 0 with that of the other prompt; temperature 0.1
    assert info_nce(torch.eye(2), 3 * torch.eye(2)).tolist() == pytest.approx([log(1 + exp(-10))] * 2, rel=1e-3)


def test_beta_of_both_profiles():
    steps = [0, 20, 39, 40, 50]  # of 51 steps; the ramp ends at 0.8 * 50
    assert [beta_at(CONFIG, step, 51) for step in steps] == pytest.approx([1e-3, 10**-1.5, 10 ** (-3 / 40), 1, 1])
    paper = replace(CONFIG, mib_profile="paper")
    assert {beta_at(paper, step, 51) for step in steps} == {1.0}
    assert beta_at(CONFIG, 0, 1) == 1.0  # a run of one step has no ramp


def test_constant_heads_are_found_inactive():
    module = heads()
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)
    metrics = view_loss(CONFIG, module, normals(6, 8), normals(6, 4, seed=1), beta=1.0, num_views=3).metrics
    jsd = (metrics["jsd"].value / metrics["views"].value).item()
    assert jsd == pytest.approx(-log(4))
    assert not is_active([-0.1] * 90 + [jsd] * 10)  # only the last tenth of the curve counts
    assert is_active([jsd] * 90 + [-0.8] * 10)


def test_heads_depend_only_on_the_seed():
    torch.manual_seed(1)
    first = heads().state_dict()
    torch.manual_seed(2)
    assert all(torch.equal(value, first[name]) for name, value in heads().state_dict().items())
    assert not torch.equal(heads(replace(CONFIG, seed=7)).state_dict()["mean.0.weight"], first["mean.0.weight"])


def sets(count, alike=()):
    """Makes prompts with three answers each. A prompt in `alike` has three equal answers."""
    return [
        Answers(row=i, prompt=[100 + i], responses=[[k * (i not in alike), i, 1] for k in range(3)], logprob=[-1.0] * 3)
        for i in range(count)
    ]


def opened(answers, config=CONFIG):
    return Views(config=config, answers=answers).open(8, torch.device("cpu"), 10)


def test_a_step_has_views_of_different_prompts_and_an_epoch_has_each_once():
    objective = opened(sets(7, alike=[4]))
    steps = [objective.draw(step) for step in range(4)]
    prompts = [[tree[0].token_ids[0] - 100 for tree in trees] for trees in steps]
    for epoch in (prompts[:2], prompts[2:]):
        # Prompt 4 gives no views, because its answers are equal
        assert sorted([*epoch[0], *epoch[1]]) == [0, 1, 2, 3, 5, 6]
    assert prompts[:2] != prompts[2:]
    for tree in (tree for trees in steps for tree in trees):
        assert [segment.parent for segment in tree] == [-1, 0, 0]
        assert tree[1].token_ids != tree[2].token_ids
    assert opened(sets(7, alike=[4])).draw(2) == steps[2]


def test_views_of_a_prompt_are_drawn_anew_in_every_epoch():
    objective = opened(sets(3))
    first = [
        {tuple(tree[0].token_ids): tree[1:] for tree in objective.draw(step)} for step in range(6)
    ]  # three prompts and views_per_step 3: each step is a whole epoch
    assert any(first[0] != other for other in first[1:])


def test_the_noise_is_keyed_by_the_step_and_the_loss_is_weighted():
    objective, hidden = opened(sets(7)), normals(6, 8)
    assert objective.loss(hidden, 0).loss == objective.loss(hidden, 0).loss
    assert objective.loss(hidden, 0).loss != objective.loss(hidden, 1).loss
    doubled = opened(sets(7), replace(CONFIG, mib_weight=1.0)).loss(hidden, 0).loss
    assert doubled.item() == pytest.approx(2 * objective.loss(hidden, 0).loss.item())


def test_fewer_prompts_with_views_than_a_step_needs_are_refused():
    with pytest.raises(ValueError, match="views_per_step: must be at most 2, the prompts with two different answers"):
        opened(sets(4, alike=[0, 1]))
