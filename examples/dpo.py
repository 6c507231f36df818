"""DPO from Python, on pairs made in memory: python examples/dpo.py [MODEL]"""

import sys
from typing import Any

from fastrlhf import DPOConfig, Example, train_dpo

PAIRS = [
    Example(prompt="What is 2 + 2?", chosen="It is 4.", rejected="I would rather not say.", row=0),
    Example(prompt="Name a warm colour.", chosen="Red.", rejected="Blue, which is cold.", row=1),
]


def main(model: str = "runs/sft", output_dir: str = "runs/dpo", **settings: Any) -> None:
    config = DPOConfig(model_name_or_path=model, output_dir=output_dir, beta=0.1, max_steps=4, **settings)
    result = train_dpo(config, PAIRS)
    print(f"first loss {result.history[0]['loss']:.4f}, last {result.history[-1]['loss']:.4f}")  # the first is ln 2


if __name__ == "__main__":
    main(*sys.argv[1:])
