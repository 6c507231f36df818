"""The table "What happens when" of docs/resume.md as data: each event, and the tests that prove its outcome."""

from __future__ import annotations

FAULTS, RUN, METRICS = "test_faults.py", "runtime/test_run.py", "runtime/test_metrics.py"

STOPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2": (
        "test_stops.py",
        (
            "test_a_job_whose_launcher_and_ranks_are_signalled_at_once_saves_its_last_step",
            "test_a_job_stopped_twenty_times_ends_bit_identical_to_an_uninterrupted_one",
        ),
    ),
    "SIGKILL or power off, also during a save, also of one process of several": (
        FAULTS,
        ("test_killed_at_any_file_operation_and_restarted_a_run_ends_with_the_same_result",),
    ),
    "full disk": (
        "test_full_disk.py",
        (
            "test_a_run_waits_for_space_and_loses_no_step",
            "test_if_the_log_cannot_be_written_checkpoints_are_saved_and_hold_its_rows",
            "test_on_a_full_disk_the_oldest_checkpoint_is_deleted_before_the_run_waits",
            "test_a_run_is_refused_if_the_disk_has_no_room_for_model_and_checkpoint",
        ),
    ),
    "a file system without locks or without flushing of folders": (
        "runtime/test_locks.py",
        ("test_without_kernel_locks_there_is_a_warning",),
    ),
    "a file of a checkpoint is cut, altered or missing": (
        FAULTS,
        ("test_a_damaged_checkpoint_is_skipped_with_a_warning",),
    ),
    "... of every checkpoint": (
        FAULTS,
        (
            "test_weights_that_are_damaged_are_never_resumed_from",
            "test_without_its_optimiser_a_run_resumes_only_on_request",
        ),
    ),
    "another configuration, dataset or starting model": (
        FAULTS,
        (
            "test_another_configuration_is_refused_and_named",
            "test_another_dataset_is_refused_and_its_split_named",
            "test_other_weights_to_start_from_are_refused",
        ),
    ),
    "lines are missing from `metrics.jsonl`": (FAULTS, ("test_a_log_that_lost_rows_is_not_continued",)),
    "a second run in the same folder, also from another host": (
        "runtime/test_locks.py",
        ("test_a_folder_in_which_a_run_is_training_is_not_idle", "test_a_live_run_of_another_host_keeps_this_one_out"),
    ),
    "out of memory": (
        "runtime/test_out_of_memory.py",
        ("test_a_run_is_saved_after_its_last_whole_step_and_continues",),
    ),
    "processes that start with different keys, versions or weights": (
        "distributed/test_ranks.py",
        ("test_ranks_that_were_given_different_things_are_refused_on_every_rank",),
    ),
    "a loss, gradient, score, reward or value is not finite": (
        RUN,
        ("test_after_an_error_of_any_kind_the_last_whole_step_is_saved_and_the_same_command_continues",),
    ),
    "any other error, `sys.exit` in a user's function included": (
        RUN,
        (
            "test_after_an_error_of_any_kind_the_last_whole_step_is_saved_and_the_same_command_continues",
            "test_an_error_after_the_last_step_loses_nothing_either",
        ),
    ),
    "the run is finished": (FAULTS, ("test_a_finished_run_is_not_trained_again",)),
    "a damaged row, an empty response": ("test_bad_input.py", ()),
    "W&B or TensorBoard fails": (
        METRICS,
        ("test_a_failing_reporter_is_reported_once_and_dropped_and_the_file_continues",),
    ),
    "the hub accepts a connection and never answers": ("data/test_hub.py", ()),
}
"""Event -> test file below tests/ and its tests; without test names, the whole file."""
