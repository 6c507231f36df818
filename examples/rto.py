"""RTO from Python: a DPO model rewards every token: python examples/rto.py [MODEL] [REWARD_MODEL] [DPO_MODEL]"""

import sys
from typing import Any

from fastrlhf import RTOConfig, load_examples, train_ppo


def main(
    model: str = "runs/sft",
    reward_model: str = "runs/reward",
    dpo_model: str = "runs/dpo",
    output_dir: str = "runs/rto",
    **settings: Any,
) -> None:
    prompts = load_examples("examples/demos.jsonl").examples
    models = {"model_name_or_path": model, "reward_model_path": reward_model, "dpo_model_path": dpo_model}
    config = RTOConfig(**models, output_dir=output_dir, per_device_train_batch_size=8, **settings)
    result = train_ppo(config, prompts)
    print({name: result.history[-1][name] for name in ("objective/scores", "reward/dpo", "rto/share_of_return")})


if __name__ == "__main__":
    main(*sys.argv[1:])
