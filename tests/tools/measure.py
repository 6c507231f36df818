"""Tiny runs for the tests of `fastrlhf plan`, and a measurement of a run's peak memory."""

import importlib.util
import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import DPOConfig, PPOConfig, RTOConfig, SFTConfig, TrainConfig
from tests.tiny import save_adapter

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 1}
VOCAB = 4000
JUDGE_RANK, DPO_RANK = 8, 4
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: fastrlhf[bnb]"
)
UNREAD = {"qlora": 4 * 4 * (4 * 256 * 256 + 3 * 256 * 704)}
"""Kind of run -> bytes of the mapped weights file that the run does not read after loading. The kernel may drop these
pages. A qlora run keeps a 4-bit copy of the linear layers, so it no longer reads their bytes in the file. It still
reads the embedding and the head from the file.
"""
ROLES = {"reward_model_path": "judge", "dpo_model_path": "dpo"}
TRAINERS = {
    "sft": (SFTConfig, train_sft),
    "dpo": (DPOConfig, train_dpo),
    "ppo": (PPOConfig, train_ppo),
    "lora": (PPOConfig, train_ppo),
    "dora": (SFTConfig, train_sft),
    "qlora": (SFTConfig, train_sft),
    "roles": (RTOConfig, train_ppo),
}


def make_inputs(folder: Path) -> None:
    """Saves a tokenizer of 4,000 words, rows of 240 words, reward models, policies, and a judge and a DPO model that
    are adapters over one of the policies."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCAB - 3))]
    base = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(folder / "tokenizer")
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(draw.choices(words[3:], k=count))

    rows = [{"prompt": text(160), "chosen": text(60), "rejected": text(80)} for _ in range(32)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, sizes in (("reward", SIZES), ("tiny_reward", tiny())):
        config = AutoConfig.for_model("llama", **sizes, vocab_size=VOCAB, num_labels=1, pad_token_id=0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / name)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name.replace("reward", "policy"))
    base = str(folder / "policy")
    for seed, (place, rank) in enumerate({"judge": JUDGE_RANK, "dpo": DPO_RANK}.items()):
        adapter = save_adapter(folder / place, base, seed, scores=place == "judge", lora_r=rank)
        tokenizer.save_pretrained(adapter)


def tiny() -> dict[str, int]:
    return {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}


def settings(folder: Path, command: str, sizes: dict[str, int], reward: str) -> dict:
    shared = {
        "tokenizer_name_or_path": str(folder / "tokenizer"),
        "dataset_name": str(folder / "rows.jsonl"),
        "model_config": json.dumps({"model_type": "llama", **sizes}),
        "max_length": 256,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "micro_batch_tokens": 1200,
        "progress": False,
        "device": "cpu",
    }
    own = {
        "sft": {"response": "chosen"},
        "dpo": {},
        "ppo": {
            "reward_model_path": str(folder / reward),
            "response_length": 24,
            "num_ppo_epochs": 1,
            "rollout_batch_size": 8,
        },
    }
    loaded = {"model_config": "", "model_name_or_path": str(folder / reward.replace("reward", "policy"))}
    adapted = loaded | {"use_peft": True}
    own["lora"] = own["ppo"] | adapted
    own["dora"] = own["sft"] | adapted | {"use_dora": True}
    own["qlora"] = own["sft"] | adapted | {"load_in_4bit": True}
    own["roles"] = own["lora"] | {name: str(folder / place / "adapter") for name, place in ROLES.items()}
    return shared | own[command]


def config(folder: Path, command: str, sizes: dict[str, int] = SMALL, **changes) -> TrainConfig:
    kind, _ = TRAINERS[command]
    return kind(**{"dtype": "float32"} | settings(folder, command, sizes, "reward") | changes)


def measure(folder: Path, command: str) -> int:
    """Returns the bytes of tensors at the peak of a run: torch's allocations and mapped files, minus `UNREAD`. The
    resident memory of the process would also include the allocator, the libraries and the page cache.
    """
    _, train = TRAINERS[command]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train(config(folder, command, SIZES))
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes)) - UNREAD.get(command, 0)
