import json

from fastrlhf.runtime.unlogged import Unlogged


def test_rows_that_a_log_lacks_come_back_from_a_checkpoint_and_usually_there_are_none():
    before, after = Unlogged(), Unlogged()
    assert before.state_dict() == {}
    before.rows = [(3, {"loss": 1 / 3, "score": float("inf")}, "loss", [{"row": 1, "prompt": "w1"}])]
    before.unwritten = {"metrics.jsonl": '{"step": 2}\n'}
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert (after.rows, after.unwritten) == (before.rows, before.unwritten)
    after.load_state_dict({})
    assert after.state_dict() == {}
