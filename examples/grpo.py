"""GRPO from Python, with a reward function beside the judge: python examples/grpo.py [MODEL] [REWARD_MODEL]"""

import sys
from typing import Any

from fastrlhf import load_examples, train_ppo
from fastrlhf.config import GRPOConfig


def brevity(completions: list[str], **_: Any) -> list[float]:
    return [-0.01 * len(completion) for completion in completions]


def main(
    model: str = "runs/sft", reward_model: str = "runs/reward", output_dir: str = "runs/grpo", **settings: Any
) -> None:
    prompts = load_examples("examples/demos.jsonl").examples
    folders = {"model_name_or_path": model, "reward_model_path": reward_model, "output_dir": output_dir}
    config = GRPOConfig(**folders, num_generations=4, per_device_train_batch_size=8, **settings)
    result = train_ppo(config, prompts, reward_functions={"brevity": brevity})
    print({name: result.history[-1][name] for name in ("objective/scores", "reward/brevity")})


if __name__ == "__main__":
    main(*sys.argv[1:])
