import math
import weakref

import pytest
import torch
from torch.nn import Linear
from torch.utils._python_dispatch import TorchDispatchMode

from fastrlhf.config import SFTConfig
from fastrlhf.runtime import optim
from fastrlhf.runtime.optim import Optimizer, index_batches, num_steps, stochastic_round
from tests import tiny

BFLOAT16 = {"dtype": "bfloat16"}
ROUNDED = BFLOAT16 | {"master_weights": "stochastic_rounding"}


def layer(weight: float = 1.0) -> Linear:
    model = Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(weight)
        model.bias.fill_(weight)
    return model


def set_gradients(model: Linear, weight: list[float], bias: float) -> None:
    model.weight.grad, model.bias.grad = torch.tensor([weight]), torch.tensor([bias])


def plain(**settings) -> SFTConfig:
    return SFTConfig(**{"learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0} | settings)


def rates(count: int, **settings) -> list[float]:
    model = layer()
    optimizer = Optimizer({"": model}, SFTConfig(learning_rate=1.0, **settings), num_steps=count)
    seen = []
    for _ in range(count):
        set_gradients(model, [0.0, 0.0], 0.0)
        seen.append(optimizer.step()["learning_rate"])
    return seen


def test_the_rate_falls_from_the_peak_linearly_along_a_cosine_or_not_at_all():
    assert rates(4) == [1.0, 0.75, 0.5, 0.25]
    assert rates(4, lr_scheduler_type="cosine") == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert rates(3, lr_scheduler_type="constant") == [1.0, 1.0, 1.0]


def test_the_rate_rises_to_the_peak_over_the_warmup_and_never_starts_at_zero():
    assert rates(7, warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
    assert rates(3, warmup_steps=9) == pytest.approx([0.1, 0.2, 0.3])


def test_one_step_is_adamw_with_decay_on_the_matrix_only():
    model = layer()
    optimizer = Optimizer({"": model}, plain(weight_decay=0.5), num_steps=10)
    set_gradients(model, [3.0, -3.0], 4.0)
    optimizer.step()
    # Weight decay first reduces a weight by rate * decay; then Adam's first step moves every weight by the rate.
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[1 - 0.05 - 0.1, 1 - 0.05 + 0.1]]))
    torch.testing.assert_close(model.bias.detach(), torch.tensor([1 - 0.1]))


def test_the_reported_norm_is_before_clipping_and_the_step_uses_clipped_gradients():
    """With a large epsilon Adam's step depends on the norm of the gradient. A gradient of norm 13, clipped to 1, must
    give the step of a gradient of norm 1."""
    moved = []
    for scale, settings in ((13.0, {"max_grad_norm": 1.0}), (1.0, {})):
        model = layer()
        optimizer = Optimizer({"": model}, plain(adam_epsilon=0.1, **settings), num_steps=10)
        set_gradients(model, [scale * 3 / 13, scale * 4 / 13], scale * 12 / 13)
        assert optimizer.step()["grad_norm"] == pytest.approx(scale)
        moved.append(torch.cat([model.weight.detach()[0], model.bias.detach()]))
    torch.testing.assert_close(*moved, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(moved[0][0], moved[0][1])


@pytest.mark.parametrize("settings", [BFLOAT16, ROUNDED])
def test_bfloat16_gradients_are_clipped_by_their_float32_norm(settings):
    """Compares bit for bit with torch's clipping of float32 copies. Adam's first moment shows the clipped gradient."""
    model = tiny.policy().bfloat16()
    optimizer = Optimizer({"": model}, SFTConfig(max_grad_norm=1.0, adam_beta1=0.5, **settings), num_steps=3)
    copies = [torch.nn.Parameter(param.detach().float()) for param in model.parameters()]
    for i, (param, copy) in enumerate(zip(model.parameters(), copies, strict=True)):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(i)).bfloat16()
        copy.grad = param.grad.float()
    norm = torch.nn.utils.clip_grad_norm_(copies, 1.0)
    assert optimizer.step()["grad_norm"] == norm.item()
    state = optimizer.state_dict()
    for (name, _), copy in zip(model.named_parameters(), copies, strict=True):
        assert torch.equal(state[f"{name}.exp_avg"], copy.grad / 2)


def test_gradients_are_cleared_after_the_step():
    model = layer()
    optimizer = Optimizer({"": model}, plain(), num_steps=10)
    set_gradients(model, [1.0, 1.0], 1.0)
    optimizer.step()
    assert model.weight.grad is None
    assert model.bias.grad is None


def test_each_model_has_its_own_norm_and_rate_under_its_prefix():
    policy, critic = layer(), layer()
    optimizer = Optimizer(
        {"": policy, "value_": critic}, plain(max_grad_norm=1.0), num_steps=9, learning_rates={"value_": 0.3}
    )
    set_gradients(policy, [3.0, 4.0], 0.0)
    set_gradients(critic, [0.0, 0.0], 0.5)
    assert optimizer.step() == {"grad_norm": 5.0, "value_grad_norm": 0.5, "learning_rate": 0.1}
    torch.testing.assert_close(policy.weight.detach(), torch.tensor([[0.9, 0.9]]))
    torch.testing.assert_close(critic.bias.detach(), torch.tensor([0.7]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_the_run_before_any_weight_moves(bad, max_grad_norm):
    policy, critic = layer(), layer()
    optimizer = Optimizer({"": policy, "value_": critic}, plain(max_grad_norm=max_grad_norm), num_steps=9)
    set_gradients(policy, [1.0, 1.0], 1.0)
    set_gradients(critic, [1.0, bad], 1.0)
    with pytest.raises(ValueError, match=f"^value_grad_norm is {bad}: a loss or a gradient is not finite"):
        optimizer.step()
    for model in (policy, critic):
        assert all(bool((parameter == 1).all()) for parameter in model.parameters())


def test_frozen_weights_do_not_change():
    model = layer()
    model.bias.requires_grad_(False)
    optimizer = Optimizer({"": model}, plain(weight_decay=0.5), num_steps=10)
    model.weight.grad = torch.ones(1, 2)
    assert optimizer.step()["grad_norm"] == pytest.approx(2**0.5)
    assert model.bias.item() == 1


@pytest.mark.parametrize(
    ("settings", "num_items", "expected"),
    [
        ({"num_train_epochs": 1.0}, 16, 2),
        ({"num_train_epochs": 1.0}, 17, 3),
        ({"num_train_epochs": 0.5}, 16, 1),
        ({"num_train_epochs": 3.0, "gradient_accumulation_steps": 2}, 16, 3),
        ({"num_train_epochs": 0.001}, 16, 1),
        ({"max_steps": 7}, 16, 7),
    ],
)
def test_steps_are_given_or_whole_batches_that_cover_the_epochs(settings, num_items, expected):
    assert num_steps(SFTConfig(per_device_train_batch_size=8, **settings), num_items) == expected


def test_no_data_is_an_error_even_with_a_given_number_of_steps():
    with pytest.raises(ValueError, match=r"^dataset: no usable example"):
        num_steps(SFTConfig(max_steps=7), 0)


@pytest.mark.parametrize(("num_items", "batch_size", "steps"), [(10, 3, 20), (10, 10, 4), (3, 8, 6), (1, 2, 3)])
def test_every_epoch_shows_every_item_once_in_its_own_order(num_items, batch_size, steps):
    batches = list(index_batches(num_items, batch_size, steps, seed=4))
    assert [len(batch) for batch in batches] == [batch_size] * steps
    seen = [index for batch in batches for index in batch]
    epochs = [seen[i : i + num_items] for i in range(0, len(seen) - num_items + 1, num_items)]
    assert all(sorted(epoch) == list(range(num_items)) for epoch in epochs)
    if num_items == 10:
        assert len(set(map(tuple, epochs))) == len(epochs)


def test_the_order_depends_on_the_seed_and_not_on_the_length_of_the_run():
    ten = list(index_batches(50, 4, 10, seed=1))
    assert list(index_batches(50, 4, 30, seed=1))[:10] == ten
    assert list(index_batches(50, 4, 10, seed=2)) != ten


def test_bfloat16_weights_move_as_float32_ones_do():
    """Takes steps smaller than half the spacing of bfloat16 weights, which would be lost if weights were rounded to
    bfloat16."""
    runs = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.policy().to(dtype)
        optimizer = Optimizer({"": model}, SFTConfig(learning_rate=1e-4, lr_scheduler_type="constant"), num_steps=30)
        start = torch.cat([p.detach().float().flatten() for p in model.parameters()])
        for step in range(30):
            for i, param in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + i)
                param.grad = (1 + 0.1 * torch.randn(param.shape, generator=generator)).to(dtype)
            optimizer.step()
        runs.append(torch.cat([p.detach().float().flatten() for p in model.parameters()]) - start)
    assert (runs[1].mean() / runs[0].mean()).item() == pytest.approx(1.0, abs=0.05)


def test_skipped_steps_advance_the_schedule_but_no_weight():
    model = layer()
    optimizer = Optimizer({"": model}, SFTConfig(learning_rate=1.0), num_steps=4)
    set_gradients(model, [1.0, 1.0], 1.0)
    optimizer.step()
    before = model.weight.detach().clone()
    set_gradients(model, [1.0, 1.0], 1.0)
    optimizer.skip(2)
    assert model.weight.grad is None
    assert torch.equal(model.weight, before)
    set_gradients(model, [0.0, 0.0], 0.0)
    assert optimizer.step()["learning_rate"] == 0.25


def random_step(optimizer: Optimizer, model: torch.nn.Module, step: int) -> dict[str, float]:
    for i, param in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + i)
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    return optimizer.step()


def momentum(optimizer: Optimizer) -> dict:
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in optimizer.state_dict().items()
    }


@pytest.mark.parametrize("settings", [{"dtype": "float32"}, BFLOAT16, ROUNDED])
def test_a_restored_state_continues_with_the_same_bits(settings):
    config = SFTConfig(learning_rate=0.01, warmup_steps=2, **settings)
    dtype = getattr(torch, config.dtype)

    def stepped(optimizer, model, steps):
        for step in steps:
            last = random_step(optimizer, model, step)
        return last, [param.detach().clone() for param in model.parameters()], momentum(optimizer)

    def make():
        model = torch.nn.Sequential(Linear(3, 2), Linear(2, 2)).to(dtype)
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(0.5)
        return model, Optimizer({"value_": model}, config, num_steps=6)

    model, optimizer = make()
    _, weights, state = stepped(optimizer, model, range(3))
    rate, *expected = stepped(optimizer, model, range(3, 6))
    assert {"num_steps", "value_1.weight.exp_avg", "value_0.bias.step"} <= state.keys()
    assert ("value_1.weight.master" in state) == (settings == BFLOAT16)

    model, optimizer = make()
    stepped(optimizer, model, range(5, 7))  # these steps must not affect the loaded state
    with torch.no_grad():
        for param, value in zip(model.parameters(), weights, strict=True):
            param.copy_(value)
    optimizer.load_state_dict(state)
    again, *found = stepped(optimizer, model, range(3, 6))
    assert again == rate
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert all(
        torch.equal(torch.as_tensor(found[1][name]), torch.as_tensor(value)) for name, value in expected[1].items()
    )


def test_a_state_with_only_the_step_number_gives_a_new_optimiser_at_this_step():
    model = layer().bfloat16()
    optimizer = Optimizer({"": model}, SFTConfig(learning_rate=1.0), num_steps=4)
    with torch.no_grad():
        model.weight.fill_(3.0)
    optimizer.load_state_dict({"num_steps": 3})
    assert optimizer.state_dict()["weight.master"].tolist() == [[3.0, 3.0]]
    assert not [name for name in optimizer.state_dict() if "exp_avg" in name]
    model.weight.grad, model.bias.grad = torch.ones(1, 2).bfloat16(), torch.ones(1).bfloat16()
    assert optimizer.step()["learning_rate"] == 0.25


def test_a_state_of_other_parameters_is_refused():
    optimizer = Optimizer({"": layer()}, plain(), num_steps=4)
    with pytest.raises(ValueError, match=r"moments of score.weight, which is not trained here"):
        optimizer.load_state_dict({"num_steps": 1, "score.weight.exp_avg": torch.zeros(2)})


class Copies(TorchDispatchMode):
    """Tracks the float32 copies of parameters. `most` is the largest number of float32 entries that existed at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and output.dtype == torch.float32:
            self.now += output.numel()
            self.most = max(self.most, self.now)
            weakref.finalize(output.untyped_storage(), self.dropped, output.numel())
        return output

    def dropped(self, size):
        self.now -= size


@pytest.mark.parametrize(("settings", "per_entry"), [(BFLOAT16, 1), (ROUNDED, 2)])
def test_float32_gradients_exist_for_one_bucket_at_a_time(settings, per_entry, monkeypatch):
    """Checks the largest number of float32 entries, which without master weights includes copies of the weights."""
    monkeypatch.setattr(optim, "BUCKET", 2500)
    model = tiny.policy().bfloat16()  # its largest tensor has 1,536 entries, all 21 tensors 17,568
    optimizer = Optimizer({"": model}, SFTConfig(**settings), num_steps=3)
    for step in range(2):
        with Copies() as copies:
            random_step(optimizer, model, step)
        assert 0 < copies.most <= 2500 * per_entry
        assert copies.now == 0


def test_buckets_change_no_bit(monkeypatch):
    """Compares with torch's AdamW on float32 copies of all parameters."""
    monkeypatch.setattr(optim, "BUCKET", 2500)
    model, other = tiny.policy().bfloat16(), tiny.policy().bfloat16()
    optimizer = Optimizer({"": model}, plain(weight_decay=0.1, **BFLOAT16), num_steps=5)
    copies = [param.detach().float() for param in other.parameters()]
    adamw = torch.optim.AdamW(
        [{"params": [c], "weight_decay": 0.1 if c.ndim > 1 else 0.0} for c in copies], lr=0.1, fused=True
    )
    for step in range(5):
        for i, copy in enumerate(copies):
            copy.grad = (
                torch.randn(copy.shape, generator=torch.Generator().manual_seed(100 * step + i)).bfloat16().float()
            )
        adamw.step()
        random_step(optimizer, model, step)
    assert all(torch.equal(param, copy.bfloat16()) for param, copy in zip(model.parameters(), copies, strict=True))


def rounded(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return stochastic_round(x, torch.randint(0, 2**16, x.shape, dtype=torch.int32, generator=generator))


def test_a_rounded_number_is_one_of_its_neighbours_and_in_the_mean_itself():
    # The bfloat16 neighbours of 1 are at distances 2^-7 (above) and 2^-8 (below); those of -3 at 2^-6.
    for x, low, high in ((1 + 0.3 / 128, 1, 1 + 1 / 128), (1 - 0.7 / 256, 1 - 1 / 256, 1), (-3.001, -3 - 1 / 64, -3)):
        found = rounded(torch.full((2**16,), x)).double()
        assert set(found.tolist()) == {low, high}
        # Tolerance: six standard errors of the mean of 2^16 draws of two values.
        assert found.mean().item() == pytest.approx(x, abs=6 * 0.5 * (high - low) / 2**8)


def test_bfloat16_values_and_infinities_are_not_changed_by_rounding():
    x = torch.cat([torch.randn(4096).bfloat16().float(), torch.tensor([0.0, -0.0, math.inf, -math.inf, 2.0**-130])])
    assert torch.equal(rounded(x).float(), x)


def test_steps_below_the_spacing_of_bfloat16_are_not_lost():
    """Takes 200 steps of 1e-4 (0.02 in total) from weights of 1, whose bfloat16 neighbours are 2^-7 and 2^-8 away."""
    model = Linear(256, 256, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1)
    assert (model.weight.float() - 1e-4).bfloat16().eq(1).all()
    optimizer = Optimizer({"": model}, plain(learning_rate=1e-4, **ROUNDED), num_steps=200)
    for _ in range(200):
        model.weight.grad = torch.ones(256, 256).bfloat16()
        optimizer.step()
    # Each weight has its own rounding errors; six standard errors of the mean of 65,536 weights are 2e-4.
    assert model.weight.float().mean().item() == pytest.approx(1 - 0.02, abs=2e-4)


def test_noise_depends_on_seed_step_and_tensor():
    def weights(seed: int, skipped: int = 0) -> list[torch.Tensor]:
        model = torch.nn.Sequential(Linear(64, 64, bias=False), Linear(64, 64, bias=False)).bfloat16()
        optimizer = Optimizer({"": model}, plain(learning_rate=1e-3, seed=seed, **ROUNDED), num_steps=9)
        optimizer.skip(skipped)
        for layer in model:
            torch.nn.init.ones_(layer.weight)
            layer.weight.grad = torch.ones(64, 64).bfloat16()
        torch.manual_seed(len(drawn))  # the result must not depend on the global generator
        optimizer.step()
        return [layer.weight.detach() for layer in model]

    drawn = []
    for arguments in ((1,), (1,), (2,), (1, 3)):
        drawn.append(weights(*arguments))
    first, again, other_seed, other_step = drawn
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for one, two in ((first[0], first[1]), (first[0], other_seed[0]), (first[0], other_step[0])):
        assert not torch.equal(one, two)


def test_a_step_without_any_gradient_moves_nothing():
    model = Linear(2, 2, bias=False)
    before = model.weight.detach().clone()
    assert Optimizer({"": model}, plain(weight_decay=0.5), num_steps=9).step()["grad_norm"] == 0.0
    assert torch.equal(model.weight, before)
