"""Records losses and gradients of TRL on tiny models in trl.json.

One batch of a Llama is for tests/test_trl_golden.py, 20 optimiser steps of a Qwen3 are for tests/test_trl_runs.py.

TRL is only needed to run this script: trl==1.12.0 for PPO, which later versions lack, and trl==1.16.0 for the rest,
with the versions of torch and transformers that trl.json names. Cases that are not named on the command line stay
unchanged.

    export PYTHONPATH=.:kernels HF_HUB_OFFLINE=1
    python tests/golden/record_trl.py sft sft_whole dpo cdpo robust hinge ipo apo_zero apo_down kto reward  # trl 1.16.0
    python tests/golden/record_trl.py sft_run dpo_run ipo_run reward_run               # trl 1.16.0
    python tests/golden/record_trl.py ppo ppo_whitened                                 # trl 1.12.0

Weights are computed from their index; texts are listed below or drawn with Python's generator, equal on every machine.
Only PPO's samples are random, and the file keeps them. For a gradient the file keeps, per tensor, its norm and its dot
product with a deterministic vector, which reveals a wrong sign, scale or order of entries. Recording again with the
same versions does not change the file.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, TrainerCallback

from fastrlhf.runtime.optim import index_batches
from tests import tiny

FILE = Path(__file__).with_name("trl.json")

POLICY, REFERENCE, REWARD = 1, 2, 3  # seeds of the deterministic weights

PAIRS = [  # prompt, chosen, rejected; TRL joins the texts, so each response starts with a space
    ("w0 w5 w11", " w7 w2", " w3"),
    ("w28 w1", " w9 w9 w4 w16 w20 w8 w1", " w12 w0 w6 w6 w21"),
    ("w4 w4 w18 w25 w2 w10 w13", " w17", " w5 w14 w22 w3 w19 w27 w26 w2 w15"),
    ("w23 w6 w8 w15", " w24 w1 w13 <eos>", " w24 w1<eos>"),  # both already end in EOS
    ("w12", " w10 w18 w0 w28", " w11 w7"),
    ("w19 w3 w26 w21 w14", " w25 w16 w5 w22 w23 w17", " w8 w20 w9"),
]
PROMPTS = [prompt for prompt, *_ in PAIRS] + ["w2 w27 w16", "w9 w20 w22 w24 w0 w1"]  # prompts for PPO, all different

PREFERENCE = {  # settings of TRL's DPOConfig that differ from its defaults
    "dpo": {"beta": 0.1},
    # TRL 1.16 ignores label_smoothing for loss_type sigmoid, so cDPO is recorded as 1.8 sigmoid - 0.8 robust, e = 0.1:
    # cDPO is (1 - e) L + e L', robust is ((1 - e) L - e L') / (1 - 2 e); L is the sigmoid loss, L' of the swapped pair.
    "cdpo": {"beta": 0.1, "label_smoothing": 0.1, "loss_type": ["sigmoid", "robust"], "loss_weights": [1.8, -0.8]},
    "robust": {"beta": 0.1, "label_smoothing": 0.1, "loss_type": "robust"},
    "hinge": {"beta": 1.0, "loss_type": "hinge"},
    "ipo": {"beta": 0.2, "loss_type": "ipo"},
    "apo_zero": {"beta": 0.3, "loss_type": "apo_zero"},
    "apo_down": {"beta": 0.3, "loss_type": "apo_down"},
}
KTO = {"beta": 0.2, "desirable_weight": 1.0, "undesirable_weight": 1.5}
KTO_ROWS = [  # prompt, response, label; in the order in which fastrlhf draws them
    (prompt, (chosen, rejected)[i % 2], i % 2 == 0)
    for i, (prompt, chosen, rejected) in enumerate(PAIRS[i] for i in next(index_batches(len(PAIRS), len(PAIRS), 1, 42)))
]
ON_POLICY = {  # settings with the same names in TRL and fastrlhf
    "ppo": {"response_length": 6, "temperature": 0.7, "missing_eos_penalty": 1.0},
    "ppo_whitened": {
        "response_length": 5,
        "temperature": 1.3,
        "missing_eos_penalty": 0.5,
        "kl_coef": 0.3,
        "cliprange": 0.1,
        "cliprange_value": 0.05,
        "vf_coef": 0.4,
        "gamma": 0.9,
        "lam": 0.8,
        "whiten_rewards": True,
    },
}
RUN_EXAMPLES = tiny.examples(23, seed=1)  # 23 rows, so that batches of 6 cross the ends of epochs
RUN = {  # settings with the same names in TRL and fastrlhf; `RUNS` adds others
    "seed": 42,
    "max_steps": 20,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-3,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
}
RUNS = {
    "sft_run": {"lr_scheduler_type": "linear", "adam_beta2": 0.95},
    "dpo_run": {"lr_scheduler_type": "cosine", "beta": 0.1},
    "ipo_run": {"lr_scheduler_type": "constant", "beta": 0.1, "loss_type": "ipo"},
    "reward_run": {"lr_scheduler_type": "linear"},
}
NUM_PPO_EPOCHS = 2  # in the second epoch ratios differ from 1 and some are clipped
PPO_LEARNING_RATE = 0.02  # for plain SGD; Adam's division would amplify rounding errors


def wave(shape: torch.Size, phase: float) -> Tensor:
    """Returns sin(phase + 0.7 k^2) at each flat index k, in float64; the same numbers on every machine."""
    index = torch.arange(shape.numel(), dtype=torch.float64)
    return torch.sin(phase + 0.7 * index * index).reshape(shape)


def with_formula_weights(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Sets matrix entries to values in -0.3..0.3 and norm weights to values in 0.8..1.2 by a formula, so that log-probs
    of different tokens differ by nats."""
    with torch.no_grad():
        for number, (_, param) in enumerate(sorted(model.named_parameters())):
            values = wave(param.shape, seed + 0.37 * number)
            param.copy_(0.3 * values if param.ndim == 2 else 1 + 0.2 * values)
    return model


def causal_lm(seed: int, architecture: str = "llama") -> PreTrainedModel:
    config = tiny.model_config(architecture)
    config.eos_token_id, config.bos_token_id, config.pad_token_id = tiny.EOS, None, None
    return with_formula_weights(AutoModelForCausalLM.from_config(config), seed)


def reward_model(architecture: str = "llama") -> PreTrainedModel:
    config = tiny.model_config(architecture)
    config.num_labels, config.pad_token_id = 1, 0
    return with_formula_weights(AutoModelForSequenceClassification.from_config(config), REWARD)


def summary(gradients: Iterable[tuple[str, Tensor]]) -> dict[str, list[float]]:
    """Returns for every tensor name -> (norm, dot product with a fixed vector that is computed from the name)."""
    result = {}
    for number, (name, gradient) in enumerate(sorted(gradients)):
        exact = gradient.detach().double()
        result[name] = [exact.norm().item(), (exact * wave(exact.shape, 5 + 0.37 * number)).sum().item()]
    return result


def gradients_of(model: PreTrainedModel) -> dict[str, list[float]]:
    return summary((name, param.grad) for name, param in model.named_parameters())


def offline_trainer(
    kind: str, rows: Iterable[tuple[str, str, str]], folder: str, architecture: str, reference: int, settings: dict
) -> Any:
    """Makes TRL's trainer (sft, dpo, kto or reward) for rows of (prompt, chosen, rejected); kto uses KTO_ROWS.
    `reference` is the seed of the reference model of dpo and kto.
    """
    import trl
    from datasets import Dataset

    common = {"output_dir": folder, "report_to": "none", "use_cpu": True, "bf16": False, **settings}
    pairs = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in rows]
    if kind == "sft":
        return trl.SFTTrainer(
            model=causal_lm(POLICY, architecture),
            args=trl.SFTConfig(**common),
            train_dataset=Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]),
            processing_class=tiny.tokenizer(),
        )
    if kind == "reward":
        return trl.RewardTrainer(
            model=reward_model(architecture),
            args=trl.RewardConfig(**common),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tiny.tokenizer(),
        )
    if kind == "kto":
        rows = [{"prompt": prompt, "completion": response, "label": label} for prompt, response, label in KTO_ROWS]
        return trl.KTOTrainer(
            model=causal_lm(POLICY, architecture),
            ref_model=causal_lm(reference, architecture),
            args=trl.KTOConfig(per_device_train_batch_size=len(rows), **common),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny.tokenizer(),
        )
    return trl.DPOTrainer(
        model=causal_lm(POLICY, architecture),
        ref_model=causal_lm(reference, architecture),
        args=trl.DPOConfig(**common),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tiny.tokenizer(),
    )


def record_offline(case: str, folder: str) -> dict[str, Any]:
    """Records loss, metrics, gradients and token ids of one batch of all rows, with TRL's own tokenisation and
    collation."""
    kind, settings = "dpo", PREFERENCE.get(case, {})
    if case.startswith("sft"):
        kind, settings = "sft", {"completion_only_loss": case == "sft"}
    elif case == "reward":
        kind = "reward"
    elif case == "kto":
        kind, settings = "kto", KTO
    trainer = offline_trainer(kind, PAIRS, folder, "llama", REFERENCE, settings)
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return {
        "loss": loss.item(),
        "metrics": {name: values[0] for name, values in trainer._metrics["train"].items()},
        "gradients": gradients_of(trainer.model),
        "token_ids": [
            ids[seen.bool()].tolist() for ids, seen in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ],
    }


def record_run(case: str, folder: str) -> dict[str, Any]:
    """Records loss, gradient norm and learning rate of every optimiser step; DPO's reference is the initial policy.

    TRL and fastrlhf shuffle differently, so the rows are stored in the order in which fastrlhf draws them; TRL takes
    them in this order.
    """
    batch_size = RUN["per_device_train_batch_size"] * RUN["gradient_accumulation_steps"]
    batches = index_batches(len(RUN_EXAMPLES), batch_size, RUN["max_steps"], RUN["seed"])
    drawn = (RUN_EXAMPLES[index] for batch in batches for index in batch)
    rows = ((row.prompt, f" {row.chosen}", f" {row.rejected}") for row in drawn)
    shown = {"logging_steps": 1, "disable_tqdm": True, "save_strategy": "no", "train_sampling_strategy": "sequential"}
    kind = {"sft_run": "sft", "reward_run": "reward"}.get(case, "dpo")
    trainer = offline_trainer(kind, rows, folder, "qwen3", POLICY, RUN | RUNS[case] | shown)
    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    return {name: [row[name] for row in steps] for name in ("loss", "grad_norm", "learning_rate")}


class LocalsRecorder(torch.optim.SGD):
    """Plain SGD that records, at every step, the gradients of the models and the local variables of
    `PPOTrainer.train`."""

    def __init__(self, policy: PreTrainedModel, critic: PreTrainedModel) -> None:
        super().__init__([*policy.parameters(), *critic.parameters()], lr=PPO_LEARNING_RATE)
        self.models, self.steps = {"policy": policy, "critic": critic}, []
        self.seen: dict[str, Any] = {}

    def step(self, closure: Any = None) -> None:
        frame = sys._getframe()
        while frame.f_code.co_name != "train":  # advantages are local variables of TRL's training loop
            assert frame.f_back
            frame = frame.f_back
        self.seen = {name: value.tolist() for name, value in frame.f_locals.items() if isinstance(value, Tensor)}
        self.steps.append({name: gradients_of(model) for name, model in self.models.items()})
        super().step(closure)


class KeepLogs(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **_: Any) -> None:
        self.logs = logs


def record_on_policy(case: str, folder: str) -> dict[str, Any]:
    """Records one update: the samples, what TRL computes from them, and the gradients of every optimiser step.

    If a response ends early, TRL puts the score one position after its EOS and trains the value there. Here every
    response therefore has full length, with its EOS in the last position or none, and no padding token, which TRL would
    treat as the end.
    """
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"
    length = ON_POLICY[case]["response_length"]
    sample = ppo_trainer.batch_generation

    def sample_until_all_are_full(model: Any, queries: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        while True:
            sequences, logits = sample(model, queries, *arguments)
            responses = sequences[:, queries.shape[1] :]
            ends = (responses == tiny.EOS).sum(0)
            if responses.shape[1] == length and not ends[:-1].any() and ends[-1] and (responses != 0).all():
                return sequences, logits

    transformers.set_seed(0)  # TRL does not seed numpy's generator, which shuffles the rows of a batch
    policy, critic, logs = causal_lm(POLICY), reward_model(), KeepLogs()
    optimizer = LocalsRecorder(policy, critic)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            per_device_train_batch_size=len(PROMPTS),
            total_episodes=len(PROMPTS),
            num_ppo_epochs=NUM_PPO_EPOCHS,
            stop_token="eos",
            **ON_POLICY[case],
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=causal_lm(REFERENCE),
        reward_model=reward_model(),
        value_model=critic,
        train_dataset=Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in PROMPTS]),
        eval_dataset=Dataset.from_list([{"input_ids": [3]}]),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        callbacks=[logs],
    )
    ppo_trainer.batch_generation = sample_until_all_are_full
    try:
        trainer.train()
    finally:
        ppo_trainer.batch_generation = sample
    seen = optimizer.seen
    rows = [tokenizer(text)["input_ids"] for text in PROMPTS]
    order = [rows.index([token for token in query if token]) for query in seen["queries"]]
    names = ("responses", "logprobs", "values", "scores", "advantages", "returns")
    by_row = [{name: seen[name][order.index(row)] for name in names} for row in range(len(rows))]
    metrics = {name: value for name, value in logs.logs.items() if name != "eps"}  # episodes per second
    return {"rollouts": by_row, "steps": optimizer.steps, "metrics": metrics}


def rounded(value: Any) -> Any:
    """Rounds to 9 significant digits, which are enough to reproduce a float32 number exactly."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def main(cases: list[str]) -> None:
    """Records the cases. Raises ValueError if the installed TRL is not the version that a case needs."""
    import trl

    golden = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    torch.set_num_threads(1)
    for case in cases:
        needed = "1.12.0" if case in ON_POLICY else "1.16.0"
        if trl.__version__ != needed:
            raise ValueError(f"{case} is recorded from trl=={needed}, not {trl.__version__}")
        record = record_on_policy if case in ON_POLICY else record_run if case in RUNS else record_offline
        with tempfile.TemporaryDirectory() as folder:
            numbers = record(case, folder)
        versions = {module.__name__: module.__version__ for module in (trl, torch, transformers)}
        golden[case] = {"versions": versions, **rounded(numbers)}
    text = json.dumps(dict(sorted(golden.items())), indent=1)
    innermost_on_one_line = re.sub(r"\[[^][{}]*\]", lambda match: " ".join(match[0].split()), text)
    FILE.write_text(innermost_on_one_line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
