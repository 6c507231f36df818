"""Tests that compiled layers and Liger's kernels give the numbers of the plain trunk, or are refused."""

import random
import re
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch._dynamo.utils import counters

from bench.models.configs import tiny_config
from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import DPOConfig, PPOConfig, SFTConfig
from fastrlhf.data.packing import pack
from fastrlhf.models import attention, layers, loading
from fastrlhf.models.adapters import frozen_copy
from fastrlhf.models.forward import enable_activation_checkpointing, token_logprobs
from fastrlhf.models.layers import LayerOptions, apply_liger, compile_layers, foresee_alone, prepare_layers
from fastrlhf.models.loading import build_policy, load_policy
from fastrlhf.models.offload import HOST
from fastrlhf.models.small import EOS, VOCAB
from fastrlhf.rollout.engine import TransformersEngine
from fastrlhf.types import Prefix, Segment
from tests import tiny

SMALL = [
    Segment(token_ids=[5, 6, 7]),
    Segment(token_ids=[8, 1], num_scored=2, parent=0, cut=2),
    Segment(token_ids=[9, 1], num_scored=2, parent=0, cut=3),
]


@pytest.fixture
def compile_with(monkeypatch):
    """Returns a function that sets the backend of torch.compile. The default backend would compile C++ code for
    minutes."""

    def choose(backend) -> None:
        monkeypatch.setattr(torch, "compile", lambda f, **keywords: compiled(f, backend=backend, **keywords))

    compiled = torch.compile
    layers._compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    choose("eager")
    yield choose
    layers._compiled.cache_clear()


def ragged(seed: int) -> list[Segment]:
    draw, segments = random.Random(seed), []
    for _ in range(draw.randint(1, 5)):
        length = draw.randint(2, 30)
        segments.append(Segment(token_ids=draw.choices(range(3, 30), k=length), num_scored=0))
        cut = draw.randint(1, length)
        segments.append(Segment(token_ids=[4, 5, 6], num_scored=3, parent=len(segments) - 1, cut=cut))
    return segments


def numbers(model, segments: list[Segment]) -> list[torch.Tensor]:
    """Returns log-probs with and without gradient recording, and the gradients."""
    batch = pack(segments)
    with torch.no_grad():
        scored = token_logprobs(model, batch).logprob
    model.zero_grad()
    logprob = token_logprobs(model, batch).logprob
    (logprob * torch.linspace(-1, 1, len(logprob))).sum().backward()
    return [scored, logprob.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


def assert_close(ours, expected, tolerance: float = 1e-5) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize(
    ("name", "checkpointing", "offload_to"),
    [("llama", False, None), ("gemma2", True, None), ("llama", True, HOST)],
)
def test_compiled_layers_give_equal_numbers_and_few_compilations_for_all_lengths(
    compile_with, name, checkpointing, offload_to
):
    """Expects at most 8 compiled graphs, all of them from the first pack. A layer is compiled in three pieces (before
    attention, after attention, MLP), each with and without gradients. Gemma's layers with and without a window share
    these graphs.
    """
    compile_with("aot_eager")
    model, plain = tiny.policy(name), tiny.policy(name)
    compile_layers(model)
    if checkpointing:
        enable_activation_checkpointing(model, offload_to=offload_to)
    for seed in range(20):
        assert_close(numbers(model, ragged(seed)), numbers(plain, ragged(seed)))
        if seed == 0:
            after_the_first = counters["stats"]["unique_graphs"]
    assert 0 < after_the_first <= 8
    assert counters["stats"]["unique_graphs"] == after_the_first


def test_a_copy_of_a_compiled_model_runs_its_own_weights_compiled(compile_with):
    model = tiny.policy()
    compile_layers(model)
    frozen = frozen_copy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    counters.clear()
    batch = pack(ragged(0))
    with torch.no_grad():
        found = token_logprobs(frozen, batch).logprob
        assert counters["stats"]["unique_graphs"] > 0
        torch.testing.assert_close(found, token_logprobs(tiny.policy(), batch).logprob, rtol=1e-5, atol=1e-5)


def test_sampling_and_saving_use_the_plain_layers(compile_with, tmp_path):
    model, plain = tiny.policy(), tiny.policy()
    compile_layers(model)
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(model(ids).logits, plain(ids).logits)
    prefixes = [Prefix(token_ids=[5, 6, 7][:i], num_reset=0, row=0, episode=i) for i in (2, 3)]
    settings = {"eos_token_id": tiny.EOS, "response_length": 4, "temperature": 1.0, "seed": 0}
    sampled = [TransformersEngine(model=one, **settings).generate(prefixes) for one in (model, plain)]
    assert sampled[0] == sampled[1]
    assert counters["stats"]["unique_graphs"] == 0
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    assert torch.equal(load_policy(str(tmp_path))(ids).logits, plain(ids).logits)


def test_dpo_with_compiled_layers_is_the_same_run(compile_with, tmp_path):
    path, examples = tiny.save_policy(tmp_path), tiny.examples(16)
    histories = []
    for compiled in (False, True):
        config = DPOConfig(
            model_name_or_path=path,
            torch_compile=compiled,
            max_steps=3,
            learning_rate=1e-3,
            per_device_train_batch_size=8,
            max_length=64,
            progress=False,
        )
        histories.append(train_dpo(config, examples).history)
    assert counters["stats"]["unique_graphs"] > 0
    for plain, compiled in zip(*histories, strict=True):
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        assert compiled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("kind", ["dpo", "on-policy"])
def test_all_models_of_a_run_are_prepared_alike(monkeypatch, tmp_path, kind):
    """All models of a run (a reference with its own weights, the judge, the DPO model) must get the options of the
    policy."""
    asked = []

    def spy(model, options):
        asked.append(options)
        return prepare_layers(model, options)

    policy, reward_model = tiny.save_policy(tmp_path / "policy"), tiny.save_reward_model(tmp_path / "reward")
    monkeypatch.setattr(loading, "prepare_layers", spy)
    common = {
        "model_name_or_path": policy,
        "attn_implementation": "sdpa",
        "max_steps": 1,
        "max_length": 64,
        "progress": False,
    }
    if kind == "dpo":
        train_dpo(DPOConfig(**common, ref_model_name_or_path=policy), tiny.examples(8))
    else:
        paths = {"reward_model_path": reward_model, "dpo_model_path": policy}
        train_ppo(PPOConfig(**common, **paths, response_length=4), tiny.examples(8))
    assert asked == [LayerOptions(attn_implementation="sdpa", max_length=64)] * (2 if kind == "dpo" else 3)


def test_a_compiler_that_is_missing_is_one_clear_error(compile_with):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler found\nand many more lines")

    compile_with(broken)
    with pytest.raises(ValueError, match=r"^torch_compile: .*\(no C\+\+ compiler found\); set it to false$"):
        prepare_layers(tiny.policy(), LayerOptions(torch_compile=True))


def test_a_trunk_whose_layers_cannot_be_found_is_refused():
    model = tiny.policy()
    model.model = torch.nn.Identity()
    with pytest.raises(ValueError, match="torch_compile: LlamaForCausalLM has no layers"):
        compile_layers(model)


# Liger kernels. -------------------------------------------------------------


def test_liger_and_torch_compile_together_are_refused():
    with pytest.raises(ValueError, match="use_liger_kernel: must be false when torch_compile is true"):
        SFTConfig(use_liger_kernel=True, torch_compile=True)


def test_without_liger_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(layers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^use_liger_kernel: .*pip install 'fastrlhf\[liger\]'$"):
        apply_liger(tiny.policy())


def test_liger_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.setattr(layers, "find_spec", lambda name: True)
    monkeypatch.setattr(layers._triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match="use_liger_kernel: Liger needs a CUDA GPU, and the run is on cpu"):
        apply_liger(tiny.policy())


@pytest.fixture
def liger(monkeypatch):
    """A stand-in with Liger's documented interface: a function per model_type, with a switch for every kernel."""
    package, calls = ModuleType("liger_kernel.transformers"), []

    def apply_liger_kernel_to_llama(
        rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None
    ):
        calls.append(locals() | {"calls": None})

    package.apply_liger_kernel_to_llama = apply_liger_kernel_to_llama
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setattr(layers, "find_spec", lambda name: True)
    monkeypatch.setattr(layers._triton, "INTERPRETED", True)
    return calls


def test_only_ligers_trunk_kernels_are_used_and_none_of_its_losses(liger):
    model = tiny.policy()
    apply_liger(model)
    (call,) = liger
    assert call.pop("model") is model
    assert {name for name, on in call.items() if on} == {"rope", "rms_norm", "swiglu"}


def test_a_model_that_liger_does_not_know_is_refused(liger):
    with pytest.raises(ValueError, match="use_liger_kernel: Liger has no kernels for model_type 'gpt_neox'"):
        apply_liger(tiny.policy("gpt_neox"))


def test_kernels_that_change_the_numbers_are_refused(liger, monkeypatch):
    def wrong(model, **switches):
        model.model.norm.weight.data.mul_(1.01)

    monkeypatch.setattr(sys.modules["liger_kernel.transformers"], "apply_liger_kernel_to_llama", wrong)
    with pytest.raises(ValueError, match="the packed forward differs from the model's own"):
        prepare_layers(tiny.policy(), LayerOptions(use_liger_kernel=True))


@pytest.fixture
def interpreted(monkeypatch):
    """Adds the features that Liger's kernels need and Triton's interpreter lacks: float arguments as float32 scalars,
    and libdevice."""
    if torch.cuda.is_available():
        return
    import numpy
    from liger_kernel.ops import geglu, rms_norm
    from triton import language as tl
    from triton.runtime import interpreter

    def convert(argument):
        if not isinstance(argument, float):
            return given(argument)
        handle = interpreter.TensorHandle(numpy.array([argument], numpy.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    given = interpreter._implicit_cvt
    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))
    monkeypatch.setattr(geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mistral"])
def test_ligers_kernels_give_the_numbers_and_gradients_of_the_plain_trunk(name, monkeypatch, interpreted):
    """Sets up Triton's interpreter if there is no GPU, and afterwards reverts Liger's changes to the model's module."""
    model, plain = tiny.policy(name), tiny.policy(name)
    expected = numbers(plain, SMALL)
    module = sys.modules[type(model).__module__]
    for left in [x for x in vars(module) if x == "apply_rotary_pos_emb" or x.endswith(("RMSNorm", "MLP"))]:
        monkeypatch.setattr(module, left, getattr(module, left))
    prepare_layers(model, LayerOptions(use_liger_kernel=True))
    assert str(model).count("Liger") >= 4
    assert_close(numbers(model, SMALL), expected)


@pytest.mark.parametrize("kind", ["llama", "lfm2", "llama4_text", "falcon", "granitemoehybrid", "mamba2"])
def test_it_is_known_without_weights_whether_sequences_run_one_by_one(kind):
    config = tiny_config(kind)
    model = build_policy(config, vocab_size=VOCAB, eos_token_id=EOS, seed=0)
    assert foresee_alone(config, None) == re.sub(" by .* nats", "", attention.runs_alone(model))


def test_rotary_positions_and_models_that_cannot_be_made_small_are_foreseen_too(monkeypatch):
    config = tiny.model_config()
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 12}
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **factors}
    assert foresee_alone(config, 12) == ""
    assert "longrope" in (foresee_alone(config, 13) or "")
    monkeypatch.setattr(layers, "small_config", lambda _: {}["x"])
    assert foresee_alone(tiny.model_config("qwen3"), 12) is None
