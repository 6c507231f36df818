#!/usr/bin/env bash
# TRL's reward trainer reads the score before the EOS if a tokenizer's padding token is its EOS.
#
# A response ends in an EOS, which TRL appends if it is missing. The sequence classifiers of transformers read the score
# at the last token that is not a padding token. Seen with trl 1.16.0 and transformers 5.24.0:
#   - if the padding token is the EOS, as in the tokenizer of SmolLM2-Instruct, the EOS counts as padding, and the score
#     is read at the token before it, in training and afterwards. The trainer does not warn;
#   - if the padding token is another token, the score is read at the EOS.
# A reward model that was trained in the first way gives scores for which it was not trained if its scores are later
# read at the EOS. RewardConfig(pad_token=...) names another padding token.
# The script exits with an error if either position changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet "torch==2.13.0" "transformers==5.24.0" "trl==1.16.0"
cat > "$place/look.py" <<'PY'
import sys

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

torch.manual_seed(0)
words = {"<unk>": 0, "<eos>": 1, "question": 2, "good": 3, "bad": 4}
text = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
text.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
rows = [{"prompt": "question", "chosen": " good good <eos>", "rejected": " bad <eos>"}]
place = {}
for pad in ("<eos>", "<unk>"):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text, pad_token=pad, eos_token="<eos>", unk_token="<unk>")
    model = LlamaForSequenceClassification(LlamaConfig(
        vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1))
    settings = trl.RewardConfig(output_dir=sys.argv[1], report_to=[], use_cpu=True, bf16=False, max_length=None)
    data = Dataset.from_list(rows)
    trainer = trl.RewardTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    model.eval()
    with torch.no_grad():
        score = model(batch["input_ids"], batch["attention_mask"]).logits[0, 0]
        every = model.score(model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state)[0, :, 0]
    ids = batch["input_ids"][0].tolist()
    place[pad] = int((every - score).abs().argmin())
    print(f"padding token {pad}: ids {ids}, the score is read at position {place[pad]}, the EOS is at {ids.index(1)}")
print(f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}")
sys.exit(place != {"<eos>": 2, "<unk>": 3})
PY
export HF_HUB_OFFLINE=1
"$place/env/bin/python" "$place/look.py" "$place/out" 2> "$place/noise" || { cat "$place/noise"; exit 1; }
