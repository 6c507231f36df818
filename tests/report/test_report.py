import errno
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastrlhf.cli import main
from fastrlhf.report.report import write_report
from fastrlhf.runtime.metrics import MetricsWriter

ON_POLICY = {"loss/policy_avg": 0.1, "objective/kl": 1.0, "objective/scores": 0.5, "learning_rate": 1e-4}


def write_metrics(directory, metrics, steps=5):
    with MetricsWriter(directory) as writer:
        for step in range(1, steps + 1):
            writer.log(step, {name: value * step for name, value in metrics.items()})


def sections(page):
    """Returns heading -> content of every section of a page."""
    return dict(re.findall(r"<section[^>]*><h2>(.*?)</h2>(.*?)</section>", page, flags=re.DOTALL))


def figures(page):
    """Returns title -> labels of the curves, in their order, of every figure of a page."""
    return {
        re.sub("<.*?>", "", title): re.findall("<title>(.*?): ", body)
        for title, body in re.findall(r"<figcaption><b>(.*?)</b><div(.*?)</figure>", page, flags=re.DOTALL)
    }


class _Balanced(HTMLParser):
    """An HTML parser that checks that elements are closed in the reverse order of their opening."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_one_run_gives_one_chart_per_metric_with_families_together(tmp_path):
    write_metrics(tmp_path / "run", {"rewards/chosen": 1.0, "loss": 2.0, "rewards/margins": 3.0})
    path = write_report(tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    assert list(figures(path.read_text()).items()) == [
        ("loss", ["run"]),
        ("rewards/chosen and rejected", ["run, chosen"]),
        ("rewards/margins", ["run"]),
    ]


def test_stages_that_log_the_same_metrics_share_charts_and_others_do_not(tmp_path):
    write_metrics(tmp_path / "drpo", ON_POLICY | {"drpo/reset_fraction": 0.5})
    write_metrics(tmp_path / "ppo", ON_POLICY)
    write_metrics(tmp_path / "reward", {"loss": 0.7, "accuracy": 0.1})
    write_metrics(tmp_path / "sft", {"loss": 2.0, "entropy": 1.0})
    page = sections(write_report(tmp_path).read_text())
    assert list(page) == ["sft", "reward", "ppo, drpo"]
    assert figures(page["sft"])["loss"] == ["sft"]
    assert figures(page["reward"])["loss"] == ["reward"]
    assert figures(page["ppo, drpo"])["objective/kl"] == ["ppo", "drpo"]
    assert figures(page["ppo, drpo"])["drpo/reset_fraction"] == ["drpo"]


def test_scores_by_reset_depth_are_one_chart_of_the_last_steps(tmp_path):
    with MetricsWriter(tmp_path / "drpo") as writer:
        for step in range(1, 31):  # the last 20 steps are 11 .. 30, with mean 20.5
            writer.log(step, ON_POLICY | {"drpo/score_depth_0": step, "drpo/score_depth_3": 100 * step})
    write_metrics(tmp_path / "ppo", ON_POLICY)
    page = write_report(tmp_path).read_text()
    [title] = [title for title in figures(page) if "score" in title and "drpo" in title]
    assert title == "drpo/score by % of the response that resets copied, last 20 steps"
    assert figures(page)[title] == ["drpo"]
    assert "drpo: 2 points, from 20.5 to 2050" in page
    assert "score_depth" not in page
    [figure] = [part for part in page.split("<figure>") if title.removeprefix("drpo/") in part]
    # Ticks of an axis from 10 % to 70 %, the centres of the first and the fourth fifth
    assert re.findall('class="x".*?>(.*?)<', figure) == ["20", "40", "60"]


def evaluated(directory, rows):
    """Writes the log of a run with the given evaluations: (KL, score of the training judge, score of the held-out
    judge)."""
    names = ("eval_objective/kl", "eval_objective/scores", "eval_held_out/scores")
    with MetricsWriter(directory) as writer:
        for step, row in enumerate(rows, start=1):
            writer.log(step, ON_POLICY | dict(zip(names, row, strict=False)))


def test_the_judges_are_drawn_from_an_evaluation_before_the_first_step_on(tmp_path):
    names = ("eval_objective/kl", "eval_objective/scores", "eval_held_out/scores")
    with MetricsWriter(tmp_path / "ppo") as writer:
        writer.log(0, dict(zip(names, (0.0, 5.0, 2.0), strict=True)))
        writer.log(1, ON_POLICY | dict(zip(names, (4.0, 7.0, 1.5), strict=True)))
    page = write_report(tmp_path).read_text()
    assert "ppo, training judge: 2 points, from 0 to 2" in page
    assert "ppo, held-out judge: 2 points, from -0.5 to 0" in page


def test_judges_of_training_and_evaluation_are_drawn_over_the_root_of_the_kl(tmp_path):
    """The evaluations have sqrt(KL) 0, 2 and 1, and the points must be sorted by it. The gains in score since the first
    evaluation are 0, 1, 3 (training judge) and 0, 0.5, -1 (held-out judge)."""
    nan = float("nan")
    evaluated(tmp_path / "ppo", [(-0.1, 5.0, 2.0), (), (4.0, 6.0, 2.5), (nan, 9.0, 9.0), (1.0, 8.0, 1.0)])
    page = write_report(tmp_path).read_text()
    title = "score gained since the first evaluation, over sqrt(KL)"
    assert figures(page)[title] == ["ppo, training judge", "ppo, held-out judge"]
    assert "ppo, training judge: 3 points, from 0 to 3" in page
    assert "ppo, held-out judge: 3 points, from -1 to 0.5" in page
    [figure] = [part for part in page.split("<figure>") if title in part]
    for path in re.findall('class="line" d="M(.*?)"', figure):
        xs = [float(point.split(",")[0]) for point in path.split()]
        assert xs[1:] == pytest.approx([xs[2] / 2, xs[2]], abs=0.1)
        assert xs[0] == 0 < xs[2]
    assert re.findall("</i>(.*?) <b>(.*?)</b>", figure) == [
        ("ppo, training judge", "1"),  # the value at the largest KL
        ("ppo, held-out judge", "0.5"),
    ]


def test_without_two_evaluations_by_both_judges_there_is_no_such_chart(tmp_path):
    evaluated(tmp_path / "drpo", [(1.0, 5.0), (2.0, 6.0)])
    evaluated(tmp_path / "ppo", [(1.0, 5.0, 2.0)])
    assert "sqrt(KL)" not in write_report(tmp_path).read_text()


def test_two_seeds_are_overlaid(tmp_path):
    for seed in range(2):
        write_metrics(tmp_path / f"seed-{seed}" / "ppo", ON_POLICY)
    assert list(sections(write_report(tmp_path).read_text())) == ["seed-0/ppo, seed-1/ppo"]


def test_the_later_row_of_a_step_counts(tmp_path):
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.5}, {"step": 2, "eval_loss": 7.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path).read_text()
    assert "2 points, from 1 to 2.5" in page
    assert "1 points, from 7 to 7" in page


def test_the_summary_becomes_a_table_with_interval_bars(tmp_path):
    methods = {
        "sft": {
            "win_rate": 0.25,
            "win_rate_ci": [0.2, 0.3],
            "gold_reward": 1.5,
            "kl": None,
            "seconds": 90,
            "tokens": 50000,
        },
        "drpo": {
            "win_rate": 0.5,
            "win_rate_ci": [0.4, 0.6],
            "gold_reward": 2.5,
            "kl": 8.0,
            "seconds": 120,
            "tokens": 2e6,
        },
    }
    summary = {
        "task": "toy",
        "seed": 3,
        "device": "cpu",
        "reward_model": {"eval_accuracy": 0.81234},
        "methods": methods,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = write_report(tmp_path).read_text()
    assert "<h1>toy</h1>" in page
    assert "<span>seed 3</span>" in page
    assert "<span>reward model eval accuracy 0.8123</span>" in page
    table = sections(page)["Results"]
    assert re.findall("<th>([^<]+)</th>", table) == [
        "Method",
        "Win rate",
        "Gold reward",
        "KL (nats)",
        "Seconds",
        "Tokens",
    ]
    assert "25.0&nbsp;%" in table
    assert 'cx="70.0"' in table  # drpo's win rate of one half is in the middle of its bar
    assert "&ndash;" in table  # a dash, because the sft run has no KL
    assert "50k" in table


def test_columns_that_the_report_does_not_know_are_shown_too(tmp_path):
    row = {"win_rate": 0.5, "rouge_l": 0.25, "rouge_l_ci": [0.2, 0.3]}
    (tmp_path / "summary.json").write_text(json.dumps({"methods": {"sft": row}}))
    table = sections(write_report(tmp_path).read_text())["Results"]
    assert "<th>rouge l</th>" in table
    assert "0.2 to 0.3" in table
    assert "ci</th>" not in table


def test_samples_and_configuration_are_escaped(tmp_path):
    attack = "<script>alert(1)</script>"
    with MetricsWriter(tmp_path) as writer:
        writer.log(1, {attack: 1.0, "loss": float("nan")})
        writer.samples(
            1, [{"prompt": attack, "response": "a & b \ud800", attack: [{"role": "user", "content": attack}]}]
        )
    (tmp_path / "config.yaml").write_text(f"output_dir: {attack}\n")
    (tmp_path / "summary.json").write_text(
        json.dumps({"task": attack, attack: attack, "methods": {attack: {attack: attack, "win_rate": 0.5}}})
    )
    page = write_report(tmp_path).read_text()
    assert "<script" not in page
    assert "a &amp; b" in page
    assert page.count("&lt;script&gt;") >= 8
    parser = _Balanced()
    parser.feed(page)
    assert parser.open == []


def test_the_page_asks_for_nothing_from_outside(tmp_path):
    write_metrics(tmp_path, ON_POLICY)
    page = write_report(tmp_path).read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|src=|@import|url\(", page)


def test_only_the_last_samples_are_shown(tmp_path):
    write_metrics(tmp_path, {"loss": 1.0})
    with MetricsWriter(tmp_path) as writer:
        writer.samples(1, [{"prompt": f"prompt-{i}."} for i in range(30)])
    shown = re.findall(r"prompt-(\d+)\.", write_report(tmp_path).read_text())
    assert shown == [str(i) for i in range(18, 30)]


def test_of_compared_models_the_last_prompts_are_shown_with_the_answers_of_all(tmp_path):
    """The samples file lists all answers of the first model, then all of the second. The page lists answers by prompt,
    and each prompt once."""
    (tmp_path / "summary.json").write_text(json.dumps({"methods": {"a": {"win_rate": 0.5}}}))
    rows = [
        {"row": i, "prompt": f"prompt-{i}.", "model": model, "response": f"{model}{i}"}
        for model in ("a", "b", "reference")
        for i in range(30)
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path).read_text()
    shown = re.findall(r"<div>(prompt-\d+\.|(?:a|b|reference)\d+)</div>", page)
    assert shown == [text for i in range(24, 30) for text in (f"prompt-{i}.", f"a{i}", f"b{i}", f"reference{i}")]


def test_only_a_page_with_curves_explains_them(tmp_path):
    write_metrics(tmp_path / "run", {"loss": 1.0})
    assert "<footer>Horizontal axes" in write_report(tmp_path / "run").read_text()
    (tmp_path / "summary.json").write_text(json.dumps({"methods": {"a": {"win_rate": 0.5}}}))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "<footer" not in write_report(tmp_path).read_text()


def test_quality_metrics_come_before_counters_and_times(tmp_path):
    logged = ("timing/rollout", "policy/clipfrac_avg", "learning_rate", "value_grad_norm", "grad_norm", "num_tokens")
    telling = ("loss", "accuracy", "objective/scores", "objective/kl", "eval_objective/kl", "reward/score")
    write_metrics(tmp_path, dict.fromkeys(logged + telling, 1.0))
    page = write_report(tmp_path).read_text()
    assert list(figures(page)) == [
        # The figure of objective/kl also shows eval_objective/kl
        *("loss", "accuracy", "objective/scores", "reward/score", "objective/kl"),
        *("policy/clipfrac_avg", "timing/rollout", "learning_rate", "value_grad_norm", "grad_norm", "num_tokens"),
    ]
    name = tmp_path.name
    assert figures(page)["objective/kl"] == [name, f"{name}, eval"]
    assert re.findall(r'<details class="group"( open)?><summary>(.*?) <small>(.*?)<', page) == [
        (" open", "Loss and accuracy", "2 charts"),
        (" open", "Scores and rewards", "2 charts"),
        (" open", "KL and entropy", "1 chart"),
        ("", "Updates of policy and critic", "1 chart"),
        ("", "Housekeeping", "5 charts"),
    ]


def test_a_metric_with_a_single_value_is_a_table_row_and_not_a_chart(tmp_path):
    write_metrics(tmp_path / "run", {"loss": 1.0})
    with MetricsWriter(tmp_path / "run") as writer:
        writer.log(5, {"loss": 5.0, "eval_loss": 0.5, "eval_accuracy": 0.75, "eval_accuracy_low": 0.5})
    page = write_report(tmp_path / "run").read_text()
    assert figures(page) == {"loss": ["run", "run, eval"]}
    assert "1 chart, 2 single values" in page
    assert re.findall(r"<tr><th>([^<]*)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", page) == [
        ("eval_accuracy", "run", "5", "0.75"),
        ("eval_accuracy_low", "run", "5", "0.5"),
    ]


def test_a_table_that_is_too_wide_scrolls_and_shows_that_there_is_more(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"methods": {"a": {"win_rate": 0.5}}}))
    page = write_report(tmp_path).read_text()
    assert page.count('<div class="wide" tabindex="0"><table class="results">') == 1
    assert "linear-gradient(to left, var(--shade), transparent) right / 18px 100% no-repeat scroll" in page


def test_samples_with_token_rewards_are_text_and_others_stay_a_table(tmp_path):
    write_metrics(tmp_path, {"loss": 1.0})
    earned = {"tokens": ["w4", " w5"], "rewards": {"dpo": [0.5, -0.25]}}
    with MetricsWriter(tmp_path) as writer:
        writer.samples(1, [{"prompt": "w1", "response": "w4 w5", **earned}, {"prompt": "plain"}])
    shown = sections(write_report(tmp_path).read_text())["Samples"]
    assert '<span class="gain" style="--w:60%" title="dpo +0.5">w4</span>' in shown
    assert "<td><div>plain</div></td>" in shown
    assert "<article><h3>step 1, reward 0.25</h3>" in shown


def test_columns_of_texts_keep_a_width_and_numbers_do_not(tmp_path):
    """Text columns need a minimum width; a narrow screen would otherwise squeeze them to two letters per line."""
    with MetricsWriter(tmp_path) as writer:
        writer.log(1, {"loss": 1.0})
        writer.samples(1, [{"row": 1234, "prompt": "many words " * 9, "score": 0.25}])
    page = write_report(tmp_path).read_text()
    assert re.findall(r"<td( class=text)?><div>(1234|many|0.25)", page) == [
        ("", "1234"),
        (" class=text", "many"),
        ("", "0.25"),
    ]
    assert ".samples .text div { min-width:" in page


def test_thousands_of_steps_make_a_small_page(tmp_path):
    write_metrics(tmp_path, {"loss": 1.0}, steps=5000)
    assert write_report(tmp_path).stat().st_size < 20000


def test_writing_twice_gives_the_same_page(tmp_path):
    write_metrics(tmp_path, ON_POLICY)
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_a_page_that_cannot_be_written_leaves_the_old_one_and_goes_elsewhere(tmp_path, monkeypatch, capsys):
    run, page = tmp_path / "run", tmp_path / "pages" / "run.html"
    write_metrics(run, ON_POLICY)
    old = write_report(run).read_bytes()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "time": 1.0, "loss": 2.0}\n')

    def read_only(path, *arguments, write=Path.write_text, **keywords):
        if path.parent == run:
            raise OSError(errno.EROFS, "Read-only file system")
        return write(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "write_text", read_only)
    assert main(["report", str(run)]) == 2
    told = f"fastrlhf report: {str(run / 'report.html')!r} cannot be written: Read-only file system; give another page"
    assert told in capsys.readouterr().err
    assert main(["report", str(run), "--output", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert page.read_bytes() != old == (run / "report.html").read_bytes()


def test_a_directory_without_metrics_or_summary_is_an_error_that_names_it(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{", "[]", '{"methods": []}', '{"methods": {"sft": 1}}'])
def test_a_malformed_summary_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=r"summary\.json"):
        write_report(tmp_path)


def test_a_metrics_row_without_a_step_is_an_error_that_names_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        write_report(tmp_path)
