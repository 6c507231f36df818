"""A reward model from Python, and its score of a response: python examples/reward.py [MODEL]"""

import sys
from typing import Any

import torch

from fastrlhf import RewardConfig, load_examples, train_reward_model


def main(model: str = "runs/sft", output_dir: str = "runs/reward", **settings: Any) -> None:
    pairs = load_examples("examples/pairs.jsonl", needs=["prompt", "chosen", "rejected"]).examples
    config = RewardConfig(model_name_or_path=model, output_dir=output_dir, **settings)
    result = train_reward_model(config, pairs)
    ids = result.tokenizer(f"{pairs[0].prompt}{pairs[0].chosen}", return_tensors="pt").input_ids
    with torch.no_grad():
        score = result.model(ids.to(result.model.device)).logits.item()
    print(f"accuracy on the last batch: {result.history[-1]['accuracy']:.2f}; score of a response: {score:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
