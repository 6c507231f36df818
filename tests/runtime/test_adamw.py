"""Tests which implementation of AdamW takes the steps. The tests of bitsandbytes need the package, those of paging a
GPU."""

import importlib.util
import sys

import pytest
import torch
from torch.nn import Embedding, Linear

from fastrlhf.config import SFTConfig
from fastrlhf.runtime.adamw import check_optim, make_adamw, moments, moments_in_8_bits
from fastrlhf.runtime.optim import Optimizer
from tests.resumable import Killed, Watch, run, save_models, untimed_log

CPU = torch.device("cpu")
has_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'fastrlhf[bnb]'"
)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_without_bitsandbytes_the_error_says_what_to_install(optim, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=rf"^optim: {optim} needs bitsandbytes: pip install 'fastrlhf\[bnb\]', or use"):
        check_optim(SFTConfig(optim=optim), torch.device("cuda"))
    check_optim(SFTConfig(), CPU)


def test_paged_memory_needs_a_gpu():
    with pytest.raises(ValueError, match=r"^optim: must be adamw_torch_fused or adamw_8bit without a CUDA GPU; got"):
        check_optim(SFTConfig(optim="paged_adamw_8bit"), CPU)


def test_a_run_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"^optim: must be adamw_torch_fused or adamw_8bit without"):
        run("sft", {"policy": "nowhere", "judge": ""}, tmp_path / "run", optim="paged_adamw_32bit", device="cpu")
    assert not (tmp_path / "run").exists()


@has_bitsandbytes
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_moments_are_paged_or_8_bit_as_the_name_says(optim):
    paged, small = optim.startswith("paged"), optim.endswith("8bit")
    adamw = make_adamw(SFTConfig(optim=optim), [torch.zeros(8)], rate=1e-3, decay=0.0, in_8_bits=small)
    assert (adamw.is_paged, adamw.args.optim_bits) == (paged, 8 if small else 32)


def model() -> torch.nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(Embedding(128, 64), Linear(64, 128), Linear(128, 8))


def step(optimizer: Optimizer, model: torch.nn.Module, number: int) -> None:
    for i, param in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * number + i)
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    optimizer.step()


@has_bitsandbytes
def test_8_bit_moments_take_two_bytes_except_for_embeddings_and_small_tensors():
    net = model()
    optimizer = Optimizer({"": net}, SFTConfig(optim="adamw_8bit"), num_steps=3)
    step(optimizer, net, 0)
    state = optimizer.state_dict()
    dtypes = {name: value.dtype for name, value in state.items() if name.endswith("state1")}
    assert dtypes == {
        "0.weight.state1": torch.float32,
        "1.weight.state1": torch.uint8,
        "1.bias.state1": torch.float32,
        "2.weight.state1": torch.float32,  # float32, because it has only 1,024 entries
        "2.bias.state1": torch.float32,
    }
    assert state["1.weight.absmax2"].shape == (64 * 128 // 256,)
    for size in (4095, 4096):  # bitsandbytes uses 8-bit moments from 4,096 entries on
        assert moments_in_8_bits(SFTConfig(optim="adamw_8bit"), torch.zeros(size), is_embedding=False) == (size == 4096)
    assert not [name for name in state if "qmap" in name]


@has_bitsandbytes
@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}])
def test_weights_follow_torchs_adamw_up_to_rounding_of_moments(settings):
    moved = []
    for optim in ("adamw_torch_fused", "adamw_8bit"):
        net = model().to(getattr(torch, settings.get("dtype", "float32")))
        start = [p.detach().float().clone() for p in net.parameters()]
        optimizer = Optimizer({"": net}, SFTConfig(optim=optim, learning_rate=1e-2, **settings), num_steps=20)
        for number in range(20):
            step(optimizer, net, number)
        moved.append([p.detach().float() - before for p, before in zip(net.parameters(), start, strict=True)])
    for i, (ours, theirs) in enumerate(zip(*moved, strict=True)):
        # float32 moments differ by rounding; 8-bit moments have errors of a few percent.
        tolerance = 0.05 if i == 1 else (1e-4 if not settings else 1e-2)
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
        assert ours.norm() > 0


@has_bitsandbytes
@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"master_weights": "stochastic_rounding"}])
def test_8_bit_moments_are_restored_exactly(settings):
    dtype = "bfloat16" if settings else "float32"

    def make():
        net = model().to(getattr(torch, dtype))
        return net, Optimizer({"": net}, SFTConfig(**{"optim": "adamw_8bit", "dtype": dtype} | settings), num_steps=9)

    net, optimizer = make()
    for number in range(3):
        step(optimizer, net, number)
    weights = [p.detach().clone() for p in net.parameters()]
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state_dict().items()}
    for number in range(3, 6):
        step(optimizer, net, number)
    again, other = make()
    step(other, again, 8)
    with torch.no_grad():
        for param, value in zip(again.parameters(), weights, strict=True):
            param.copy_(value)
    other.load_state_dict(state)
    for number in range(3, 6):
        step(other, again, number)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert optimizer.state_dict().keys() == other.state_dict().keys()


@has_bitsandbytes
def test_a_run_with_8_bit_adamw_resumes_with_the_same_bits(tmp_path):
    """All tensors of the model have fewer than 4,096 entries, so bitsandbytes keeps their moments in float32."""
    paths, settings = save_models(tmp_path), {"optim": "adamw_8bit"}
    whole = untimed_log(tmp_path / "whole", run("sft", paths, tmp_path / "whole", **settings))
    with pytest.MonkeyPatch.context() as patch:
        Watch("sft", patch).kill = (4, "after")
        with pytest.raises(Killed):
            run("sft", paths, tmp_path / "cut", **settings)
    assert untimed_log(tmp_path / "cut", run("sft", paths, tmp_path / "cut", **settings)) == whole


@has_bitsandbytes
@pytest.mark.parametrize("in_8_bits", [True, False])
def test_no_kernel_is_started_for_an_empty_part_of_a_weight(in_8_bits, monkeypatch):
    """Checks that no bitsandbytes kernel gets an empty tensor, which would crash the process on a GPU."""
    import bitsandbytes.functional as kernels

    sizes = []

    def watched(update):
        def watch(name, gradient, *arguments, **keywords):
            sizes.append(gradient.numel())
            update(name, gradient, *arguments, **keywords)

        return watch

    for name in ("optimizer_update_8bit_blockwise", "optimizer_update_32bit"):
        monkeypatch.setattr(kernels, name, watched(getattr(kernels, name)))
    some, none = torch.ones(1, 4096), torch.ones(0, 4096)
    config = SFTConfig(optim="adamw_8bit", learning_rate=1e-2)
    adamw = make_adamw(config, [none, some], rate=1e-2, decay=0.0, in_8_bits=in_8_bits)
    for _ in range(2):
        for part in (some, none):
            part.grad = torch.ones_like(part)
        adamw.step()
    assert sizes == [4096, 4096]
    assert some.max() < 1
    saved, beside = (moments(adamw, part, part) for part in (none, some))
    assert saved.keys() == beside.keys()  # all ranks save the same keys
    assert saved["step"] == beside["step"] == 2
    assert saved["state1"].shape == none.shape
