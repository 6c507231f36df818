"""GRPO from Python, rewarded by a function of the dataset's column `answer`: python examples/grpo.py [MODEL]"""

import sys
from typing import Any

from fastrlhf import GRPOConfig, load_examples, train_ppo


def correct(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(wanted in completion) for completion, wanted in zip(completions, answer, strict=True)]


def main(model: str = "Qwen/Qwen3-0.6B", output_dir: str = "runs/grpo", **settings: Any) -> None:
    prompts = load_examples("examples/sums.jsonl").examples
    folders = {"model_name_or_path": model, "output_dir": output_dir}
    config = GRPOConfig(**folders, num_generations=4, per_device_train_batch_size=8, **settings)
    result = train_ppo(config, prompts, reward_functions={"correct": correct})
    print({name: result.history[-1][name] for name in ("reward/correct", "completions/mean_length")})


if __name__ == "__main__":
    main(*sys.argv[1:])
