import pytest

from fastrlhf.report.panels import place


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("loss", ("Loss and accuracy", "loss", "")),
        ("eval_loss", ("Loss and accuracy", "loss", "eval")),
        ("loss/policy_avg", ("Loss and accuracy", "loss/policy_avg", "")),
        ("rewards/chosen", ("Scores and rewards", "rewards/chosen and rejected", "chosen")),
        ("eval_rewards/rejected", ("Scores and rewards", "rewards/chosen and rejected", "eval rejected")),
        ("logps/chosen", ("Log-probs and logits", "logps/chosen and rejected", "chosen")),
        ("rewards/accuracies", ("Loss and accuracy", "rewards/accuracies", "")),
        ("min_reward", ("Scores and rewards", "reward: min, mean and max", "min")),
        ("eval_max_reward", ("Scores and rewards", "reward: min, mean and max", "eval max")),
        ("eval_accuracy", ("Loss and accuracy", "accuracy", "eval")),
        ("eval_accuracy_low", ("Loss and accuracy", "accuracy", "eval 95 % low")),
        ("objective/scores", ("Scores and rewards", "objective/scores", "")),
        ("eval_held_out/scores", ("Scores and rewards", "held_out/scores", "eval")),
        ("objective/kl", ("KL and entropy", "objective/kl", "")),
        ("policy/approxkl_avg", ("KL and entropy", "policy/approxkl_avg", "")),
        ("entropy", ("KL and entropy", "entropy", "")),
        ("completions/mean_length", ("Completions", "completions/mean_length", "")),
        ("policy/clipfrac_avg", ("Updates of policy and critic", "policy/clipfrac_avg", "")),
        ("learning_rate", ("Housekeeping", "learning_rate", "")),
        ("value_grad_norm", ("Housekeeping", "value_grad_norm", "")),
        ("timing/rollout", ("Housekeeping", "timing/rollout", "")),
        ("something", ("Other", "something", "")),
    ],
)
def test_the_chart_and_group_of_a_metric(metric, expected):
    assert place(metric) == expected
