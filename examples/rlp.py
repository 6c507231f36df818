"""RLP from Python, with a function that says which answers mean the same: python examples/rlp.py [MODEL]"""

import sys
from typing import Any

from fastrlhf import PPOConfig, RewardConfig, RLPConfig, load_examples, train_rlp


def main(model: str = "runs/sft", output_dir: str = "runs/rlp", **settings: Any) -> None:
    pairs = load_examples("examples/pairs.jsonl", needs=["prompt", "chosen", "rejected"]).examples
    prompts = load_examples("examples/demos.jsonl").examples
    config = RLPConfig(output_dir=output_dir, refinement="spg", equivalence="exact", num_answers=4)
    reward = RewardConfig(model_name_or_path=model, per_device_train_batch_size=8)
    policy = PPOConfig(model_name_or_path=model, per_device_train_batch_size=8, **settings)
    result = train_rlp(config, reward, policy, pairs=pairs, prompts=prompts)
    print(f"the last policy is in {result.output_dir}")


if __name__ == "__main__":
    main(*sys.argv[1:])
