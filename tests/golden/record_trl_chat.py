"""Records how TRL tokenises text and conversations with a byte-level vocabulary, in trl_chat.json:

    space     the ids and the cut between prompt and response of texts whose prompt ends in white space
    chatml    loss, gradients and token ids of SFT and IPO on ChatML conversations; ChatML writes a newline after
              every turn, and the newline after the last turn is included
    newline   as chatml, with a template that writes the newline before every turn, so that it is not trained

TRL is only needed to run this script, in the versions that the file names; see record_trl.py.

    export PYTHONPATH=.:kernels HF_HUB_OFFLINE=1
    python tests/golden/record_trl_chat.py     # trl 1.16.0
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests import tiny
from tests.data import vocabularies
from tests.data.chat_templates import CHATML
from tests.golden import record_trl as recorded

FILE = Path(__file__).with_name("trl_chat.json")

SPACED = [  # prompt, chosen, rejected
    ("def: ", "f", "fed"),
    ("def:  ", "f", "d"),
    ("def:\n\n", "f", "d"),
    ("def:\n", "f", "d"),
    ("def: ", " f", "f"),
    ("def:", " f", " d"),
    ("def: \n ", "f", "f f"),
    ("def:\t", "f", "d"),
]
CONVERSATIONS = [  # turns of the prompt, chosen, rejected
    (["def f"], "f def", "d"),
    (["e", "def", "d e"], "fed", "def def f"),
    (["f f f"], "de\n\nf", "f"),
    (["d"], "e e e e e", "f"),
]
END = "<|im_end|>"
NEWLINE_FIRST = CHATML.replace(f"{END}\n", END).replace(
    "<|im_start|>", "{{ '' if loop.first else '\n' }}<|im_start|>", 1
)
NEWLINE_FIRST = NEWLINE_FIRST.replace("%}<|im_start|>assistant", "%}{{ '\n' }}<|im_start|>assistant")
TEMPLATES = {"chatml": CHATML, "newline": NEWLINE_FIRST}
IPO_BETA = 0.2


def conversation(turns: list[str], answer: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    roles = ["user", "assistant"] * len(turns)
    prompt = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return prompt, [{"role": "assistant", "content": answer}]


def causal_lm(seed: int) -> PreTrainedModel:
    config = tiny.model_config()
    config.vocab_size = len(vocabularies.byte_level())
    config.eos_token_id, config.bos_token_id, config.pad_token_id = None, None, None
    return recorded.with_formula_weights(AutoModelForCausalLM.from_config(config), seed)


def trainer(kind: str, rows: list[dict[str, Any]], folder: str, template: str, **settings: Any) -> Any:
    import trl
    from datasets import Dataset

    tokenizer = vocabularies.byte_level()
    tokenizer.chat_template, tokenizer.pad_token = template, "<unk>"
    common = {"output_dir": folder, "report_to": "none", "use_cpu": True, "bf16": False, **settings}
    models = {"model": causal_lm(recorded.POLICY)}
    if kind == "dpo":
        models["ref_model"] = causal_lm(recorded.REFERENCE)
    made = {"sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig)}[kind]
    return made[0](**models, args=made[1](**common), train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def record_space(folder: str) -> dict[str, Any]:
    """Records the number of untrained ids and all ids (SFT), or the ids of prompt, chosen and rejected (DPO)."""
    demonstrations = [{"prompt": prompt, "completion": chosen} for prompt, chosen, _ in SPACED]
    sft = trainer("sft", demonstrations, folder, CHATML).train_dataset
    pairs = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in SPACED]
    dpo = trainer("dpo", pairs, folder, CHATML).train_dataset
    return {
        "sft": [[row["labels"].count(-100), *row["input_ids"]] for row in sft],
        "dpo": [[row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")] for row in dpo],
    }


def record_chat(folder: str, template: str) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {"sft": [], "dpo": []}
    for turns, chosen, rejected in CONVERSATIONS:
        prompt, better = conversation(turns, chosen)
        rows["sft"].append({"prompt": prompt, "completion": better})
        rows["dpo"].append({"prompt": prompt, "chosen": better, "rejected": conversation(turns, rejected)[1]})
    settings = {"sft": {}, "dpo": {"loss_type": "ipo", "beta": IPO_BETA}}
    result = {}
    for kind, of_kind in rows.items():
        made = trainer(kind, of_kind, folder, template, **settings[kind])
        batch = made.data_collator(list(made.train_dataset))
        made.model.train()
        loss = made.compute_loss(made.model, dict(batch))
        loss.backward()
        squares = [param.grad.double().square().sum() for param in made.model.parameters()]
        seen = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        result[kind] = {
            "loss": loss.item(),
            "grad_norm": torch.stack(squares).sum().sqrt().item(),
            "gradients": recorded.gradients_of(made.model),
            "token_ids": [ids[mask.bool()].tolist() for ids, mask in seen],
        }
    return result


def main() -> None:
    import trl

    if trl.__version__ != "1.16.0":
        raise ValueError(f"recorded from trl==1.16.0, not {trl.__version__}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        golden = {
            "versions": {module.__name__: module.__version__ for module in (trl, torch, transformers)},
            "space": record_space(folder),
            **{name: record_chat(folder, template) for name, template in TEMPLATES.items()},
        }
    text = json.dumps(recorded.rounded(golden), indent=1)
    FILE.write_text(re.sub(r"\[[^][{}]*\]", lambda match: " ".join(match[0].split()), text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
