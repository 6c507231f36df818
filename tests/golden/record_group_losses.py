"""Records the policy and value losses of TRL, verl and RTO's released code for tests/test_group_losses_golden.py.

Runs TRL 1.16.0, verl 0.9.1 and the code of RTO (zkshan2002/RTO, commit f2c1294) on one set of tensors. Writes losses,
their gradients with respect to log-probs or values, advantages of groups, GAE, estimates of the KL, and DAPO's overlong
penalties to group_losses.json.

The libraries are only needed to run this script. Of verl only trainer/ppo/core_algos.py and DAPO's reward manager run,
with stand-ins for the classes that they import; of RTO only openrlhf/models/loss.py, with a stand-in for `masked_mean`;
RTO_REPO names its checkout. Numbers of libraries that are not installed stay unchanged in the file.

    PYTHONPATH=.:kernels RTO_REPO=../RTO python tests/golden/record_group_losses.py
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import os
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_name("group_losses.json")

LENGTHS = (3, 5, 1, 4)
MAX_LENGTH = 6
CLIP_LOW, CLIP_HIGH, CISPO_HIGH = 0.2, 0.28, 0.5
REWARDS = (1.0, 0.0, 0.5, -1.0, 2.0, 2.0, 2.0, 2.0)
RETURN_LENGTHS = (3, 5, 1, 4, 2, 6, 6, 1)
GROUP = 4
GAMMA, LAM = 0.9, 0.8
OVERLONG = {"limit": 20, "buffer": 8, "penalty": 1.5}
OVERLONG_LENGTHS = tuple(range(10, 21))


def wave(num: int, phase: float, scale: float) -> Tensor:
    """Returns numbers computed from their index, [num] float64, which are equal on every machine."""
    return scale * torch.sin(torch.arange(num, dtype=torch.float64) * 1.7 + phase)


def tensors() -> dict[str, Tensor]:
    """Returns the padded inputs: log-probs of policy, sampler and reference, [4, 6] float64; the mask [4, 6];
    advantages [4]."""
    size = len(LENGTHS) * MAX_LENGTH
    sampler = -1.5 + wave(size, 0.3, 1.0)
    mask = torch.arange(MAX_LENGTH)[None] < torch.tensor(LENGTHS)[:, None]
    found = {"logprob": sampler + wave(size, 2.0, 0.4), "sampler": sampler, "reference": sampler + wave(size, 4.0, 0.3)}
    return {name: x.view(len(LENGTHS), MAX_LENGTH) for name, x in found.items()} | {
        "mask": mask.double(),
        "advantage": torch.tensor([1.0, -0.7, 1.9, -2.2], dtype=torch.float64),
        "value": wave(size, 1.0, 0.6).view(len(LENGTHS), MAX_LENGTH),
        "rollout_value": wave(size, 4.0, 0.5).view(len(LENGTHS), MAX_LENGTH),
        "returns": wave(size, 2.9, 1.1).view(len(LENGTHS), MAX_LENGTH),
    }


TRL = {  # case -> (TRL's loss_type, TRL's importance sampling level)
    "grpo": ("grpo", "token"),
    "bnpo": ("bnpo", "token"),
    "dapo": ("dapo", "token"),
    "dr_grpo": ("dr_grpo", "token"),
    "cispo": ("cispo", "token"),
    "gspo": ("grpo", "sequence"),
}


def of_trl(case: str) -> dict[str, Any]:
    from trl import GRPOTrainer

    loss_type, level = TRL[case]
    given = tensors()
    leaf = given["logprob"].clone().requires_grad_()
    # For CISPO, fastrlhf reads eps and bounds the ratio by 1 + eps; TRL reads the bound itself.
    high = 1 + CISPO_HIGH if loss_type == "cispo" else CLIP_HIGH
    trainer = SimpleNamespace(
        loss_type=loss_type, importance_sampling_level=level, beta=0.0, epsilon_low=CLIP_LOW, epsilon_high=high,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, _entropy_bonus_enabled=False,
        max_completion_length=MAX_LENGTH, current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True),
        use_liger_kernel=False, tools=None, vllm_importance_sampling_correction=False, num_generations=2,
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros_like(leaf), None),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        aux_loss_enabled=False, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.int64), "prompt_mask": torch.ones(4, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(4, MAX_LENGTH, dtype=torch.int64), "completion_mask": given["mask"].long(),
        "advantages": given["advantage"], "old_per_token_logps": given["sampler"],
        "ref_per_token_logps": given["reference"], "num_items_in_batch": given["mask"].sum(),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    assert leaf.grad is not None
    return {"loss": loss.item(), "gradient": leaf.grad[given["mask"].bool()].tolist()}


def trl_advantages(scale: str) -> list[float]:
    """Computes advantages from rewards with the lines of the installed TRL."""
    from trl import GRPOTrainer
    from trl.trainer import grpo_trainer

    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    start = source.index("        unscorable_mask = torch.isnan")
    stop = source.index('        elif self.multi_objective_aggregation == "normalize_then_sum"')
    names = {
        "torch": torch, "nanstd": grpo_trainer.nanstd, "num_generations": GROUP, "device": "cpu",
        "rewards_per_func": torch.tensor(REWARDS, dtype=torch.float64)[:, None],
        "self": SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize", scale_rewards=scale,
            reward_weights=torch.ones(1, dtype=torch.float64),
        ),
    }  # fmt: skip
    exec(textwrap.dedent(source[start:stop]), names)
    return names["advantages"].tolist()


VERL = {  # case -> (verl's function, averaging mode)
    "token_mean": ("compute_policy_loss_vanilla", "token-mean"),
    "dual_clip": ("compute_policy_loss_vanilla", "token-mean"),
    "gspo": ("compute_policy_loss_gspo", "seq-mean-token-mean"),
    "cispo": ("compute_policy_loss_cispo", "token-mean"),
    "dr_grpo": ("compute_policy_loss_vanilla", "seq-mean-token-sum-norm"),
}


VALUE_AVERAGES = {"token": "token-mean", "sequence": "seq-mean-token-mean"}


def load(name: str, path: Path) -> ModuleType:
    """Imports a single file as a module, without importing its package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verl_folder() -> Path:
    """Returns the folder of the installed verl. Must be called before `core_algos`, which replaces the package by
    stand-ins."""
    place = importlib.util.find_spec("verl")
    assert place is not None
    assert place.submodule_search_locations is not None
    return Path(place.submodule_search_locations[0])


def core_algos(folder: Path) -> ModuleType:
    """Imports verl/trainer/ppo/core_algos.py, with stand-ins for imports that these losses do not use."""

    class Config(SimpleNamespace):
        def get(self, name: str, default: Any = None) -> Any:
            return getattr(self, name, default)

    def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
        return (values * mask).sum()

    functional = SimpleNamespace(
        masked_sum=masked_sum,
        masked_whiten=lambda x, m: x,  # GAE is recorded before whitening
        masked_mean=lambda x, m: masked_sum(x, m) / m.sum(),
        clip_by_value=lambda x, low, high: torch.max(torch.min(x, high), low),
    )
    stand_ins = {
        "omegaconf": {"DictConfig": Config},
        "verl": {},
        "verl.utils": {"as_torch_index": None, "group_mean_std": None},
        "verl.utils.torch_functional": vars(functional),
        "verl.trainer.config": {"AlgoConfig": type("AlgoConfig", (), {})},
        "verl.utils.import_utils": {"deprecated": lambda _: lambda function: function},
        "verl.workers.config": {"ActorConfig": Config},
    }
    for name, members in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(members)
        sys.modules[name] = module
    for name in ("verl.trainer", "verl.workers"):
        sys.modules[name] = ModuleType(name)
    sys.modules["verl.utils"].torch_functional = sys.modules["verl.utils.torch_functional"]
    sys.modules["verl"].utils = sys.modules["verl.utils"]
    return load("core_algos", folder / "trainer" / "ppo" / "core_algos.py")


def of_verl(algos: ModuleType, case: str) -> dict[str, Any]:
    function, average = VERL[case]
    given = tensors()
    leaf = given["logprob"].clone().requires_grad_()
    config = sys.modules["verl.workers.config"].ActorConfig(
        clip_ratio=CLIP_LOW, clip_ratio_low=CLIP_LOW, clip_ratio_high=CISPO_HIGH if case == "cispo" else CLIP_HIGH,
        clip_ratio_c=1.3 if case == "dual_clip" else 1e6, global_batch_info={},
    )  # fmt: skip
    advantages = given["advantage"][:, None].expand_as(leaf)
    loss, _ = getattr(algos, function)(given["sampler"], leaf, advantages, given["mask"], average, config)
    loss.backward()
    assert leaf.grad is not None
    return {"loss": loss.item(), "gradient": leaf.grad[given["mask"].bool()].tolist()}


def verl_value(algos: ModuleType, average: str) -> dict[str, Any]:
    given = tensors()
    leaf = given["value"].clone().requires_grad_()
    loss, _ = algos.compute_value_loss(leaf, given["returns"], given["rollout_value"], given["mask"], CLIP_LOW, average)
    loss.backward()
    assert leaf.grad is not None
    return {"loss": loss.item(), "gradient": leaf.grad[given["mask"].bool()].tolist()}


def of_rto(repository: str) -> dict[str, Any]:
    """Records the losses of RTO's openrlhf/models/loss.py, with a stand-in for `masked_mean`."""

    def masked_mean(values: Tensor, mask: Tensor, dim: int) -> Tensor:
        return (values * mask).sum(dim) / mask.sum(dim)

    utils = ModuleType("rto.utils")
    utils.masked_mean = masked_mean  # pyright: ignore[reportAttributeAccessIssue]
    package = ModuleType("rto")
    package.__path__ = []
    sys.modules |= {"rto": package, "rto.utils": utils}
    path = Path(repository, "openrlhf", "models", "loss.py")
    losses = load("rto.loss", path)
    given, found = tensors(), {}
    inside = given["mask"].bool()
    advantages = given["advantage"][:, None].expand_as(inside)
    for name, leaf, function, others in (
        ("policy", given["logprob"], losses.PolicyLoss(CLIP_LOW), (given["sampler"], advantages)),
        ("value", given["value"], losses.ValueLoss(CLIP_LOW), (given["rollout_value"], given["returns"])),
    ):
        leaf = leaf.clone().requires_grad_()
        loss = function(leaf, *others, given["mask"])
        loss.backward()
        assert leaf.grad is not None
        found[name] = {"loss": loss.item(), "gradient": leaf.grad[inside].tolist()}
    return found


def verl_advantages(algos: ModuleType, function: str) -> list[float]:
    lengths = torch.tensor(RETURN_LENGTHS)
    mask = (torch.arange(MAX_LENGTH)[None] < lengths[:, None]).double()
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(len(lengths)), lengths - 1] = torch.tensor(REWARDS, dtype=torch.float64)
    index = torch.arange(len(REWARDS)).div(GROUP, rounding_mode="floor").numpy()
    advantages, _ = getattr(algos, function)(rewards, mask, index)
    return advantages[:, 0].tolist()


def verl_gae(algos: ModuleType) -> dict[str, list[float]]:
    """Records verl's returns, and its advantages before whitening. The tensor `returns` serves as rewards."""
    given = tensors()
    inside = given["mask"].bool()
    found = algos.compute_gae_advantage_return(given["returns"], given["value"], given["mask"], GAMMA, LAM)
    return {name: x[inside].tolist() for name, x in zip(("advantage", "returns"), found, strict=True)}


def verl_kl(algos: ModuleType) -> dict[str, list[float]]:
    """Records verl's estimates of the KL to the reference, for each token."""
    given = tensors()
    inside = given["mask"].bool()
    return {
        kind: algos.kl_penalty_forward(given["logprob"], given["reference"], kind)[inside].tolist()
        for kind in ("k1", "k2", "k3")
    }


def verl_overlong(folder: Path) -> list[float]:
    """Records the rewards of DAPO's reward manager for responses with OVERLONG_LENGTHS tokens and a score of 0 each."""

    class Data(list):
        def __getitem__(self, index: Any) -> Any:
            return Data(super().__getitem__(index)) if isinstance(index, slice) else super().__getitem__(index)

    def base(self: Any, config: Any, tokenizer: Any, compute_score: Any) -> None:
        self.tokenizer, self.loop = tokenizer, asyncio.get_running_loop()

    stand_ins = {
        "verl": {"DataProto": Data},
        "verl.experimental.reward_loop.reward_manager": {"register": lambda _: lambda cls: cls},
        "verl.experimental.reward_loop.reward_manager.base": {
            "RewardManagerBase": type("Base", (), {"__init__": base})
        },
        "verl.utils.reward_score": {"default_compute_score": None},
    }
    place = folder / "experimental" / "reward_loop" / "reward_manager" / "dapo.py"
    for name, members in stand_ins.items():
        sys.modules.setdefault(name, ModuleType(name))
        vars(sys.modules[name]).update(members)
    manager_module = load("verl_dapo", place)
    buffer = SimpleNamespace(enable=True, len=OVERLONG["buffer"], penalty_factor=OVERLONG["penalty"], log=False)
    settings = {"reward_kwargs": {"overlong_buffer_cfg": buffer, "max_resp_len": OVERLONG["limit"]}}

    def item(length: int) -> Data:
        mask = (torch.arange(OVERLONG["limit"]) < length).long()
        columns = {"data_source": "", "reward_model": {"ground_truth": ""}}
        batch = {"responses": torch.zeros_like(mask), "attention_mask": torch.cat([torch.ones(3).long(), mask])}
        return Data([SimpleNamespace(batch=batch, non_tensor_batch=columns)])

    async def rewards() -> list[float]:
        tokenizer = SimpleNamespace(decode=lambda *_, **__: "")
        manager = manager_module.DAPORewardManager(SimpleNamespace(reward=settings), tokenizer, lambda **_: 0.0)
        return [float((await manager.run_single(item(length)))["reward_score"]) for length in OVERLONG_LENGTHS]

    return asyncio.run(rewards())


def main() -> None:
    kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    recorders: dict[str, Callable[[], dict[str, Any]]] = {
        "trl": lambda: (
            {case: of_trl(case) for case in TRL}
            | {f"advantage_{scale}": trl_advantages(scale) for scale in ("none", "group", "batch")}
        ),
        "verl": lambda: (
            (algos := core_algos(folder := verl_folder()))
            and {case: of_verl(algos, case) for case in VERL}
            | {f"value_{name}": verl_value(algos, average) for name, average in VALUE_AVERAGES.items()}
            | {"advantage_opo": verl_advantages(algos, "compute_opo_outcome_advantage")}
            | {"advantage_rloo": verl_advantages(algos, "compute_rloo_outcome_advantage")}
            | {"gae": verl_gae(algos), "kl": verl_kl(algos)}
            | {"overlong": verl_overlong(folder)}
        ),
    }
    if repository := os.environ.get("RTO_REPO"):
        kept["rto"] = of_rto(repository)
    for library, record in recorders.items():
        if importlib.util.find_spec(library):
            kept[library] = record()
    FILE.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
