#!/usr/bin/env bash
# AutoTokenizer ignores the tokenizer.json of a folder whose model type is qwen2 and encodes text with other rules.
#
# The folder holds a tokenizer that was saved by save_pretrained and a config.json. Seen with transformers 5.24.0:
#   - with model_type "llama" the loaded tokenizer gives the same tokens as the saved one;
#   - with model_type "qwen2", "qwen3_5" or "qwen3_5_moe" AutoTokenizer returns the tokenizer class of that family,
#     although tokenizer_config.json names another one. The class keeps the vocabulary and builds its own normalisation
#     and splitting: a vocabulary of whole words encodes every text as an empty list, without an error or a warning;
#   - PreTrainedTokenizerFast.from_pretrained of the same folder gives the saved tokenizer's tokens.
# A checkpoint of the type qwen2 with a tokenizer of another origin is trained on other tokens than it was made for.
# The script exits with an error if one of these results changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet "torch==2.13.0" "transformers==5.24.0"
cat > "$place/look.py" <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "good": 3, "answer": 4}
text = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
text.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
saved = PreTrainedTokenizerFast(tokenizer_object=text, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
as_before = True
for kind in ("llama", "qwen2", "qwen3_5", "qwen3_5_moe"):
    folder = Path(sys.argv[1]) / kind
    saved.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    auto, direct = AutoTokenizer.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    found = [each("good answer")["input_ids"] for each in (auto, direct)]
    print(f"{kind}: {type(auto).__name__} gives {found[0]}, the stored tokenizer {found[1]}")
    as_before &= found == [[3, 4] if kind == "llama" else [], [3, 4]]
sys.exit(0 if as_before else 1)
PY
"$place/env/bin/python" "$place/look.py" "$place" 2> "$place/noise" || { cat "$place/noise"; exit 1; }
