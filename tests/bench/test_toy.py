import pytest

from bench.toy import table


def summary(ppo: float, drpo: float) -> dict:
    def row(gold: float) -> dict:
        shared = {"win_rate": 0.5, "rm_score": 1.0, "kl": 2.0, "mean_length": 3.0, "seconds": 4.0, "tokens": 5}
        return shared | {"gold_reward": gold, "minus_sft": gold - 1}

    return {"methods": {"sft": row(1.0), "ppo": row(ppo), "drpo": row(drpo)}}


def test_the_table_gives_means_and_students_intervals_over_seeds():
    lines = table([summary(2.0, 3.0), summary(4.0, 6.0)]).splitlines()
    # ppo: mean of 2 and 4, half interval t_0.975 * s / sqrt(n) = 12.71 * sqrt(2) / sqrt(2). Paired differences: 1, 2.
    assert lines[3].startswith("| ppo | 50.00 +- 0.00 | 3.00 +- 12.71 | 2.00 +- 12.71 ")
    assert lines[-1].endswith("paired over 2 seeds: 1.50 +- 6.36")


def test_one_seed_has_no_interval():
    assert "| drpo | 50.00 | 3.00 | 2.00 " in table([summary(2.0, 3.0)])


@pytest.mark.parametrize("command", [["toy", "--help"], ["--help"]])
def test_the_command_line_explains_itself(command, monkeypatch, capsys):
    from bench.__main__ import main

    monkeypatch.setattr("sys.argv", ["bench", *command])
    with pytest.raises(SystemExit):
        main()
    assert "seeds" in capsys.readouterr().out or command == ["--help"]
