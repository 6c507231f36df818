import json
import re
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from fastrlhf import Callback, cli
from fastrlhf.algorithms import sft
from fastrlhf.config import SFTConfig
from fastrlhf.runtime.callbacks import load_callbacks
from tests import tiny
from tests.resumable import Killed, Watch, run, save_models, untimed_log

FILE = """
import json

class Recorder:
    def __init__(self):
        self.losses = []

    def on_step(self, state):
        self.losses.append(state.metrics["loss"])
        if state.step == 3:
            state.evaluate()

    def on_end(self, state):
        (state.output_dir / "losses.json").write_text(json.dumps(self.losses))

    def state_dict(self):
        return {"losses": self.losses}

    def load_state_dict(self, state):
        self.losses = list(state["losses"])

class Empty:
    pass

class Choosy:
    def __init__(self, size):
        pass

class Broken:
    def on_step(self, state):
        if state.step == 2:
            raise KeyError("no such row")
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    return str(tmp_path / "mine.py")


class Journal:
    """A callback that records its calls; a plain class with the callback methods, without a base class."""

    def __init__(self, **requests):
        self.calls, self._requests = [], requests

    def _note(self, point, state):
        self.calls.append((point, state.step, "eval_loss" in state.metrics))
        for request, steps in self._requests.items():
            if point == "step" and state.step in steps:
                getattr(state, request)()

    def on_start(self, state):
        self._note("start", state)

    def on_step(self, state):
        assert isinstance(state.model, torch.nn.Module)
        assert {"loss", "grad_norm", "learning_rate"} <= state.metrics.keys()
        assert state.max_steps == 5
        self._note("step", state)

    def on_evaluate(self, state):
        self._note("evaluate", state)

    def on_save(self, state):
        assert (state.output_dir / f"checkpoint-{state.step}").is_dir()
        self._note("save", state)

    def on_end(self, state):
        assert (state.output_dir / "config.json").exists()
        self._note("end", state)


def trained(paths, folder, *callbacks, **settings):
    """Runs five steps of SFT with callbacks and the settings of tests/resumable.py."""
    keys = {"model_name_or_path": paths["policy"], "output_dir": str(folder), "max_steps": 5, "save_steps": 2}
    keys |= {"train_batch_size": 4, "learning_rate": 1e-2, "max_length": 32, "progress": False, "eval_steps": 4}
    held_out = tiny.examples(4, seed=1)
    return sft.train_sft(SFTConfig(**keys | settings), tiny.examples(10), held_out, callbacks=callbacks)


def test_a_run_calls_every_point_in_order(paths, tmp_path):
    journal = Journal()
    trained(paths, tmp_path, journal)
    assert journal.calls == [
        ("start", 0, False),
        ("step", 1, False),
        ("step", 2, False),
        ("save", 2, False),
        ("step", 3, False),
        ("step", 4, False),
        ("evaluate", 4, True),
        ("save", 4, True),
        ("step", 5, False),
        ("evaluate", 5, True),
        ("end", 5, True),
    ]


def test_a_callback_may_ask_to_evaluate_to_save_and_to_stop(paths, tmp_path, caplog):
    caplog.set_level("INFO")
    journal = Journal(evaluate=[1], save=[1], stop=[3])
    result = trained(paths, tmp_path, journal, save_steps=0)
    assert caplog.messages.count("the run stops after step 3: a callback has asked for it") == 1
    assert [(point, step) for point, step, _ in journal.calls if point != "step"] == [
        ("start", 0),
        ("evaluate", 1),
        ("save", 1),
        ("evaluate", 3),  # the evaluation at the end of the run, although eval_steps is 4
        ("end", 3),
    ]
    assert len(result.history) == 3
    assert result.final == {"eval_loss": result.history[2]["eval_loss"]}


def test_callbacks_change_no_number(paths, tmp_path):
    plain = untimed_log(tmp_path / "plain", trained(paths, tmp_path / "plain"))
    assert untimed_log(tmp_path / "watched", trained(paths, tmp_path / "watched", Journal())) == plain


@pytest.mark.parametrize("where", [(2, "after"), (3, "after"), (4, "before"), (5, "before")])
def test_the_state_of_a_callback_is_that_of_an_uninterrupted_run(where, paths, tmp_path, file, monkeypatch):
    watch, keys = Watch("sft", monkeypatch), {"callbacks": f"{file}:Recorder"}
    whole = untimed_log(tmp_path / "whole", run("sft", paths, tmp_path / "whole", **keys))
    watch.kill = where
    with pytest.raises(Killed):
        run("sft", paths, tmp_path / "cut", **keys)
    watch.kill = None
    assert untimed_log(tmp_path / "cut", run("sft", paths, tmp_path / "cut", **keys)) == whole
    losses = [json.loads((tmp_path / name / "losses.json").read_text()) for name in ("whole", "cut")]
    assert losses[0] == losses[1] == [row["loss"] for row in whole[0]]
    assert "eval_loss" in whole[0][2]


@pytest.mark.parametrize("point", ["on_step", "on_evaluate"])
def test_after_an_error_the_step_is_saved_and_the_callback_is_called_again(point, paths, tmp_path):
    class Once(Callback):
        fails, count = True, 0

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    def counted(self, state):
        self.count += 1
        if state.step == 4 and Once.fails:
            raise LookupError("the service is away")

    setattr(Once, point, counted)
    with pytest.raises(LookupError, match="the service is away") as error:
        trained(paths, tmp_path, Once(), save_steps=0)
    assert error.value.__notes__ == [
        f"raised by {point} of the callback Once",
        f"saved as {tmp_path / 'checkpoint-4'}; the same command continues",
    ]
    Once.fails, again = False, Once()
    result = trained(paths, tmp_path, again, save_steps=0)
    assert again.count == (5 if point == "on_step" else 2)
    assert len(result.history) == 5
    assert load_file(tmp_path / "model.safetensors")


def test_an_error_on_the_command_line_names_callback_and_line(paths, tmp_path, file, capsys):
    rows = [{"prompt": row.prompt, "completion": row.reference} for row in tiny.examples(10)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    flags = ["--model_name_or_path", paths["policy"], "--dataset_name", str(tmp_path / "rows.jsonl")]
    flags += ["--output_dir", str(tmp_path / "run"), "--max_steps", "3", "--callbacks", f"{file}:Broken"]
    assert cli.main(["sft", *flags, "--max_length", "32", "--progress", "false"]) == 1
    line, frame = capsys.readouterr().err.splitlines()[-2:]
    assert line == (
        f"fastrlhf sft: KeyError: 'no such row'; raised by on_step of the callback {file}:Broken; "
        f"saved as {tmp_path / 'run' / 'checkpoint-2'}; the same command continues"
    )
    assert frame.endswith('in on_step: raise KeyError("no such row")')


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Nobody", "has no class 'Nobody'"),
        ("Empty", "has none of the methods on_start, on_step, on_evaluate, on_save, on_end"),
        ("Choosy", "cannot be made without arguments: .*missing 1 required positional argument: 'size'"),
    ],
)
def test_classes_that_cannot_be_callbacks_are_refused_before_anything_is_read(name, told, file):
    with pytest.raises(ValueError, match=f"^callbacks: .*{told}"):
        load_callbacks(SFTConfig(callbacks=f"{file}:{name}"))
    with pytest.raises(ValueError, match=f"^callbacks: .*{told}"):
        sft.train_sft(SFTConfig(callbacks=f"{file}:{name}", model_name_or_path="nowhere"))


def test_a_changed_file_of_a_callback_is_refused(paths, tmp_path, file, monkeypatch):
    watch, keys = Watch("sft", monkeypatch), {"callbacks": f"{file}:Recorder"}
    watch.kill = (3, "before")
    with pytest.raises(Killed):
        run("sft", paths, tmp_path / "run", **keys)
    watch.kill = None
    (tmp_path / "mine.py").write_text(f"{FILE}\n# changed\n")
    with pytest.raises(ValueError, match=f"the file of '{re.escape(file)}:Recorder' has changed since"):
        run("sft", paths, tmp_path / "run", **keys)


def test_two_callbacks_of_one_class_have_different_states(paths, tmp_path):
    class Count:
        def __init__(self, start):
            self.count = start

        def on_step(self, state):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    trained(paths, tmp_path, Count(0), Count(10))
    parts = json.loads((tmp_path / "checkpoint-4" / "state.json").read_text())["parts"]
    assert [parts[f"callback-{i}"] for i in (0, 1)] == [{"count": 4}, {"count": 14}]
    assert all(one != other for one, other in pairwise(parts.values()))
