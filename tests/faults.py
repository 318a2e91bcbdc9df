"""Every fault that is made on purpose: what is done, what must happen, which tests hold it; run as a script, what happened.

python tests/faults.py [--dry-run] [PART ...]: these tests, long forms included, and their outcome into docs/reliability.md.
`make test` runs them as well, the long ones with fewer kills and runs or, where there is no shorter form, not at all.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: written by tests/faults.py -->", "<!-- end of faults -->"


class Fault(NamedTuple):
    """done: what is done. must: what must happen. tests: ids below tests/. long: what only `make faults` does."""

    done: str
    must: str
    tests: tuple[str, ...]
    long: str = ""


def resume(*names):
    return tuple(f"test_faults_resume.py::test_{name}" for name in names)


def made(*names):
    return tuple(f"test_faults.py::test_{name}" for name in names)


UNUSABLE = resume("a_checkpoint_that_can_not_be_used_is_told_and_the_one_before_used")
FAULTS = {
    "Processes that end": (
        Fault(
            "SIGTERM or a STOP file in the middle of a step",
            "the step ends, a checkpoint is saved, exit code 75; resumed, the run ends with the same digits",
            ("test_distributed.py::test_a_termination_signal_saves_and_the_run_ends_bit_equal",),
        ),
        Fault(
            "SIGKILL in the middle of a step",
            "resumed from the last checkpoint, the same digits",
            made("a_run_killed_between_two_checkpoints_resumes"),
        ),
        Fault(
            "SIGTERM, ctrl-C or SIGKILL while the last checkpoint is being saved",
            "the checkpoint before is intact; resumed, the same digits",
            made("a_second_signal_while_the_last_checkpoint_is_saved"),
        ),
        Fault(
            "one of four processes is killed in the middle of saving, two go on",
            "the half-written checkpoint is not used; the undisturbed losses, to 1e-5",
            ("test_distributed.py::test_of_four_processes_one_is_killed_while_saving_and_two_go_on",),
        ),
        Fault(
            "of two processes one dies, or hangs",
            "the other ends within the heartbeat, 100 s; nothing half-written is used",
            made("of_two_processes_one_dies_or_hangs_and_the_other_ends"),
            "all of it",
        ),
        Fault(
            "a study is killed at random moments: compile, step, evaluation, checkpoint, record, notebook, report",
            "it goes on, and ends with the records of an undisturbed one",
            (*made("a_study_killed_fifty_times_ends_with_the_records_of_an_undisturbed_one"),),
            "all of it; `test_study.py` kills twice",
        ),
        Fault(
            "ctrl-C in a notebook",
            "the next execution of the cell goes on, the same digits",
            made("an_interrupted_notebook_goes_on_in_the_next_cell"),
        ),
        Fault(
            "a kernel is killed under papermill",
            "told and tried again; papermill's word that all completed is not believed",
            (
                "test_papermill.py::test_a_dead_kernel_is_told_and_lost",
                "test_study.py::test_a_cell_that_fails_is_kept_and_told",
            ),
        ),
        Fault(
            "cells and a study's own process are killed; ctrl-C in a study, also while a run sets up; a cell fails (with Ray, "
            "whose workers are killed as well: `make test`)",
            "done again or told, the rest goes on, nothing outlives the study, the same records",
            (
                "test_engines.py::test_killed_failed_interrupted_and_resumed[local]",
                "test_study.py::test_nothing_outlives_the_process_that_started_it",
            ),
        ),
        Fault(
            "a node of a cluster is lost",
            "its cells run elsewhere, none twice",
            ("test_ray.py::test_a_study_across_two_nodes_of_which_one_is_killed",),
        ),
        Fault(
            "a host of a TPU slice is lost in the middle of a run",
            "the slice is given back for another, where the run goes on",
            ("test_ray.py::test_one_slice_a_cell", "test_ray.py::test_a_slice_that_fails"),
        ),
        Fault(
            "of two cells that run as jobs of their own one is stopped",
            "it saves and ends, the other goes on",
            ("test_engines.py::test_a_cell_that_is_stopped_leaves_others_in_the_folder_alone",),
        ),
        Fault(
            "the kernel of an open notebook is killed",
            "the run that it started goes on, and is found again",
            ("test_papermill.py::test_a_run_outlives_the_notebook_that_started_it",),
        ),
        Fault("a cell hangs", "ended after the study's timeout_minutes", ("test_study.py::test_too_long_is_ended",)),
        Fault(
            "a report's build is killed, or its disk fills up",
            "the old report stays; the next build leaves nothing behind",
            made("a_report_that_can_not_be_finished_leaves_the_old_one"),
        ),
    ),
    "Machines": (
        Fault(
            "memory runs out (ulimit)",
            "no summary; with memory again the run resumes, the same digits",
            made("memory_that_runs_out_is_told_and_the_run_resumes"),
        ),
        Fault(
            "a device has no memory for the first step",
            "one line with advice, no checkpoint",
            made("a_device_without_memory_is_told_with_advice"),
        ),
        Fault(
            "the clock steps back by an hour every second",
            "the same digits",
            made("a_clock_that_steps_back_changes_no_number"),
        ),
        Fault(
            "the disk fills up while a checkpoint is saved",
            "an error, older checkpoints kept; with room the same digits",
            made("a_disk_that_fills_up_while_saving_loses_nothing"),
        ),
        Fault(
            "the disk has no room for a checkpoint's folders",
            "one line, exit code 1, at once; with room the same digits",
            made("a_disk_without_room_for_a_checkpoint_s_folders_ends_the_run"),
        ),
        Fault(
            "the disk is full: what TensorBoard reads",
            "one line, exit code 1; with room the same digits",
            made("a_disk_that_is_full_for_what_tensorboard_reads_ends_the_run"),
        ),
        Fault(
            "the disk is full: records",
            "the old record or the new one, whole",
            made("a_full_disk_leaves_records_whole"),
        ),
        Fault(
            "the disk is full when a study begins",
            "one line, exit code 1: it is no bad input",
            made("a_study_on_a_full_disk_is_no_bad_input"),
        ),
        Fault(
            "the disk fills up while a notebook is written",
            "the cell fails, no notebook; with room it is done",
            made("a_full_disk_while_a_notebook_is_written"),
        ),
        Fault(
            "the disk is full: compiled programs and rendered images",
            "the run does without, and says so",
            made("a_full_disk_for_caches_costs_time_only"),
        ),
        Fault(
            "the disk is full: lists of near-duplicates, contact sheets",
            "one line, exit code 2",
            made("a_full_disk_while_lists_of_data_are_written"),
        ),
        Fault(
            "outputs can't be written",
            "one line, exit code 2",
            made("a_folder_that_can_not_be_written_is_one_clear_line"),
        ),
        Fault("a slow file system", "the same digits", made("a_slow_file_system_changes_no_number")),
        Fault(
            "storage answers with an error once",
            "read again, the same example",
            ("test_loader.py::test_a_storage_error_is_tried_again",),
        ),
        Fault(
            "two studies, or two runs, on one folder at once",
            "one runs, the other names the process and machine that does",
            (
                *made("of_two_studies_started_at_once_on_a_folder_one_runs", "two_studies_in_one_folder_never_mix"),
                "test_status.py::test_a_lock_names_its_holder_and_ends_with_it",
            ),
        ),
        Fault(
            "a lock names a process that is a zombie, or whose number is another's now",
            "nobody waits for it",
            ("test_status.py::test_a_lock_is_not_held_by_a_zombie_or_by_who_has_its_holder_s_number_now",),
        ),
        Fault(
            "a study waits for cores that others have, and is stopped",
            "it says that it waits, and ends",
            ("test_engines.py::test_a_study_that_waits_for_cores_can_be_stopped",),
        ),
        Fault(
            "who reads what a command says goes away",
            "exit code 1, no traceback",
            ("test_study.py::test_a_reader_that_goes_away_is_no_bad_input",),
        ),
        Fault(
            "2,000 runs through the engine of studies",
            "memory, threads and file handles flat, none lost, none done twice",
            made("soak_of_tiny_runs_through_the_engine_of_studies", "two_thousand_cells_leave_memory_and_handles_flat"),
            "2,000 real runs instead of 200",
        ),
    ),
    "Checkpoints and records": (
        Fault(
            "a checkpoint is truncated, bit-flipped, emptied, lacks a file, has a torn or changed record",
            "found by its checksums; the one before is used, and that is said; the same digits",
            (
                *UNUSABLE,
                *resume("a_file_in_a_checkpoint_s_place_is_none"),
                "test_train.py::test_a_damaged_checkpoint_is_found_and_the_one_before_used",
            ),
        ),
        Fault(
            "a checkpoint is of another variant, of an older schema, of another step, of other types",
            "the same: what differs is named, before anything is restored",
            UNUSABLE,
        ),
        Fault(
            "no sound checkpoint is left",
            "one line, exit code 2; never a silent start from step 0",
            resume("with_no_sound_checkpoint_a_run_is_refused_not_begun_anew"),
        ),
        Fault(
            "params.json is lost, and the run asked for is another one",
            "refused: the checkpoints say whose they are",
            resume(
                "a_folder_without_params_json_never_goes_on_as_another_run",
                "a_folder_without_params_json_goes_on_as_what_it_was",
            ),
        ),
        Fault(
            "resumed with other parameters, or a study's file has changed",
            "refused, naming the parameter and both values",
            (
                *resume("a_folder_with_params_json_names_the_parameter_and_both_values"),
                *made("a_study_file_that_changes_while_it_runs_changes_nothing"),
            ),
        ),
        Fault(
            "resumed on other data: seed, size, order, content",
            "refused, naming what was saved and what is now",
            (
                *resume("data_that_changed_between_two_legs_are_refused"),
                "test_sampler.py::test_state_is_small_json_and_a_mismatch_names_both_values",
            ),
        ),
        Fault(
            "other versions of jax, another processor or fewer cores, other devices or process counts between two legs",
            "said, and in the summary as `changes`",
            resume("another_version_or_machine_between_two_legs_is_recorded"),
        ),
        Fault(
            "resumed on other process counts, worker counts, batch sizes, views",
            "each example once an epoch, the same views",
            (
                "test_loader.py::test_ten_kills_and_other_topologies_each_epoch_once",
                "test_loader.py::test_ten_kills_of_real_processes",
                "test_loader.py::test_batches_are_the_same_for_any_workers",
                "test_loader.py::test_views_mixing_and_randaugment_do_not_depend_on_the_number_of_processes",
            ),
        ),
        Fault(
            "resumed on another mesh, of four devices instead of one",
            "the losses of one device, to 1e-5; said in the summary",
            resume("another_mesh_between_two_legs_gives_the_same_losses_and_is_recorded"),
        ),
        Fault(
            "lines of metrics.jsonl are lost, doubled, changed",
            "refused: a mean over them would be another number",
            resume(
                "metrics_that_a_checkpoint_knows_otherwise_are_refused",
                "metrics_of_a_finished_run_are_held_by_its_record",
            ),
        ),
        Fault(
            "a digit of summary.json is changed; it is truncated, empty, of another kind",
            "an error that names the file, never a wrong number",
            (
                *resume("every_digit_of_a_record_is_held_by_its_digest"),
                "test_records.py::test_a_damaged_summary_is_an_error_naming_the_file_or_skipped_with_a_warning_naming_it",
            ),
        ),
        Fault(
            "compiled programs or rendered images in a shared cache are damaged",
            "made again, the same digits",
            (
                *resume("compiled_programs_that_are_damaged_are_compiled_again"),
                "test_data.py::test_cached_images_are_the_rendered_ones_and_damage_is_repaired",
            ),
        ),
        Fault(
            "records of an older schema",
            "read beside new ones",
            resume("records_of_the_older_schema_are_read_beside_new_ones"),
        ),
        Fault(
            "a run's or study's folder in disorder: files emptied, files for folders, folders for files",
            "one line, exit code 2, nothing changed",
            (
                *resume("a_folder_in_disorder_is_one_line", "a_torn_quarantine_is_mended_and_a_damaged_one_refused"),
                *made("a_damaged_study_json_is_one_line"),
            ),
        ),
    ),
    "Numbers and data": (
        Fault(
            "NaN or inf in the loss, the gradient, a parameter",
            "the run stops before that is saved, exit code 3; the learning rate"
            " has lost its search; checkpoints are from before",
            (
                *resume("what_is_no_number_stops_the_run_before_it_is_saved", "not_finite_names_the_leaf"),
                *made("a_number_that_is_none_stops_the_run_and_keeps_its_checkpoints"),
            ),
        ),
        Fault(
            "a loss spike",
            "recorded; clipping bounds the update; no batch is skipped",
            resume("a_loss_spike_is_recorded_and_bounded"),
        ),
        Fault(
            "NaN in a batch; labels out of range",
            "a bad example, named",
            (
                *resume("pixels_that_are_no_numbers_are_bad_examples"),
                "test_loader.py::test_labels_out_of_range_are_bad_examples_not_clamped",
            ),
        ),
        Fault(
            "a loader's thread raises or hangs",
            "the run ends and names the example",
            (
                "test_loader.py::test_a_hanging_worker_surfaces_with_its_example",
                "test_loader.py::test_stop_policy_names_the_first_bad_example",
            ),
        ),
        Fault(
            "slow data",
            "the same digits; the summary has data_wait_seconds",
            resume("slow_data_change_no_number_and_are_recorded"),
        ),
        Fault(
            "pictures that are truncated, bit-flipped, empty, HTML, of another format",
            "weight 0, named in quarantine.jsonl",
            (
                "test_loader.py::test_every_kind_of_damage_is_an_error_that_names_the_example",
                "test_loader.py::test_bad_examples_keep_their_slots_and_are_named",
            ),
        ),
        Fault(
            "grey, CMYK, RGBA, 16-bit, rotated, one pixel, huge",
            "a defined conversion, or too large and named",
            (
                "test_loader.py::test_every_kind_of_image_becomes_rgb",
                "test_loader.py::test_images_too_large_are_decoded_smaller_or_refused",
            ),
        ),
        Fault(
            "more than 0.1 % of the examples are bad",
            "the run stops and says which was the last",
            ("test_loader.py::test_the_quarantine_is_written_once_each_and_stops_above_its_share",),
        ),
        Fault(
            "held-out examples can't be read any more when a run is evaluated",
            "more than 0.1 %, or all: the run stops and says so; never a number of what is left",
            ("test_loader.py::test_held_out_numbers_are_never_of_a_fragment_of_the_set",),
        ),
        Fault(
            "ArrayRecord shards are missing, cut, empty, bit-flipped",
            "refused when opened, naming the shard; a flip costs the examples that it hits",
            (
                "test_encoded.py::test_damaged_array_records_are_refused_when_opened",
                "test_encoded.py::test_a_flipped_bit_of_an_array_record_costs_the_examples_it_hits",
            ),
        ),
        Fault(
            "fewer examples than a batch; one; an empty split",
            "refused with the numbers, or epochs follow each other in a batch",
            (
                "test_config.py::test_bad_parameters_are_named",
                "test_sampler.py::test_every_epoch_is_the_data_set_whatever_the_schedule",
                "test_sampler.py::test_bad_requests",
            ),
        ),
        Fault(
            "processes of one run disagree on parameters or data",
            "refused, naming both values",
            ("test_distributed.py::test_processes_that_disagree_are_refused_before_anything_is_written",),
        ),
        Fault(
            "the random numbers of NumPy or this library drift",
            "golden orders and pictures differ",
            ("test_sampler.py::test_golden_order", "test_data.py::test_golden_fractals"),
        ),
        Fault(
            "held-out pictures among the training ones",
            "found and listed for `exclude`",
            (
                "test_dedup.py::test_planted_copies_between_two_folders",
                "test_encoded.py::test_excluded_ids_are_never_seen_and_lists_for_other_data_refused",
            ),
        ),
        Fault(
            "a held-out set that does not divide",
            "each example counts once",
            ("test_loader.py::test_evaluation_counts_each_example_once_on_any_number_of_processes",),
        ),
    ),
    "Hostile input": (
        Fault(
            "misspelt names, texts for numbers, values out of range",
            "one line, exit code 2, nothing written",
            (
                "test_config.py::test_bad_parameters_are_named",
                "test_config.py::test_bad_studies_are_refused_whole",
                "test_papermill.py::test_unknown_names_texts_for_numbers_and_truth_values",
            ),
        ),
        Fault(
            "YAML: code in tags, repeated keys, bombs of aliases, endless nesting, thousands of digits, no UTF-8",
            "the same",
            (
                *resume("hostile_parameter_files_are_one_line", "values_may_be_shared_and_merged_in_yaml"),
                *made("hostile_study_files_are_one_line", "yaml_that_runs_code_does_not"),
            ),
        ),
        Fault(
            "pickles that run code",
            "refused by name",
            (
                *made("pickles_in_weight_files_run_no_code"),
                "test_pretrained.py::test_a_pickle_that_would_run_something_is_refused_by_name",
            ),
        ),
        Fault(
            "notebook parameters with code in them", "they stay text", made("parameters_with_code_in_them_stay_text")
        ),
        Fault(
            "path traversal in names of studies, runs, notebooks",
            "one line",
            made("names_that_lead_elsewhere_are_refused", "hostile_study_files_are_one_line"),
        ),
        Fault(
            "pipes, devices and files without end; hostile ids, labels and classes",
            "one line, exit code 2, nothing written",
            resume(
                "files_without_end_are_not_read",
                "hostile_lists_of_ids_are_one_line",
                "hostile_labels_in_shards_are_one_line",
            ),
        ),
        Fault(
            "a program that calls itself a picture (EPS)",
            "not run",
            (
                "test_predict.py::test_a_program_that_calls_itself_a_picture_is_not_run",
                "test_loader.py::test_every_kind_of_damage_is_an_error_that_names_the_example",
            ),
        ),
        Fault("path traversal in archive members", "nothing is written", made("archives_with_ways_out_write_nothing")),
        Fault("zip bombs", "refused before they are unpacked", made("zip_bombs_are_not_unpacked")),
        Fault(
            "images that explode in memory",
            "refused by their headers",
            ("test_loader.py::test_every_kind_of_damage_is_an_error_that_names_the_example",),
        ),
        Fault(
            "SVG and HTML in labels, folders, errors",
            "text in the report",
            made(
                "markup_in_names_of_classes_and_folders_is_text_in_the_report",
                "markup_in_errors_and_captions_is_text_in_the_report",
            ),
        ),
        Fault(
            "extremely long names, look-alikes in Unicode",
            "folders of bounded length, told apart; refused",
            made("long_names_and_look_alikes"),
        ),
    ),
    "Set-up": (
        Fault(
            "JupyterLab and the explorer are started",
            "on this machine only, with a token",
            made("servers_listen_here_only_and_want_a_token"),
        ),
        Fault(
            "a secret in the environment of a study",
            "in no record, notebook or report",
            made("no_secret_of_the_environment_gets_into_records_or_reports"),
        ),
        Fault(
            "dependencies",
            "pinned exactly; `make audit` looks up known vulnerabilities, and says where it can't",
            (
                "test_environment.py::test_constraints_are_versions_and_markers_only",
                "test_environment.py::test_every_requirement_has_a_satisfying_pin",
                *made("what_an_audit_says", "an_audit_without_network"),
            ),
        ),
        Fault(
            "a report is opened",
            "it loads nothing from elsewhere, and has a content-security policy",
            (
                "test_notebooks.py::test_the_report_is_whole_and_needs_no_network",
                *made("markup_in_errors_and_captions_is_text_in_the_report"),
            ),
        ),
    ),
}


def all_tests(titles: Iterable[str] = FAULTS) -> list[str]:
    """The ids of all tests of these parts, each once."""
    return list(dict.fromkeys(test for title in titles for fault in FAULTS[title] for test in fault.tests))


def written() -> dict[Fault, str]:
    """What happened as the page has it."""
    rows = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    known = {row[0]: row[3].strip() for row in rows if len(row) == 4}
    return {fault: known[_done(fault)] for faults in FAULTS.values() for fault in faults if _done(fault) in known}


def table(happened: dict[Fault, str]) -> str:
    """The table in Markdown; what `happened`, where known, in its last column."""
    lines = []
    for title, faults in FAULTS.items():
        lines += ["", f"### {title}", "", "| what is done | what must happen | tests | what happened |", "|-|-|-|-|"]
        for fault in faults:
            tests = " ".join(f"`{test}`" for test in fault.tests)
            lines.append(f"| {_done(fault)} | {fault.must} | {tests} | {happened.get(fault, '')} |")
    return "\n".join([*lines, ""])


def _done(fault: Fault) -> str:
    return fault.done + (f" (`make faults`: {fault.long})" if fault.long else "")


class Outcomes:
    """A pytest plugin: (passed, seconds) of each test function over its parameters."""

    def __init__(self):
        self.found: dict[str, tuple[bool, float]] = {}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.partition("[")[0].rpartition("/")[2]
        passed, seconds = self.found.get(name, (True, 0.0))
        self.found[name] = (passed and report.passed, seconds + report.duration)

    def of(self, fault: Fault) -> str:
        """What happened: all tests passed or some did not, and how long they took."""
        outcomes = [self.found.get(test.partition("[")[0], (False, 0.0)) for test in fault.tests]
        failed = [test for test, (passed, _) in zip(fault.tests, outcomes, strict=True) if not passed]
        return (f"FAILED: {', '.join(failed)}" if failed else "as it must") + f", {sum(s for _, s in outcomes):.0f} s"


def main() -> int:
    """0 where everything happened as it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="only write the table, without outcomes")
    parser.add_argument(
        "parts", nargs="*", help="headings of the table, only these; what happened elsewhere stays as it is"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(FAULTS):
        parser.error(f"no part {sorted(unknown)[0]!r}; known: {', '.join(FAULTS)}")
    titles = arguments.parts or list(FAULTS)
    outcomes, clock = Outcomes(), time.monotonic()
    happened = written() if arguments.parts else {}
    if not arguments.dry_run:
        os.environ["FAULTS"] = "long"
        import pytest

        pytest.main(
            ["-q", "--no-header", "--durations=10", *(str(TESTS / test) for test in all_tests(titles))],
            plugins=[outcomes],
        )
        now = {fault: outcomes.of(fault) for title in titles for fault in FAULTS[title]}
        happened |= now
        for fault, what in now.items():
            print(f"{what:>18}  {fault.done}: {fault.must}")
        wrong = sum("FAILED" in what for what in now.values())
        print(f"{len(now)} faults, {wrong} not as it must, in {(time.monotonic() - clock) / 60:.1f} minutes")
    text = TABLE.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    TABLE.write_text(f"{before}{BEGIN}\n{table(happened)}\n{END}{after}")
    return 1 if any("FAILED" in what for what in happened.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
