"""DR-PO from Python; half of the episodes start in a demonstration: python examples/drpo.py [MODEL] [REWARD_MODEL]"""

import sys
from typing import Any

from fastrlhf import DRPOConfig, load_examples, train_ppo


def main(
    model: str = "runs/sft", reward_model: str = "runs/reward", output_dir: str = "runs/drpo", **settings: Any
) -> None:
    demos = load_examples("examples/demos.jsonl", needs=["prompt", "reference"]).examples
    folders = {"model_name_or_path": model, "reward_model_path": reward_model, "output_dir": output_dir}
    config = DRPOConfig(**folders, reset_prob=0.5, per_device_train_batch_size=8, **settings)
    result = train_ppo(config, demos)
    print({name: result.history[-1][name] for name in ("objective/scores", "drpo/reset_fraction")})


if __name__ == "__main__":
    main(*sys.argv[1:])
