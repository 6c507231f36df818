"""Small models, a small tokenizer and generated data for tests of whole runs."""

from __future__ import annotations

import random
from collections.abc import Collection
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from fastrlhf.algorithms import ppo
from fastrlhf.config import SFTConfig
from fastrlhf.models import adapters
from fastrlhf.models.loading import build_policy, load_policy, load_reward_model
from fastrlhf.runtime.merging import save_trained
from fastrlhf.types import Example

WORDS = [f"w{i}" for i in range(29)]
VOCAB = len(WORDS) + 3
EOS = 1
ARCHITECTURES: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "gpt_neox": GPTNeoXConfig,
    "mistral": MistralConfig,
}


def tokenizer(without: Collection[int] = ()) -> PreTrainedTokenizerFast:
    """Makes a tokenizer of WORDS. The ids in `without` have no token; the other words keep their ids."""
    ids = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS]) if i not in without}
    base = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    base.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model_config(name: str = "llama") -> PretrainedConfig:
    """Returns a configuration with two layers. Gemma has soft caps on attention and logits; Gemma and Mistral have
    attention windows shorter than the test sequences."""
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    if name in ("gemma2", "mistral"):
        fields["sliding_window"] = 4
    if name == "gemma2":
        fields |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
    return ARCHITECTURES[name](**fields)


def policy(name: str = "llama", seed: int = 0):
    """Makes a policy with larger weights than the usual initialisation, so that log-probs of different tokens differ by
    nats."""
    model = build_policy(model_config(name), vocab_size=VOCAB, eos_token_id=EOS, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def save_policy(folder: Path, seed: int = 0) -> str:
    policy(seed=seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def save_reward_model(folder: Path, seed: int = 7) -> str:
    """Saves a reward model with a random head, marked as trained so that the trainers accept it as a judge."""
    policy(seed=seed).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def save_adapter(folder: Path, base: str, seed: int, *, scores: bool = False, **settings) -> str:
    """Saves an adapter over the model in `base`, like a run with `use_peft`. The adapter is that of a reward model if
    `scores` is True, otherwise that of a policy.
    """
    config = SFTConfig(use_peft=True, seed=seed, **{"lora_r": 2} | settings)
    model = load_reward_model(base, pad_token_id=0, seed=seed) if scores else load_policy(base)
    adapters.add_adapter(model, config, base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    save_trained(model, tokenizer(), folder)
    return str(folder / "adapter")


def examples(count: int, seed: int = 0) -> list[Example]:
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    return [
        Example(prompt=words(3, 9), reference=words(1, 6), chosen=words(1, 6), rejected=words(7, 8), row=i)
        for i in range(count)
    ]


def easy_pairs(count: int, seed: int = 0) -> list[Example]:
    """Makes pairs: the better response has words of the first half of the vocabulary, the worse response words of the
    second half."""
    draw = random.Random(seed)
    return [
        Example(prompt="w0 w28", chosen=" ".join(draw.choices(WORDS[:14], k=3)), rejected=" ".join(worse), row=i)
        for i in range(count)
        for worse in [draw.choices(WORDS[14:], k=3)]
    ]


class GradientRecorder:
    """A replacement of `optim.Optimizer` that records the gradients of each step, model after model, and takes an SGD
    step with `learning_rate`. With learning rate 0 the weights do not change."""

    def __init__(self, models, learning_rate=0.0):
        self.models, self.steps, self.learning_rate = models, [], learning_rate

    @torch.no_grad()
    def step(self) -> dict[str, float]:
        self.steps.append([[p.grad.clone() for p in model.parameters()] for model in self.models.values()])
        for model in self.models.values():
            for param in model.parameters() if self.learning_rate else ():
                param -= self.learning_rate * param.grad
            model.zero_grad()
        return {f"{name}grad_norm": 0.0 for name in self.models} | {"learning_rate": 0.0}


def record_gradients(monkeypatch, module, learning_rate=0.0) -> list[GradientRecorder]:
    """Makes `module` create recorders in place of optimisers; returns the list to which they are added."""
    made = []

    def make(models, *_, **__):
        made.append(GradientRecorder(models, learning_rate))
        return made[-1]

    monkeypatch.setattr(module, "Optimizer", make)
    return made


def assert_close_gradients(ours, theirs, tolerance: float = 1e-5) -> None:
    """Asserts that each tensor agrees within `tolerance` times its largest entry, and that not all entries are zero on
    both sides."""
    assert max(gradient.abs().max() for gradient in theirs) > 1e-4
    for gradient, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=tolerance, atol=tolerance * other.abs().max().item() + 1e-9)


def ids(text: str) -> list[int]:
    """Returns the ids of a text such as "w3 w4", without an EOS."""
    return [3 + int(word.removeprefix("w")) for word in text.split()]


def record_experience(monkeypatch) -> list[tuple]:
    """Makes `train_ppo` record each update; returns the list to which it adds the Experience and the rows of the
    episodes."""
    seen, compute = [], ppo.score_episodes

    def score(config, policy, reference, critic, rollouts, *arguments, **keywords):
        outcome = compute(config, policy, reference, critic, rollouts, *arguments, **keywords)
        seen.append((outcome[0], [rollout.prefix.row for rollout in rollouts]))
        return outcome

    monkeypatch.setattr(ppo, "score_episodes", score)
    return seen
