"""Commands that train nothing, or everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrlhf.config.checks import at_least, require
from fastrlhf.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class EvalConfig(TrainConfig):
    """Win rates of models against the responses of a dataset, or against each other, judged by a reward model."""

    models: tuple[str, ...] = ()
    """Folders or hub names of policies."""
    reward_model_path: str = ""
    """The judge."""
    opponent: str = "reference"
    """What they are compared with: a column (reference, chosen, rejected) or one of `models`."""
    response_length: int = 53
    """Tokens of a response at most."""
    temperature: float = 0.7
    """Of sampling; 0 takes the likeliest token."""
    rollout_batch_size: int = 64
    """Responses that are generated side by side."""
    decode: Literal["eager", "cuda_graph"] = "eager"
    """As in ppo: cuda_graph records a decode step and replays it. Not yet run on a GPU."""
    num_eval_examples: int = 500

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        at_least(self, 1, "response_length", "rollout_batch_size")
        at_least(self, 0, "temperature")
        require(self.decode == "eager" or self.device != "cpu", "decode", self.decode, "eager where device is cpu")
        require(self.response_length < self.max_length, "response_length", self.response_length, "below max_length")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole chain on the embedded task: SFT, reward model, DPO, PPO, DR-PO, evaluation."""

    out: str = "runs/demo"
    """Folder of the run; it must not hold one already."""
    seed: int = 0
    """Of the data, the weights and every sample."""
    methods: str = "sft,reward,dpo,ppo,drpo"
    """Which stages run, separated by commas, among sft, reward, dpo, ipo, cdpo, ppo, drpo, rto, drpo+rto, rlp-uml,
    rlp-spg; or "all"."""
    num_eval: int = 600
    """Held-out posts the methods are judged on."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_eval")
        at_least(self, 0, "seed")
