"""Tests that need a GPU (`pytest -m gpu`): compiled kernels, half precision, real sizes, memory and host-device
waits."""

import pytest
import torch
from torch import Tensor

from bench.kernels import fault
from bench.measure import Step, peak_extra_bytes, relative_error, run
from bench.problems import TASKS, Case, make_problem
from bench.providers import PROVIDERS, ours
from fastrlhf_kernels import gae, linear_logprob, logprob_from_logits
from fastrlhf_kernels.gae import gae_reference
from fastrlhf_kernels.logprob_from_logits import logprob_from_logits_reference
from tests.tolerance import assert_op_matches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
CUDA = torch.device("cuda")
OURS = [provider for provider in PROVIDERS if provider.ours]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("provider", OURS, ids=lambda p: f"{p.task}: {p.name}")
def test_an_op_is_as_exact_as_plain_torch_in_its_dtype(provider, dtype: torch.dtype):
    assert not fault(provider, dtype, CUDA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (300, 4095), (7, 40_001), (257, 128_256)])
def test_log_probs_of_given_logits(shape: tuple[int, int], dtype: torch.dtype):
    generator = torch.Generator(CUDA).manual_seed(0)
    logits = 3 * torch.randn(*shape, generator=generator, device=CUDA)
    targets = torch.randint(shape[1], shape[:1], generator=generator, device=CUDA)
    upstream = [torch.randn(shape[0], generator=generator, device=CUDA) for _ in range(3)]

    def op(logits: Tensor):
        return logprob_from_logits(logits, targets, temperature=0.7, softcap=20.0, entropy=True)[:3]

    def reference(logits: Tensor):
        return logprob_from_logits_reference(logits, targets, temperature=0.7, softcap=20.0)[:3]

    assert_op_matches(op, reference, {"logits": logits.to(dtype)}, upstream)


def test_advantages_of_ragged_segments():
    generator = torch.Generator(CUDA).manual_seed(0)
    lengths = torch.randint(0, 3000, (200,), generator=generator, device=CUDA)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    reward, value = (torch.randn(int(cu_seqlens[-1]), generator=generator, device=CUDA) for _ in range(2))
    found = gae(reward, value, cu_seqlens, gamma=0.99)
    exact = gae_reference(reward.double().cpu(), value.double().cpu(), cu_seqlens.cpu(), gamma=0.99)
    for ours_, truth in zip(found, exact, strict=True):
        assert relative_error(ours_.cpu(), truth) < 1e-6


@pytest.mark.parametrize("vocab", [32_000, 50_257, 151_936, 262_144])
@pytest.mark.parametrize("size", [896, 1536, 4096])
def test_the_head_at_real_sizes_is_exact_in_float32_and_rounds_gradients_once(size: int, vocab: int):
    problem = make_problem(Case(640, size, vocab, dead=0.3), torch.bfloat16, CUDA)
    task = TASKS["entropy"]
    (logprob, entropy), (grad_hidden, grad_weight) = run(task.step(lambda p: ours(p, entropy=True), problem))
    (true_logprob, true_entropy), (true_hidden, true_weight) = task.truth(problem)
    assert (logprob - true_logprob).abs().max() < 1e-5 * true_logprob.abs().max()
    assert (entropy - true_entropy).abs().max() < 1e-4
    for found, truth in ((grad_hidden, true_hidden), (grad_weight, true_weight)):
        assert relative_error(found, truth) < 4e-3  # dz and the result are each rounded to bfloat16


def test_more_than_2_to_the_31_logits():
    problem = make_problem(Case(20_000, 64, 151_936), torch.bfloat16, CUDA)
    (logprob,), (grad_hidden, _) = run(TASKS["logprob"].step(ours, problem))
    some = slice(19_000, 20_000)
    truth = logprob_from_logits_reference(
        problem.hidden[some].double() @ problem.weight.double().T, problem.targets[some]
    )
    assert (logprob[some] - truth.logprob).abs().max() < 1e-4
    assert grad_hidden.isfinite().all()


def test_rows_that_tma_cannot_load_give_the_same():
    problem = make_problem(Case(200, 256, 5003), torch.bfloat16, CUDA)
    wide = torch.zeros(200, 257, dtype=torch.bfloat16, device=CUDA)
    wide[:, :256] = problem.hidden
    plain = linear_logprob(problem.hidden, problem.weight, problem.targets, entropy=True)
    strided = linear_logprob(wide[:, :256], problem.weight, problem.targets, entropy=True)
    torch.testing.assert_close(strided.logprob, plain.logprob, rtol=0, atol=2e-5)
    torch.testing.assert_close(strided.entropy, plain.entropy, rtol=0, atol=2e-5)


@pytest.mark.parametrize("provider", OURS, ids=lambda p: f"{p.task}: {p.name}")
def test_a_second_run_gives_the_same_bits(provider):
    problem = make_problem((provider.asked.alone and Case(5000, 1, 1)) or Case(700, 256, 5003), torch.bfloat16, CUDA)
    step = provider.asked.step(provider.function, problem)
    first, second = (run(step) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_forward_never_waits_for_the_gpu():
    problem = make_problem(Case(700, 256, 5003), torch.bfloat16, CUDA)
    providers = [p for p in OURS if p.task != "gae" and "torch" not in p.name]
    steps = [
        p.asked.step(p.function, make_problem(Case(5000, 1, 1), torch.bfloat16, CUDA) if p.asked.alone else problem)
        for p in providers
    ]
    for step in steps:
        step.forward()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps:
            step.forward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("task", ["logprob", "frozen head"])
def test_extra_memory_is_320_megabytes_and_6000_for_eager_torch(task: str):
    problem = make_problem(Case(8192, 4096, 128_256), torch.bfloat16, CUDA)
    step = TASKS[task].step(ours, problem)
    run(step)
    extra, _, _ = peak_extra_bytes(step, CUDA)
    assert extra <= 320e6


def test_rows_without_gradient_cost_nothing_in_the_backward():
    problem = make_problem(Case(4096, 1024, 50_257), torch.bfloat16, CUDA)

    def backward(share: float) -> float:
        upstream = problem.grad_logprob * (torch.rand(4096, device=CUDA) < share)
        step = Step(
            lambda: (linear_logprob(problem.hidden.requires_grad_(), problem.weight, problem.targets).logprob,),
            (problem.hidden,),
            (upstream,),
        )
        outputs = [step.forward() for _ in range(5)]
        times = []
        for output in outputs:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            step.backward(output)
            events[1].record()
            torch.cuda.synchronize()
            times.append(events[0].elapsed_time(events[1]))
        return sorted(times)[2]

    backward(1.0)
    assert backward(0.1) < 0.5 * backward(1.0)
