"""Lists the methods of a configuration, each with its equation and its papers, for a model card."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from fastrlhf.config import DPOConfig, KTOConfig, PPOConfig, RewardConfig, SFTConfig, TrainConfig


@dataclass(frozen=True)
class Method:
    """One method: a loss, an estimator, or a rule for starts, rewards or weights."""

    tag: str
    """Name of the method as a tag on the hub."""
    name: str
    equation: str = ""
    """The loss, or the quantity that the method defines, in plain text; may be empty."""
    source: str = ""
    """The place of the equation in the paper, for example "eq. 7"."""
    papers: tuple[str, ...] = ()
    """Keys in PAPERS, the source of the equation first."""


SFT = Method("sft", "Supervised fine-tuning (SFT)", "loss = -mean over tokens of log pi(token | prompt, tokens before)")
REWARD = Method(
    "reward-model",
    "Reward model of Bradley and Terry",
    "loss = -log(sigmoid(r(x, chosen) - r(x, rejected)))",
    "section 3.4",
    ("stiennon2020reward",),
)
RLP = Method(
    "rlp",
    "Reward learning on policy (RLP): the reward model is refitted with answers of the policy, "
    "and the policy is trained again",
    source="algorithm 1",
    papers=("lang2024rlp",),
)
KTO = Method(
    "kto",
    "Kahneman-Tversky optimisation (KTO)",
    "loss = w_D * (1 - sigmoid(beta * (u - z))) if desirable, w_U * (1 - sigmoid(beta * (z - u))) if undesirable; "
    "u = log pi(y|x) - log pi_ref(y|x), z = max(0, estimate of the KL)",
    "",
    ("ethayarajh2024kto",),
)
PSIPO = Method(
    "psipo",
    "PsiPO",
    "least squares for u(y) - u(y') = (g(y) - g(y')) / beta; g(y) = mean over y' of psi(P(y is preferred to y'))",
    "eq. 12",
    ("azar2023ipo",),
)
PSI_REWARD = Method(
    "psipo",
    "PsiPO as a reward",
    "score = mean over the opponents y' of psi(sigmoid(r(y) - r(y')))",
    "eq. 7",
    ("azar2023ipo",),
)
PAIRS = {
    "sigmoid": Method("dpo", "Direct preference optimisation (DPO)", "{dpo}", "eq. 7", ("rafailov2023dpo",)),
    "ipo": Method("ipo", "Identity preference optimisation (IPO)", "{ipo}", "eq. 17", ("azar2023ipo",)),
    "hinge": Method("hinge", "Hinge loss (SLiC)", "max(0, 1 - z)", "", ("zhao2023slic",)),
    "robust": Method(
        "robust-dpo",
        "Robust DPO",
        "(-(1 - e) * log(sigmoid(z)) + e * log(sigmoid(-z))) / (1 - 2 * e), e = label_smoothing",
        "",
        ("chowdhury2024robust",),
    ),
    "apo_zero": Method(
        "apo",
        "Anchored preference optimisation (APO-zero)",
        "sigmoid(-beta * u(chosen)) + sigmoid(beta * u(rejected))",
        "eq. 7",
        ("doosterlinck2024apo",),
    ),
    "apo_down": Method(
        "apo",
        "Anchored preference optimisation (APO-down)",
        "sigmoid(beta * u(chosen)) + sigmoid(-beta * D)",
        "eq. 8",
        ("doosterlinck2024apo",),
    ),
    "simpo": Method("simpo", "SimPO", "{dpo}", "eq. 6", ("meng2024simpo",)),
    "cpo": Method("cpo", "Contrastive preference optimisation (CPO)", "{dpo}", "eq. 3", ("xu2024cpo",)),
    "orpo": Method(
        "orpo",
        "Odds ratio preference optimisation (ORPO)",
        "-beta * log(sigmoid(o(chosen) - o(rejected))), o(y) = u(y) - log(1 - exp(u(y)))",
        "eq. 7",
        ("hong2024orpo",),
    ),
    "sft": Method("sft", "SFT term", "-mean over the tokens of chosen of log pi"),
}
"""Name of a loss of `dpo` -> method. {dpo} and {ipo} are the losses that depend on the labels (see
`_offline_pairs`)."""

RATIO = "r = pi / pi_old of a token, A its advantage, e = cliprange"
CLIPPED = f"loss = -mean of min(r * A, clip(r, 1 - e, 1 + e) * A); {RATIO}"
CLIPPED_LOSSES = {
    "ppo": Method("ppo", "Proximal policy optimisation (PPO)", CLIPPED, "eq. 7", ("schulman2017ppo",)),
    "grpo": Method(
        "grpo", "GRPO's loss: mean over each episode, then over episodes", CLIPPED, "eq. 3", ("shao2024grpo",)
    ),
    "dapo": Method("dapo", "DAPO's loss: mean over all tokens", CLIPPED, "eq. 8", ("yu2025dapo",)),
    "bnpo": Method("bnpo", "The clipped loss, mean over all tokens", CLIPPED, "eq. 7", ("schulman2017ppo",)),
    "dr_grpo": Method(
        "dr-grpo", "Dr. GRPO's loss: sum over tokens, divided by a constant", CLIPPED, "", ("liu2025drgrpo",)
    ),
    "cispo": Method(
        "cispo",
        "CISPO",
        "loss = -mean of min(r, 1 + e) * A * log pi, without a gradient through r; r = pi / pi_old of a token, "
        "A its advantage",
        "eq. 4",
        ("minimax2025cispo",),
    ),
    "gspo": Method(
        "gspo",
        "Group sequence policy optimisation (GSPO)",
        "loss = -mean over episodes of min(s * A, clip(s, 1 - e, 1 + e) * A); s = geometric mean of pi / pi_old over "
        "the tokens of an episode",
        "eq. 5",
        ("zheng2025gspo",),
    ),
}
"""`loss_type` of on-policy runs -> method."""

REBEL = "loss = (D - pair_eta * (R - R'))^2; D = difference of log pi / pi_old of two responses, R, R' their returns"
ROLLOUT_PAIRS = {
    "rebel": Method(
        "rebel",
        "REBEL",
        REBEL,
        "",
        ("gao2024rebel",),
    ),
    "refuel": Method(
        "refuel",
        "REFUEL: REBEL from reset states",
        REBEL,
        "",
        ("gao2024refuel", "gao2024rebel"),
    ),
    "dpo": Method(
        "online-dpo",
        "Online DPO",
        "loss = -log(sigmoid(pair_beta * D)); D = difference of log pi / pi_ref of two responses of the policy, the "
        "response with the higher return first",
        "",
        ("guo2024online", "rafailov2023dpo"),
    ),
    "ipo": Method(
        "online-ipo",
        "Online IPO",
        "loss = (D - (sigmoid(R - R') - 1/2) / pair_beta)^2 on pairs of the policy's own responses; D = difference of "
        "log pi / pi_ref, R and R' the returns",
        "",
        ("calandriello2024online", "azar2023ipo"),
    ),
}
"""`pair_loss` of on-policy runs (refuel: rebel with resets) -> method."""

ESTIMATORS = {
    "gae": Method(
        "gae",
        "Advantages: generalised advantage estimation (GAE) with a critic V",
        "A_t = sum over l of (gamma * lam)^l * (r_(t+l) + gamma * V_(t+l+1) - V_(t+l))",
        "eq. 16",
        ("schulman2016gae",),
    ),
    "rloo": Method(
        "rloo",
        "Advantages: leave-one-out baseline (RLOO)",
        "A_i = R_i - mean of the other returns of the group",
        "eq. 8",
        ("ahmadian2024rloo",),
    ),
    "grpo": Method(
        "grpo",
        "Advantages: standardised within groups (GRPO)",
        "A_i = (R_i - mean R) / std R",
        "section 4.1.2",
        ("shao2024grpo",),
    ),
    "dr_grpo": Method(
        "dr-grpo", "Advantages: centred within groups (Dr. GRPO)", "A_i = R_i - mean R", "", ("liu2025drgrpo",)
    ),
    "opo": Method(
        "opo",
        "Advantages: baseline weighted by length (OPO)",
        "A_i = R_i - sum_j l_j * R_j / sum_j l_j; l_j = number of tokens",
        "",
        ("hao2025opo",),
    ),
    "prime": Method(
        "prime",
        "Advantages: leave-one-out for outcomes and token rewards separately (PRIME)",
        "",
        "",
        ("cui2025prime",),
    ),
}
"""`advantage_estimator` (dr_grpo: grpo without a scale) -> method."""

DRPO = Method(
    "dr-po",
    "Dataset reset policy optimisation (DR-PO): episodes start inside responses of the dataset",
    "start = prompt and the first k tokens of a response, k uniform",
    "algorithm 2",
    ("chang2024drpo",),
)
PPO_PP = Method(
    "ppo++", "PPO++: episodes start inside responses that the reference samples", "", "", ("chang2023ppopp",)
)
RRPO = Method(
    "rrpo",
    "Random-reset policy optimisation (RRPO): episodes start inside failed responses of the policy",
    "",
    "",
    ("samanta2026rrpo",),
)
RTO = Method(
    "rto",
    "Reinforced token optimisation (RTO): a DPO model rewards the tokens",
    "r_t = dpo_reward_scale * log(pi_dpo / pi_ref) of the token, plus the other rewards",
    "eq. 4.7",
    ("zhong2024rto",),
)
PRIME = Method(
    "prime",
    "PRIME: the model of the token rewards learns from outcomes",
    "",
    "",
    ("cui2025prime",),
)
DAPO = Method("dapo", "Parts of DAPO: dynamic sampling or a penalty on overlong responses", "", "", ("yu2025dapo",))
LORA = Method("lora", "Low-rank adapter (LoRA)", "W + (lora_alpha / lora_r) * B A", "eq. 3", ("hu2021lora",))
RSLORA = Method("rslora", "rsLoRA", "W + (lora_alpha / sqrt(lora_r)) * B A", "", ("kalajdzievski2023rslora",))
DORA = Method("dora", "DoRA: norms and directions of weight vectors apart", "", "", ("liu2024dora",))
QLORA = Method("qlora", "QLoRA: frozen weights in 4 bits", "", "", ("dettmers2023qlora",))


_chain: ContextVar[tuple[Method, ...]] = ContextVar("chain", default=())
"""Methods of the command that has started this run as a part (RLP); empty for other runs."""


@contextmanager
def part_of(*methods: Method) -> Iterator[None]:
    """Context in which the cards of all runs name the given methods as well; RLP uses it for the runs that it
    starts."""
    token = _chain.set(methods)
    try:
        yield
    finally:
        _chain.reset(token)


def methods_of(config: TrainConfig) -> list[Method]:
    """Returns the methods of a run, in this order: the methods of which it is a part, its loss, all others."""
    return [*_chain.get(), *_losses(config), *_adapter(config)]


def _losses(config: TrainConfig) -> Iterator[Method]:
    match config:
        case SFTConfig():
            yield SFT
        case RewardConfig():
            margin = "r(x, rejected) - margin_scale * margin" if config.margin_scale else "r(x, rejected)"
            yield replace(REWARD, equation=REWARD.equation.replace("r(x, rejected)", margin))
        case KTOConfig():
            yield KTO
        case DPOConfig():
            yield from _offline_pairs(config)
        case PPOConfig():
            yield from _on_policy(config)


def _offline_pairs(config: DPOConfig) -> Iterator[Method]:
    """Yields the description of each pair loss, with the formulas of its labels, its margins and its reference."""
    smoothed = ", e = label_smoothing"
    dpo, ipo = "-log(sigmoid(z))", "(D - 1 / (2 * beta))^2"
    if config.label_source != "data":
        soft = ", p = probability that chosen is better"
        dpo = f"-p * log(sigmoid(z)) - (1 - p) * log(sigmoid(-z)){soft}"
        ipo = f"(D - (p - 1/2) / beta)^2{soft}"
    elif config.label_smoothing:
        dpo = f"-(1 - e) * log(sigmoid(z)) - e * log(sigmoid(-z)){smoothed}"
        ipo = f"(D - (1 - 2 * e) / (2 * beta))^2{smoothed}"
    for name in config.losses:
        if ":" in name:
            yield Method("preference-loss", f"User-defined loss on pairs: {name.rpartition(':')[2]}")
            continue
        method = PAIRS[name]
        if name == "ipo" and (config.psi_backend == "groupwise" or config.psi != "identity"):
            method = replace(PSIPO, equation=f"{PSIPO.equation}; {_log_ratio(config, name)}")
        elif name != "sft":
            equation = method.equation.format(dpo=dpo, ipo=ipo)
            words = {*re.findall(r"[a-zA-Z]+", equation)}
            margin = " - simpo_gamma" if name == "simpo" else ""
            margin += " - margin_scale * margin" if config.margin_scale else ""
            defined = [f"z = beta * D{margin}"] if "z" in words else []
            defined += ["D = u(chosen) - u(rejected)"] if words & {"z", "D"} else []
            method = replace(method, equation="; ".join([f"loss = {equation}", *defined, _log_ratio(config, name)]))
        else:
            method = replace(method, equation=f"loss = {method.equation}")
        if name == "sigmoid" and config.label_smoothing:
            method = replace(method, tag="cdpo", name="DPO with smoothed labels (cDPO)", source="")
            method = replace(method, papers=("mitchell2023cdpo", *method.papers))
        yield method


def _log_ratio(config: DPOConfig, name: str) -> str:
    """Returns the definition of u, the log-ratio or log-prob of a response."""
    norm = "sum" if config.psi_backend == "groupwise" else config.length_norm_of(name)
    over = {"pair_mean": "sum over tokens, divided by the mean length of the pair,"}.get(norm, f"{norm} over tokens")
    free = name in config.reference_free_losses
    return f"u(y) = {over} of {'log pi' if free else 'log pi - log pi_ref'}"


def _on_policy(config: PPOConfig) -> Iterator[Method]:
    if config.update == "pair":
        resets = config.pair_loss == "rebel" and config.reset_prob > 0
        yield ROLLOUT_PAIRS["refuel" if resets else config.pair_loss]
    else:
        yield CLIPPED_LOSSES[config.loss_type]
    unscaled = config.advantage_estimator == "grpo" and config.scale_rewards == "none"
    yield ESTIMATORS["dr_grpo" if unscaled else config.advantage_estimator]
    if config.reset_prob > 0:
        yield {"sample": PPO_PP, "rollout": RRPO}.get(config.reset_source, DRPO)
    if config.has_dpo_rewards:
        yield RTO
    if config.dpo_refine != "none":
        yield PRIME
    if config.psi:
        yield PSI_REWARD
    if config.dynamic_sampling_factor > 1 or config.overlong_buffer:
        yield DAPO


def _adapter(config: TrainConfig) -> Iterator[Method]:
    if config.use_peft:
        yield RSLORA if config.use_rslora else LORA
        if config.use_dora:
            yield DORA
        if config.load_in_4bit:
            yield QLORA
