import pytest

from fastrlhf.data.token_report import TokenReport, check_fractions

EMPTY = {"eos_added": 0, "eos_present": 0, "responses_cut": 0, "prompts_cut": 0, "firsts": {}}


def report(**fields) -> TokenReport:
    return TokenReport(**{"num_examples": 10, "num_kept": 4, "max_length": 8, "dropped": {}} | EMPTY | fields)


def test_rows_that_are_too_long_are_counted_once_and_rows_dropped_for_other_reasons_are_not():
    dropped = {"longer_than_max_length": 2, "chosen_equals_rejected": 3}
    assert report(dropped=dropped, responses_cut=2, rows_cut=1).rows_too_long == 3


def test_too_many_rows_that_are_dropped_are_an_error():
    made = report(dropped={"empty_prompt": 6}, firsts={"empty_prompt": "row 0"})
    check_fractions(made, 0.0, 0.6)
    with pytest.raises(ValueError, match=r"6 of 10 rows are dropped \(6 empty_prompt, first row 0\), more than 0.5"):
        check_fractions(made, 0.0, 0.5)
