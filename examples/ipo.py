"""IPO with a probability per label in place of hard labels: python examples/ipo.py [MODEL]"""

import sys
from typing import Any

from fastrlhf import DPOConfig, Example, train_dpo

PAIRS = [
    Example(prompt="What is 2 + 2?", chosen="It is 4.", rejected="I would rather not say.", label_prob=0.95, row=0),
    Example(prompt="Name a colour.", chosen="Red.", rejected="Blue.", label_prob=0.5, row=1),  # both are equally good
]


def main(model: str = "runs/sft", output_dir: str = "runs/ipo", **settings: Any) -> None:
    losses = {"loss_type": "ipo", "label_source": "label_prob", "beta": 0.1}
    config = DPOConfig(model_name_or_path=model, output_dir=output_dir, max_steps=4, **losses, **settings)
    result = train_dpo(config, PAIRS)
    print(f"margin of the log-ratios times beta: {result.history[-1]['rewards/margins']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
