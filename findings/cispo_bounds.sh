#!/usr/bin/env bash
# TRL and verl read the upper bound of CISPO's factor differently; this script shows it at both libraries' defaults.
#
# CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4) multiplies the log-prob by the probability ratio, clipped to
# 1 - epsilon_low .. 1 + epsilon_high and detached. Seen with trl 1.16.0 and verl 0.9.1:
#   * trl uses `epsilon_high` itself as the bound, not 1 + epsilon_high. If `epsilon_high` is not set, it uses
#     `epsilon` = 0.2. With loss_type "cispo" and all other settings at their defaults, the factor of an unchanged policy
#     (ratio 1) is 0.2 for every token: the gradient is a fifth of the intended one, without a warning.
#   * verl bounds the factor by 1 - clip_ratio_low and 1 + clip_ratio_high: at ratio 1 the factor is 1.
# A setting that is copied from one library to the other therefore changes the step size.
# The script exits with an error if either library behaves differently.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet "torch==2.13.0" "trl==1.16.0"
"$place/env/bin/pip" download --quiet --no-deps --dest "$place" "verl==0.9.1"
"$place/env/bin/python" -m zipfile -e "$place"/verl-0.9.1-*.whl "$place/verl"
cat > "$place/look.py" <<'PY'
import importlib.util
import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace

import torch
import trl
from trl import GRPOConfig, GRPOTrainer

ones = torch.ones(1, 3)
settings = GRPOConfig(output_dir="unused", loss_type="cispo", report_to="none", bf16=False)
high = settings.epsilon_high if settings.epsilon_high is not None else settings.epsilon


def of_trl():
    logprob = torch.full((1, 3), -1.0, requires_grad=True)
    trainer = SimpleNamespace(
        loss_type="cispo", importance_sampling_level="token", beta=0.0, epsilon_low=settings.epsilon, epsilon_high=high,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, _entropy_bonus_enabled=False,
        max_completion_length=3, current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True),
        vllm_importance_sampling_correction=False, aux_loss_enabled=False, _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, torch.zeros(1, 3), None),
    )
    ids = torch.zeros(1, 3, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids + 1, "completion_ids": ids, "completion_mask": ids + 1,
        "advantages": torch.ones(1), "old_per_token_logps": logprob.detach(), "num_items_in_batch": torch.tensor(3.0),
    }
    GRPOTrainer._compute_loss(trainer, None, inputs).backward()
    return -3 * logprob.grad[0, 0].item()


def of_verl(root):
    class Config(SimpleNamespace):
        pass

    def masked_sum(x, mask):
        return (x * mask).sum()

    functional = {"masked_sum": masked_sum, "masked_mean": lambda x, m: masked_sum(x, m) / m.sum()}
    members = {
        "omegaconf": {"DictConfig": Config}, "verl": {}, "verl.trainer": {}, "verl.workers": {},
        "verl.utils": {"as_torch_index": None, "group_mean_std": None}, "verl.utils.torch_functional": functional,
        "verl.trainer.config": {"AlgoConfig": type("AlgoConfig", (), {})}, "verl.workers.config": {"ActorConfig": Config},
        "verl.utils.import_utils": {"deprecated": lambda _: lambda function: function},
    }
    for name, content in members.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    sys.modules["verl.utils"].torch_functional = sys.modules["verl.utils.torch_functional"]
    sys.modules["verl"].utils = sys.modules["verl.utils"]
    spec = importlib.util.spec_from_file_location("core_algos", f"{root}/verl/trainer/ppo/core_algos.py")
    algos = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(algos)
    logprob = torch.full((1, 3), -1.0, requires_grad=True)
    config = Config(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2, global_batch_info={})
    loss, _ = algos.compute_policy_loss_cispo(logprob.detach(), logprob, ones, ones, "token-mean", config)
    loss.backward()
    return -3 * logprob.grad[0, 0].item()


found = {"trl": round(of_trl(), 6), "verl": round(of_verl(sys.argv[1]), 6)}
print(f"torch {torch.__version__}, trl {trl.__version__}, verl 0.9.1: factor of a token at ratio 1: {found}")
sys.exit(found != {"trl": 0.2, "verl": 1.0})
PY
"$place/env/bin/python" "$place/look.py" "$place/verl"
