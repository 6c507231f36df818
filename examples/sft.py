"""Supervised fine-tuning from Python: python examples/sft.py [MODEL]"""

import sys
from typing import Any

from fastrlhf import SFTConfig, load_examples, train_sft


def main(model: str = "Qwen/Qwen3-0.6B-Base", output_dir: str = "runs/sft", **settings: Any) -> None:
    demos = load_examples("examples/demos.jsonl", needs=["prompt", "reference"]).examples
    config = SFTConfig(model_name_or_path=model, output_dir=output_dir, num_train_epochs=1, **settings)
    result = train_sft(config, demos[:-4], eval_examples=demos[-4:])
    print(f"nats per held-out token: {result.final['eval_loss']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
