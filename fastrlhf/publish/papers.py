"""The papers of the methods that the trainers implement, for the citations of a model card."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper that a model card cites."""

    authors: str
    """Authors in BibTeX's form; "and others" stands for all authors after the first."""
    year: int
    title: str
    arxiv: str = ""
    """Number of the paper on arXiv; empty if arXiv does not have the paper."""
    url: str = ""
    """Address of the paper, if arXiv does not have it."""

    @property
    def link(self) -> str:
        """A Markdown link to the paper."""
        names = self.authors.split(" and ")
        first = names[0].strip("{}").partition(",")[0]
        told = f"{first} et al. {self.year}" if len(names) > 1 else f"{first} {self.year}"
        return f"[{told}]({self.url or f'https://arxiv.org/abs/{self.arxiv}'})"

    def bibtex(self, key: str) -> str:
        """Returns the BibTeX entry of the paper under `key`."""
        fields = {"title": f"{{{self.title}}}", "author": self.authors, "year": str(self.year)}
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        if self.url:
            fields["url"] = self.url
        lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        return f"@misc{{{key},\n{lines}\n}}"


PAPERS = {
    "ahmadian2024rloo": Paper(
        "Ahmadian, Arash and others",
        2024,
        "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
        "2402.14740",
    ),
    "azar2023ipo": Paper(
        "Azar, Mohammad Gheshlaghi and others",
        2023,
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        "2310.12036",
    ),
    "calandriello2024online": Paper(
        "Calandriello, Daniele and others",
        2024,
        "Human Alignment of Large Language Models through Online Preference Optimisation",
        "2403.08635",
    ),
    "chang2023ppopp": Paper(
        "Chang, Jonathan D. and others", 2023, "Learning to Generate Better Than Your LLM", "2306.11816"
    ),
    "chang2024drpo": Paper(
        "Chang, Jonathan D. and others", 2024, "Dataset Reset Policy Optimization for RLHF", "2404.08495"
    ),
    "chowdhury2024robust": Paper(
        "Chowdhury, Sayak Ray and others",
        2024,
        "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
        "2403.00409",
    ),
    "cui2025prime": Paper(
        "Cui, Ganqu and others", 2025, "Process Reinforcement through Implicit Rewards", "2502.01456"
    ),
    "dettmers2023qlora": Paper(
        "Dettmers, Tim and others", 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", "2305.14314"
    ),
    "doosterlinck2024apo": Paper(
        "D'Oosterlinck, Karel and others",
        2024,
        "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
        "2408.06266",
    ),
    "ethayarajh2024kto": Paper(
        "Ethayarajh, Kawin and others", 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", "2402.01306"
    ),
    "gao2024rebel": Paper(
        "Gao, Zhaolin and others",
        2024,
        "REBEL: Reinforcement Learning via Regressing Relative Rewards",
        "2404.16767",
    ),
    "gao2024refuel": Paper(
        "Gao, Zhaolin and others",
        2024,
        "Regressing the Relative Future: Efficient Policy Optimization for Multi-turn RLHF",
        "2410.04612",
    ),
    "guo2024online": Paper(
        "Guo, Shangmin and others", 2024, "Direct Language Model Alignment from Online AI Feedback", "2402.04792"
    ),
    "hao2025opo": Paper("Hao, Yaru and others", 2025, "On-Policy RL with Optimal Reward Baseline", "2505.23585"),
    "hong2024orpo": Paper(
        "Hong, Jiwoo and others",
        2024,
        "ORPO: Monolithic Preference Optimization without Reference Model",
        "2403.07691",
    ),
    "hu2021lora": Paper(
        "Hu, Edward J. and others", 2021, "LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685"
    ),
    "kalajdzievski2023rslora": Paper(
        "Kalajdzievski, Damjan", 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", "2312.03732"
    ),
    "lang2024rlp": Paper(
        "Lang, Hao and Huang, Fei and Li, Yongbin",
        2024,
        "Fine-Tuning Language Models with Reward Learning on Policy",
        "2403.19279",
    ),
    "liu2024dora": Paper(
        "Liu, Shih-Yang and others", 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", "2402.09353"
    ),
    "liu2025drgrpo": Paper(
        "Liu, Zichen and others", 2025, "Understanding R1-Zero-Like Training: A Critical Perspective", "2503.20783"
    ),
    "meng2024simpo": Paper(
        "Meng, Yu and others", 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", "2405.14734"
    ),
    "minimax2025cispo": Paper(
        "{MiniMax}",
        2025,
        "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
        "2506.13585",
    ),
    "mitchell2023cdpo": Paper(
        "Mitchell, Eric",
        2023,
        "A Note on DPO with Noisy Preferences and Relationship to IPO",
        url="https://ericmitchell.ai/cdpo.pdf",
    ),
    "rafailov2023dpo": Paper(
        "Rafailov, Rafael and others",
        2023,
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "2305.18290",
    ),
    "samanta2026rrpo": Paper(
        "Samanta, Ankur and others", 2026, "Credit Assignment with Resets in Language Model Reasoning", "2605.25507"
    ),
    "schulman2016gae": Paper(
        "Schulman, John and others",
        2016,
        "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
        "1506.02438",
    ),
    "schulman2017ppo": Paper(
        "Schulman, John and others", 2017, "Proximal Policy Optimization Algorithms", "1707.06347"
    ),
    "shao2024grpo": Paper(
        "Shao, Zhihong and others",
        2024,
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "2402.03300",
    ),
    "stiennon2020reward": Paper(
        "Stiennon, Nisan and others", 2020, "Learning to Summarize from Human Feedback", "2009.01325"
    ),
    "xu2024cpo": Paper(
        "Xu, Haoran and others",
        2024,
        "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
        "2401.08417",
    ),
    "yu2025dapo": Paper(
        "Yu, Qiying and others", 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", "2503.14476"
    ),
    "zhao2023slic": Paper(
        "Zhao, Yao and others", 2023, "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", "2305.10425"
    ),
    "zheng2025gspo": Paper("Zheng, Chujie and others", 2025, "Group Sequence Policy Optimization", "2507.18071"),
    "zhong2024rto": Paper(
        "Zhong, Han and others", 2024, "DPO Meets PPO: Reinforced Token Optimization for RLHF", "2404.18922"
    ),
}
"""Key in a bibliography -> paper."""
