from fastrlhf.report.stages import find_stages
from fastrlhf.runtime.metrics import MetricsWriter


def test_stages_are_in_the_order_of_the_chain_and_a_metric_is_a_curve_over_steps(tmp_path):
    for name in ("ppo", "sft", "other"):
        with MetricsWriter(tmp_path / name) as writer:
            writer.log(1, {"loss": 2.0})
            writer.log(2, {"loss": 1.0, "eval_loss": 3.0})
    stages = find_stages(tmp_path)
    assert [(stage.name, stage.color) for stage in stages] == [("sft", 0), ("ppo", 1), ("other", 2)]
    curve = stages[1].curve("eval_loss", "eval", shift=4, dashed=True)
    assert (curve.label, curve.steps.tolist(), curve.values.tolist()) == ("ppo, eval", [2.0], [3.0])
    assert (curve.color, curve.dashed) == (5, True)
