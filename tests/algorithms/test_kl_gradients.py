"""Compares the gradient of every KL placement and estimator with the gradient of the exact KL, by enumeration.

The trainer's own code computes the gradient for every possible sequence; its expectation over all sequences is
compared with the gradient of the divergence.

The test problems are a bandit of six actions, and a tree of three tokens from a vocabulary of three. Expectations and
divergences are in float64; the code under test computes log-probs, advantages and slopes in float32, hence the
tolerance.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from fastrlhf.config import PPOConfig
from fastrlhf.rewards.terms import Episodes, Rewards, own_kl_advantage
from fastrlhf.types import Prefix, Rollout
from fastrlhf_kernels import gae, kl_estimate, linear_kl, policy_loss

TOLERANCE = 2e-6  # sums of at most 81 float32 slopes of about 1


class Tree:
    """The set of all sequences of `horizon` tokens. A policy over them is a table of logits [state, token]."""

    def __init__(self, vocab: int, horizon: int) -> None:
        self.vocab, self.horizon = vocab, horizon
        states = [s for n in range(horizon) for s in product(range(vocab), repeat=n)]
        self.num_states = len(states)
        self.sequences = list(product(range(vocab), repeat=horizon))
        steps = [(states.index(y[:h]), y[h]) for y in self.sequences for h in range(horizon)]
        self.state, self.token = (torch.tensor(column) for column in zip(*steps, strict=True))

    def logits(self, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(self.num_states, self.vocab, generator=draw, dtype=torch.float64)

    def logprob(self, logits: Tensor) -> Tensor:
        """Log-probs of the rows, [rows]."""
        return logits.log_softmax(-1)[self.state, self.token]

    def visits(self, logits: Tensor) -> Tensor:
        """Probability of the sequence that each row belongs to, [rows]."""
        return self.logprob(logits).view(-1, self.horizon).sum(1).exp().repeat_interleave(self.horizon)

    def state_kl(self, logits: Tensor, reference: Tensor) -> Tensor:
        """KL(policy || reference) in the state of each row, [rows]."""
        logp, logq = logits.log_softmax(-1), reference.log_softmax(-1)
        return (logp.exp() * (logp - logq)).sum(-1)[self.state]


BANDIT, TREE = Tree(6, 1), Tree(3, 3)
WORLDS = {"bandit": BANDIT, "tree": TREE}


def through(world: Tree, logits: Tensor, slopes: Tensor) -> Tensor:
    """Returns the gradient with respect to the logits, given the derivatives [rows] with respect to the log-probs."""
    leaf = logits.clone().requires_grad_(True)
    return torch.autograd.grad((world.logprob(leaf) * slopes.double()).sum(), leaf)[0]


def gradient_of(divergence, logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_(True)
    return torch.autograd.grad(divergence(leaf), leaf)[0]


def full(world: Tree, logits: Tensor, reference: Tensor) -> Tensor:
    """Returns the gradient of the KL of whole sequences. An early token also affects the KL of later states."""
    return gradient_of(
        lambda x: (world.visits(x) * (world.logprob(x) - world.logprob(reference))).sum(),
        logits,
    )


def partial(world: Tree, logits: Tensor, reference: Tensor, sampler: Tensor | None = None) -> Tensor:
    """Returns the gradient of the sum of the KLs of the states, weighted by how often the sampler visits each state."""
    visits = world.visits(logits if sampler is None else sampler)
    return gradient_of(lambda x: (visits * world.state_kl(x, reference)).sum(), logits)


def policy_slopes(world: Tree, logits: Tensor, sampler: Tensor, advantage: Tensor, **kl) -> Tensor:
    """Returns the expected derivative of the trainer's loss with respect to the log-prob of every row, [rows]."""
    logprob = world.logprob(logits).float().requires_grad_(True)
    drawn, mask = world.logprob(sampler).float(), torch.ones(len(world.state), dtype=torch.bool)
    visits = world.visits(sampler).float()
    policy_loss(logprob, drawn, advantage, mask, num_tokens=1, weight=visits, **kl).loss.backward()
    return logprob.grad


def episodes(world: Tree, logits: Tensor, reference: Tensor, exact: bool) -> Episodes:
    num, horizon = len(world.sequences), world.horizon
    prefix = Prefix(token_ids=[0], num_reset=0, row=0, episode=0)
    rows = torch.ones(num * horizon, dtype=torch.bool)
    return Episodes(
        rollouts=[
            Rollout(prefix=prefix, completion=list(y), sampler_logprob=[0.0] * horizon, ended=True)
            for y in world.sequences
        ],
        cu_rows=torch.arange(0, num * horizon + 1, horizon, dtype=torch.int32),
        sampled=rows,
        earns=rows,
        end=torch.arange(horizon - 1, num * horizon, horizon),
        missing_eos=torch.zeros(num, dtype=torch.bool),
        score=torch.zeros(num),
        token=world.token,
        logprob=world.logprob(logits).float(),
        reference_logprob=world.logprob(reference).float(),
        dpo_log_ratio=None,
        exact_kl=world.state_kl(logits, reference).float() if exact else None,
    )


def returns_to_go(reward: Tensor, world: Tree) -> Tensor:
    cu_rows = torch.arange(0, len(reward) + 1, world.horizon, dtype=torch.int32)
    return gae(reward, torch.zeros_like(reward), cu_rows, gamma=1.0, lam=1.0)[0]


def kl_advantage(world: Tree, logits: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Returns the advantage of each row, [rows], as the trainer computes it without a critic. The only reward is the
    KL."""
    given = episodes(world, logits, reference, estimator == "exact")
    config = PPOConfig(kl_coef=1.0, kl_estimator=estimator)
    advantage = returns_to_go(Rewards(config=config).terms(given)["kl"].reward, world)
    own = own_kl_advantage(given, 1.0)
    return advantage if own is None else advantage + own


def in_reward(world: Tree, logits: Tensor, reference: Tensor, estimator: str) -> Tensor:
    advantage = kl_advantage(world, logits, reference, estimator)
    return through(world, logits, policy_slopes(world, logits, logits, advantage))


def in_loss(world: Tree, logits: Tensor, reference: Tensor, estimator: str, sampler: Tensor | None = None) -> Tensor:
    sampler = logits if sampler is None else sampler
    if estimator == "exact":
        states = logits.float().requires_grad_(True)
        eye = torch.eye(world.vocab)
        kl = linear_kl(states[world.state], eye, reference.float()[world.state], eye).kl
        return torch.autograd.grad((world.visits(sampler) * kl.double()).sum(), states)[0].double()
    kl = {"reference_logprob": world.logprob(reference).float(), "kl_coef": 1.0, "kl_kind": estimator}
    return through(world, logits, policy_slopes(world, logits, sampler, torch.zeros(len(world.state)), **kl))


def assert_gradient(found: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("estimator", ["k1", "exact"])
def test_in_the_reward_the_kl_of_whole_sequences_is_trained(name, estimator):
    world = WORLDS[name]
    logits, reference = world.logits(0), world.logits(1)
    found = in_reward(world, logits, reference, estimator)
    assert_gradient(found, full(world, logits, reference))


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("estimator", ["k2", "k3", "exact"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_in_the_loss_the_kl_of_each_state_is_trained_on_and_off_policy(name, estimator, off_policy):
    world = WORLDS[name]
    logits, reference = world.logits(0), world.logits(1)
    sampler = logits + 0.3 * world.logits(2) if off_policy else logits
    found = in_loss(world, logits, reference, estimator, sampler)
    assert_gradient(found, partial(world, logits, reference, sampler))


def test_the_two_placements_differ_if_a_token_affects_later_states():
    logits, reference = TREE.logits(0), TREE.logits(1)
    difference = full(TREE, logits, reference) - partial(TREE, logits, reference)
    assert difference.abs().max() > 0.05
    torch.testing.assert_close(
        full(BANDIT, BANDIT.logits(0), BANDIT.logits(1)), partial(BANDIT, BANDIT.logits(0), BANDIT.logits(1))
    )


def test_an_exact_kl_only_in_the_reward_would_not_train_the_state_itself():
    """Shows why `own_kl_advantage` is needed.

    Without it the gradient of the bandit is 0, and the gradient of the tree lacks the part that `partial` computes.
    """
    for world in WORLDS.values():
        logits, reference = world.logits(0), world.logits(1)
        advantage = returns_to_go(-world.state_kl(logits, reference).float(), world)
        found = through(world, logits, policy_slopes(world, logits, logits, advantage))
        missing = full(world, logits, reference) - found
        assert_gradient(missing, partial(world, logits, reference))


def test_an_exact_kl_in_the_reward_has_less_variance_than_k1():
    """Compares the variances of the policy gradient over the sequences of the tree, each summed over the logits. The
    baseline is a perfect critic. Measured: 0.744 (exact KL) and 1.493 (k1)."""
    logits, reference = TREE.logits(0), TREE.logits(1)
    leaf = logits.clone().requires_grad_(True)
    probability, state = TREE.visits(logits), TREE.state
    variance = {}
    for estimator in ("k1", "exact"):
        advantage = kl_advantage(TREE, logits, reference, estimator).double()
        worth = torch.zeros(TREE.num_states, dtype=torch.float64).index_add(0, state, probability * advantage)
        visits = torch.zeros_like(worth).index_add(0, state, probability)
        terms = TREE.logprob(leaf) * (advantage - (worth / visits)[state])
        each = terms.view(-1, TREE.horizon).sum(1)
        gradients = torch.stack([torch.autograd.grad(one, leaf, retain_graph=True)[0].flatten() for one in each])
        of_sequence = probability[:: TREE.horizon, None]
        mean = (of_sequence * gradients).sum(0)
        variance[estimator] = (of_sequence * (gradients - mean) ** 2).sum().item()
    assert variance["exact"] < 0.6 * variance["k1"]


@pytest.mark.parametrize("name", WORLDS)
def test_k1_in_the_loss_is_refused(name):
    world = WORLDS[name]
    logits = world.logits(0)
    found = through(world, logits, world.visits(logits))  # the derivative of k1 is 1
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


def test_k2_and_k3_in_the_reward_are_refused():
    """With k3 in the reward the policy minimises KL(policy || reference) - KL(reference || policy), which can increase
    its distance from the reference."""
    logits, reference = BANDIT.logits(0), BANDIT.logits(1)
    wanted = full(BANDIT, logits, reference)
    forward = gradient_of(lambda x: BANDIT.visits(reference) @ (BANDIT.logprob(reference) - BANDIT.logprob(x)), logits)
    found = {}
    for kind in ("k2", "k3"):
        value = kl_estimate(BANDIT.logprob(logits).float(), BANDIT.logprob(reference).float(), kind=kind)
        found[kind] = through(BANDIT, logits, policy_slopes(BANDIT, logits, logits, returns_to_go(-value, BANDIT)))
    assert_gradient(found["k3"], wanted - forward)
    assert (found["k2"] - wanted).abs().max() > 0.05
