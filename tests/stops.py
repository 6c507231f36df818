"""The table "What happens when" of docs/resume.md as data: events that stop a run, the outcome of each, and the tests
that check the outcome.

docs/generate.py writes the page's table from these entries, and tests/test_stop_outcomes.py compares their exit codes
and what is saved with real runs.
"""

from __future__ import annotations

from dataclasses import dataclass

LAST_STEP = "the last whole step"
"""The run leaves a checkpoint of the last complete step."""
NOTHING = "nothing new; older checkpoints stay"
"""The run leaves only the checkpoints that existed before."""
FINISHED = "the trained model"
"""The run continues to its end and saves the trained model."""

FAULTS, RUN, REPORTERS = "test_faults.py", "runtime/test_run.py", "runtime/test_reporters.py"


@dataclass(frozen=True)
class Stop:
    """The outcome of an event: a row of the table."""

    follows: str
    saved: str
    """LAST_STEP, NOTHING or FINISHED."""
    exit_code: int
    """Exit code of `fastrlhf`, as a shell reports it. The exit code of torchrun is 1 for every code except 0."""
    file: str
    """Path of the test file, relative to tests/."""
    tests: tuple[str, ...]
    """Names of the tests in the file. Empty means all tests of the file."""


STOPS: dict[str, Stop] = {
    "Ctrl-C": Stop(
        (
            "the run saves its progress and ends (next section). Signals within 5 s count as one, because schedulers "
            "and torchrun signal every process more than once; a later signal ends the run at once"
        ),
        LAST_STEP,
        130,
        "test_resume.py",
        ("test_after_a_signal_the_step_is_saved_and_the_same_command_continues",),
    ),
    "SIGTERM, SIGHUP, SIGUSR1, SIGUSR2": Stop(
        "as after Ctrl-C",
        LAST_STEP,
        143,
        "test_stops.py",
        (
            "test_a_job_whose_launcher_and_ranks_are_signalled_at_once_saves_its_last_step",
            "test_a_job_stopped_ten_times_ends_bit_identical_to_an_uninterrupted_one",
        ),
    ),
    "one of these signals after the last step, while the trained model is saved": Stop(
        (
            "the model is saved, and the run is finished. If further stages follow (`run_first`, `rlp`), the command "
            "ends before them with 130 or 143, and the same command continues"
        ),
        FINISHED,
        0,
        "test_stops.py",
        ("test_a_job_that_is_signalled_after_its_last_step_finishes_and_releases_its_folder",),
    ),
    "SIGKILL or power off, also during a save, also of one process of several": Stop(
        "the next start continues from the newest checkpoint; without a checkpoint it begins at step 1 and says so",
        NOTHING,
        137,
        FAULTS,
        ("test_killed_at_any_file_operation_and_restarted_a_run_ends_with_the_same_result",),
    ),
    "full disk": Stop(
        (
            "free space is checked at the start and before each save. If it is too small, the run first deletes the "
            "checkpoint that `save_total_limit` would delete next, then waits up to `disk_wait_minutes`, then deletes "
            "the incomplete checkpoint and ends with an error that names it. Log rows that cannot be written are kept "
            "and written later; until then checkpoints contain them"
        ),
        NOTHING,
        2,
        "test_full_disk.py",
        (
            "test_a_run_waits_for_space_and_loses_no_step",
            "test_if_the_log_cannot_be_written_checkpoints_are_saved_and_hold_its_rows",
            "test_on_a_full_disk_the_oldest_checkpoint_is_deleted_before_the_run_waits",
            "test_a_run_is_refused_if_the_disk_has_no_room_for_model_and_checkpoint",
        ),
    ),
    "a file system without locks or without flushing of folders": Stop(
        "the run prints a warning and uses its lock file, which names host, process and job",
        FINISHED,
        0,
        "runtime/test_locks.py",
        ("test_without_kernel_locks_there_is_a_warning",),
    ),
    "a file of a checkpoint is cut, altered or missing": Stop(
        "the previous checkpoint is used instead, and a warning gives the reason",
        FINISHED,
        0,
        FAULTS,
        ("test_a_damaged_checkpoint_is_skipped_with_a_warning",),
    ),
    "files of all checkpoints are cut, altered or missing": Stop(
        "an error that names the files; `--resume_weights_only true` continues if weights are intact",
        NOTHING,
        2,
        FAULTS,
        (
            "test_weights_that_are_damaged_are_never_resumed_from",
            "test_without_its_optimiser_a_run_resumes_only_on_request",
        ),
    ),
    "another configuration, dataset or starting model": Stop(
        "the run is refused; the error names the keys, the split or the folder that differ",
        NOTHING,
        2,
        FAULTS,
        (
            "test_another_configuration_is_refused_and_named",
            "test_another_dataset_is_refused_and_its_split_named",
            "test_other_weights_to_start_from_are_refused",
        ),
    ),
    "lines are missing from `metrics.jsonl`": Stop(
        "the run is refused, because its log would have a gap",
        NOTHING,
        2,
        FAULTS,
        ("test_a_log_that_lost_rows_is_not_continued",),
    ),
    "a second run in the same folder, also from another host": Stop(
        "the second run is refused while the first one runs",
        NOTHING,
        2,
        "runtime/test_locks.py",
        ("test_a_folder_in_which_a_run_is_training_is_not_idle", "test_a_live_run_of_another_host_keeps_this_one_out"),
    ),
    "out of memory": Stop(
        (
            "the run ends with one line: where memory ran out, the largest parts as `plan` counts them, and the "
            "cheapest key to change"
        ),
        LAST_STEP,
        1,
        "runtime/test_out_of_memory.py",
        ("test_a_run_is_saved_after_its_last_whole_step_and_continues",),
    ),
    "processes that start with different keys, versions or weights": Stop(
        "before the first step every rank ends with an error that names rank, host and key",
        NOTHING,
        2,
        "distributed/test_ranks.py",
        ("test_ranks_that_were_given_different_things_are_refused_on_every_rank",),
    ),
    "a loss, gradient, score, reward or value is not finite": Stop(
        "the run ends before a weight changes, with an error that names the row",
        LAST_STEP,
        2,
        RUN,
        ("test_after_an_error_of_any_kind_the_last_whole_step_is_saved_and_the_same_command_continues",),
    ),
    "any other error, `sys.exit` in a user's function included": Stop(
        (
            "the run ends. If weights have changed since the last whole step, they are saved in `interrupted/` and not "
            "as a checkpoint, and the error says so. The exit code is 2 for a ValueError or an OSError"
        ),
        LAST_STEP,
        1,
        RUN,
        (
            "test_after_an_error_of_any_kind_the_last_whole_step_is_saved_and_the_same_command_continues",
            "test_an_error_after_the_last_step_loses_nothing_either",
        ),
    ),
    "an error in an evaluation": Stop(
        "the step is saved without its evaluation; the next start begins with the evaluation",
        LAST_STEP,
        1,
        "test_stop_outcomes.py",
        ("test_a_run_ends_with_the_exit_code_of_the_table_and_saves_what_the_table_says",),
    ),
    "the run is finished": Stop(
        "a new run in the folder is refused, so that nothing is overwritten",
        NOTHING,
        2,
        FAULTS,
        ("test_a_finished_run_is_not_trained_again",),
    ),
    "a damaged row, an empty response": Stop(
        "the row is skipped and counted; it is an error if the fraction of skipped rows exceeds `max_bad_fraction`",
        FINISHED,
        0,
        "test_bad_input.py",
        (),
    ),
    "W&B or TensorBoard fails": Stop(
        "the failure is reported once, and the run continues without the service",
        FINISHED,
        0,
        REPORTERS,
        ("test_a_failing_reporter_is_reported_once_and_dropped_and_the_file_continues",),
    ),
    "the upload of `push_to_hub` fails": Stop(
        ("one line: the error of the hub, and the command that uploads the model, which is complete in `output_dir`"),
        FINISHED,
        2,
        "publish/test_push.py",
        ("test_a_failed_upload_leaves_the_model_and_names_the_command_that_repeats_it",),
    ),
    "the hub accepts a connection and never answers": Stop(
        "an error after 10 s (`HF_HUB_ETAG_TIMEOUT`); a hub that stops answering later causes no error: the run waits",
        NOTHING,
        2,
        "data/test_hub.py",
        (),
    ),
}
"""Event -> its outcome."""
