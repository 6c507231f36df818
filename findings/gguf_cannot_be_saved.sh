#!/usr/bin/env bash
# transformers refuses to save a model that it has read from a GGUF file, even if the file holds float32 weights.
#
# Seen with transformers 5.24.0 and gguf 0.19.0, for a file with one Llama layer whose weights are all float32:
#   - from_pretrained(folder, gguf_file=...) returns a float32 model whose config has a quantization_config;
#   - save_pretrained of this model raises ValueError: "The model is quantized with gguf and is not serializable";
#   - a new model of the same configuration without quantization_config, with the state dict of the first, can be saved,
#     and the saved folder has the weights of the file.
# The script exits with an error if one of these results changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet "torch==2.13.0" "transformers==5.24.0" "gguf==0.19.0" "accelerate==1.15.0"
cat > "$place/look.py" <<'PY'
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

place, tokens = Path(sys.argv[1]), ["<eos>", "a", "b", "ab"]
writer = gguf.GGUFWriter(place / "tiny.gguf", "llama")
writer.add_context_length(64)
writer.add_embedding_length(8)
writer.add_block_count(1)
writer.add_feed_forward_length(16)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_dimension_count(4)
writer.add_vocab_size(len(tokens))
writer.add_tokenizer_model("gpt2")
writer.add_token_list(tokens)
writer.add_token_merges(["a b"])
writer.add_token_types([3, 1, 1, 1])
shapes = {"attn_q": (8, 8), "attn_k": (8, 8), "attn_v": (8, 8), "attn_output": (8, 8), "attn_norm": (8,)}
shapes |= {"ffn_gate": (16, 8), "ffn_up": (16, 8), "ffn_down": (8, 16), "ffn_norm": (8,)}
named = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
draw = np.random.default_rng(0)
for name, shape in {**named, "token_embd.weight": (len(tokens), 8), "output_norm.weight": (8,)}.items():
    writer.add_tensor(name, draw.normal(size=shape).astype(np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

read = AutoModelForCausalLM.from_pretrained(place, gguf_file="tiny.gguf")
marked = hasattr(read.config, "quantization_config")
try:
    read.save_pretrained(place / "first")
    message = ""
except ValueError as error:
    message = str(error)
print(f"dtype {read.dtype}, quantization_config: {marked}, save_pretrained: {message or 'saved'}")
del read.config.quantization_config
plain = AutoModelForCausalLM.from_config(read.config)
plain.load_state_dict(read.state_dict())
plain.save_pretrained(place / "second")
again = AutoModelForCausalLM.from_pretrained(place / "second").state_dict()
same = all(torch.equal(weight, again[name]) for name, weight in read.state_dict().items())
print(f"copied into a new model: saved, weights equal: {same}")
sys.exit(not (read.dtype == torch.float32 and marked and "not serializable" in message and same))
PY
"$place/env/bin/python" "$place/look.py" "$place" 2> "$place/noise" || { cat "$place/noise"; exit 1; }
