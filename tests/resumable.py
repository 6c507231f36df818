"""Helpers for the tests of resuming and of faults: short runs of every trainer that tests can interrupt and compare."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from fastrlhf.algorithms import dpo, kto, ppo, psipo_groups, reward_model, sft
from fastrlhf.algorithms.completions import Answers
from fastrlhf.algorithms.rlp_uml import Views
from fastrlhf.config import (
    DPOConfig,
    DRPOConfig,
    GRPOConfig,
    KTOConfig,
    PPOConfig,
    RewardConfig,
    RLPConfig,
    RTOConfig,
    SFTConfig,
)
from fastrlhf.runtime.metrics import read_metrics
from fastrlhf.runtime.run import Run
from fastrlhf.types import Example
from tests import tiny

STEPS, EVERY = 5, 2
VIEWS = RLPConfig(refinement="uml", view_width=16, view_latent=4, views_per_step=3)
GROUPS = [
    Example(prompt=f"w{i} w1", responses=["w2 w3", f"w4 w{i}", "w5"], scores=[0.5, float(i % 3), -1.0], row=i)
    for i in range(10)
]


LABELLED = [
    Example(prompt=e.prompt, reference=e.chosen if i % 3 else e.rejected, label=i % 3 > 0, row=i)
    for i, e in enumerate(tiny.examples(10))
]


def save_models(place: Path) -> dict[str, str]:
    """Saves a policy, a judge and a DPO model; also a judge and a DPO model that are adapters over the policy."""
    policy = tiny.save_policy(place / "policy")
    return {
        "policy": policy,
        "judge adapter": tiny.save_adapter(place / "adapted judge", policy, 1, scores=True),
        "dpo adapter": tiny.save_adapter(place / "adapted dpo", policy, 2),
        "judge": tiny.save_reward_model(place / "judge"),
        "dpo": tiny.save_policy(place / "dpo", seed=3),
    }


def run(kind: str, paths: dict[str, str], folder: Path, **settings):
    """Runs the trainer called `kind` for five steps, with a checkpoint after the second and the fourth."""
    shared = {
        "model_name_or_path": paths["policy"],
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": EVERY,
        "eval_steps": 3,
        "train_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "max_length": 32,
        "progress": False,
    }
    judged = {"reward_model_path": paths["judge"], "response_length": 5, "num_ppo_epochs": 2, "num_mini_batches": 2}
    examples, held_out = tiny.examples(10), tiny.examples(4, seed=1)
    match kind:
        case "sft":
            return sft.train_sft(SFTConfig(**shared | settings), examples, held_out)
        case "bf16":
            return sft.train_sft(SFTConfig(**shared | {"dtype": "bfloat16"} | settings), examples, held_out)
        case "lora":
            return sft.train_sft(SFTConfig(**shared | {"use_peft": True, "lora_r": 2} | settings), examples, held_out)
        case "reward":
            return reward_model.train_reward_model(RewardConfig(**shared | settings), examples, held_out)
        case "views":
            views = Views(config=VIEWS, answers=[answers_to(i) for i in range(6)])
            return reward_model.train_reward_model(RewardConfig(**shared | settings), examples, held_out, views=views)
        case "dpo":
            return dpo.train_dpo(DPOConfig(**shared | {"eval_on_start": True} | settings), examples, held_out)
        case "kto":
            return kto.train_kto(KTOConfig(**shared | {"balance_weights": True} | settings), LABELLED, LABELLED[:4])
        case "groups":
            backend = {"loss_type": ("ipo",), "psi_backend": "groupwise"}
            return dpo.train_dpo(DPOConfig(**shared | backend | settings), GROUPS, GROUPS[:3])
        case "ppo":
            remembered = {"score_norm": "running", "kl_target": 0.05, "kl_horizon": 4, "target_kl": 1e-3}
            keys = shared | judged | remembered | {"eval_on_start": True} | settings
            return ppo.train_ppo(PPOConfig(**keys), examples, held_out)
        case "drpo":
            keys = (
                shared | judged | {"num_generations": 2, "advantage_estimator": "rloo"} | settings | {"eval_steps": 0}
            )
            return ppo.train_ppo(DRPOConfig(**keys), examples, judge=noisy_judge)
        case "refuel":
            own = {"reset_prob": 0.7, "reset_source": "rollout", "num_generations": 2, "update": "pair"}
            keys = shared | judged | own | {"train_batch_size": 8} | settings
            return ppo.train_ppo(GRPOConfig(**keys), examples, held_out)
        case "prime":
            own = {"dpo_refine": "outcome", "dpo_refine_learning_rate": 1e-2, "success_threshold": 0.0}
            own |= {"advantage_estimator": "prime", "num_generations": 2, "train_batch_size": 8}
            keys = shared | judged | own | settings
            return ppo.train_ppo(GRPOConfig(**keys), examples, held_out)
        case "grpo":
            own = {"num_generations": 2, "dynamic_sampling_factor": 3.0, "overlong_buffer": 3, "kl_coef": 0.05}
            drawn = {"top_p": 0.9, "temperatures": (0.7, 1.0), "response_length": 5, "train_batch_size": 8}
            keys = shared | own | drawn | settings
            return ppo.train_ppo(GRPOConfig(**keys), examples, held_out, reward_functions={"even": starts_even})
        case "roles":
            over_one_base = {"reward_model_path": paths["judge adapter"], "dpo_model_path": paths["dpo adapter"]}
            keys = shared | judged | over_one_base | {"use_peft": True, "lora_r": 2} | settings
            return ppo.train_ppo(RTOConfig(**keys), examples, held_out)
        case _:
            keys = shared | judged | {"dpo_model_path": paths["dpo"], "reset_prob": 0.5} | settings
            return ppo.train_ppo(RTOConfig(**keys), examples, held_out)


def answers_to(row: int) -> Answers:
    responses = [[5, 6 + row, tiny.EOS], [7 + row, tiny.EOS]]
    return Answers(row=row, prompt=[3 + row, 4], responses=responses, logprob=[0.0, 0.0])


def starts_even(completion_ids, **_):
    """A reward function: 1 if the id of the first token is even, otherwise 0. Groups often have equal rewards."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def noisy_judge(rollouts):
    """A user-defined judge that draws random numbers from every global generator."""
    return [torch.rand(()).item() + random.random() + float(np.random.random()) for _ in rollouts]


KINDS = (
    *(
        "sft",
        "bf16",
        "lora",
        "reward",
        "views",
        "dpo",
        "kto",
        "groups",
        "ppo",
        "drpo",
        "rto",
        "refuel",
        "prime",
        "grpo",
    ),
    "roles",
)
OPTIMIZERS = dict.fromkeys(("reward", "views"), reward_model) | {
    "sft": sft,
    "bf16": sft,
    "lora": sft,
    "dpo": dpo,
    "kto": kto,
    "groups": psipo_groups,
}


class Killed(BaseException):
    """An exception that simulates a killed process, because no code of fastrlhf catches it. Unlike the death of a
    process, the exception does not release the lock.
    """


class Watch:
    """Records the optimisers that a run makes, and kills the run at a chosen point."""

    def __init__(self, kind: str, monkeypatch):
        self.made, module = [], OPTIMIZERS.get(kind, ppo)
        make, log = module.Optimizer, Run.log
        self.kill: tuple[int, str] | None = None

        def kept(*arguments, **keywords):
            self.made.append(make(*arguments, **keywords))
            return self.made[-1]

        def deadly(run, step, *arguments, **keywords):
            if self.kill == (step, "before"):
                raise Killed
            log(run, step, *arguments, **keywords)
            if self.kill == (step, "after"):
                raise Killed

        monkeypatch.setattr(module, "Optimizer", kept)
        monkeypatch.setattr(Run, "log", deadly)


TIMED = ("timing/", "system/")


def untimed(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "time" and not name.startswith(TIMED)}


def left(result, optimizer, folder: Path) -> dict:
    """Returns all results of a run, for the comparison of an interrupted run with an uninterrupted one."""
    return {
        "history": [untimed(row) for row in result.history],
        "final": result.final,
        "initial": result.initial,
        "log": [untimed(row) for row in read_metrics(folder / "metrics.jsonl")],
        "samples": (folder / "samples.jsonl").read_bytes(),
        "weights": {name: tensor.tolist() for name, tensor in result.model.state_dict().items()},
        "dpo": {k: v.tolist() for k, v in result.dpo_model.state_dict().items()} if result.dpo_model else None,
        "critic": {k: v.tolist() for k, v in result.value_model.state_dict().items()} if result.value_model else None,
        "optimizer": {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state_dict().items()},
        "model": (folder / "model.safetensors").read_bytes(),
        "card": (folder / "README.md").read_text(encoding="utf-8"),
    }


def untimed_log(folder: Path, result=None) -> list:
    """Returns the log and the model of a finished run, without times."""
    log = [untimed(row) for row in read_metrics(folder / "metrics.jsonl")]
    assert result is None or [untimed(row) for row in result.history] == [
        {name: value for name, value in row.items() if name != "step"} for row in log if row["step"]
    ]
    return [log, (folder / "model.safetensors").read_bytes()]
