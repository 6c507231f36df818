#!/usr/bin/env bash
# TRL's DPOTrainer accepts `label_smoothing` for loss types that ignore it; this script shows which.
#
# label_smoothing is the assumed share of pairs with swapped labels. Conservative DPO (cDPO) is the sigmoid loss with it.
# Seen with trl 1.16.0: for loss_type "sigmoid" and "ipo" the loss of a batch is the same bit for bit with
# label_smoothing 0 and 0.3, and no warning is printed; "robust" is the loss that reads it. A configuration that was
# written for cDPO on an older release therefore trains plain DPO.
# The script exits with an error if any of the three loss types behaves differently.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet "torch==2.13.0" "trl==1.16.0"
cat > "$place/look.py" <<'PY'
import sys
import warnings

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(29))])}
text = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
text.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=text, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
rows = [{"prompt": f"w{i} w1", "chosen": f" w{i + 2} w3", "rejected": f" w{i + 4}"} for i in range(4)]


def model(seed):
    torch.manual_seed(seed)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **small))


def loss(place, kind, smoothing):
    trainer = trl.DPOTrainer(
        model=model(0),
        ref_model=model(1),
        args=trl.DPOConfig(
            output_dir=place, loss_type=kind, label_smoothing=smoothing, beta=0.5, report_to="none", use_cpu=True, bf16=False
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    return trainer.compute_loss(trainer.model, batch).item()


with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    found = {kind: [loss(sys.argv[1], kind, e) for e in (0.0, 0.3)] for kind in ("sigmoid", "ipo", "robust")}
about = [str(each.message) for each in warned if "smoothing" in str(each.message)]
print(f"torch {torch.__version__}, trl {trl.__version__}: losses at label_smoothing 0 and 0.3: {found}; warnings: {about}")
ignored = {kind: first == second for kind, (first, second) in found.items()}
sys.exit(bool(about) or ignored != {"sigmoid": True, "ipo": True, "robust": False})
PY
"$place/env/bin/python" "$place/look.py" "$place/run" 2> "$place/stderr" || { cat "$place/stderr"; exit 1; }
