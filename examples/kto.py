"""KTO from Python, on labelled responses made in memory: python examples/kto.py [MODEL]"""

import sys
from typing import Any

from fastrlhf import Example, KTOConfig, train_kto

ROWS = [
    Example(prompt="What is 2 + 2?", reference="It is 4.", label=True, row=0),
    Example(prompt="Name a warm colour.", reference="Blue, which is cold.", label=False, row=1),
]


def main(model: str = "runs/sft", output_dir: str = "runs/kto", **settings: Any) -> None:
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, **settings}
    result = train_kto(KTOConfig(model_name_or_path=model, output_dir=output_dir, **settings), ROWS)
    print(f"first loss {result.history[0]['loss']:.4f}, last {result.history[-1]['loss']:.4f}")  # the first is 1/2


if __name__ == "__main__":
    main(*sys.argv[1:])
