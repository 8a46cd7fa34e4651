"""Prints the table of faults in docs/reliability.md from the tests that are there: `python -m tests.faults.fault_table`."""

import ast
import collections
import pathlib
import re
from typing import NamedTuple

FOLDER = pathlib.Path(__file__).parent.parent


class Fault(NamedTuple):
  """A row: the fault, what the tests inject, what must follow, and tests elsewhere, as FILE.FUNCTION."""

  name: str
  injected: str
  result: str
  elsewhere: tuple[str, ...] = ()


FAULTS = {
  1: Fault(
    "kill −9 during a save",
    "at 6 drawn file operations of more than 150, at all of them with `-m every_operation`; the soak",
    "resumes from the newest committed step, bit for bit",
    ("test_loop.test_a_run_killed_before_its_growth_and_while_saving_after_it_resumes_bit_by_bit",),
  ),
  2: Fault(
    "kill while an old step is deleted", "the same kills, and what they leave", "a half-deleted step is not offered"
  ),
  3: Fault(
    "SIGTERM, SIGINT, SIGHUP, once and twice",
    "each to one of two processes, two to one that hangs, during an evaluation, and through resume.sh",
    "all save the same step, code 143; the second ends at once",
    ("test_processes.test_a_single_process_opens_no_port_and_stops_at_sigterm",),
  ),
  4: Fault(
    "a damaged file", "empty, half, 99 %, zeroed, deleted: every file of a step", "named; the step before is taken"
  ),
  5: Fault("a flipped bit", "one in every file and 50 in the manifest, places drawn", "seen before use"),
  6: Fault("a process's shard is missing", "a file of one step, for two processes", "both take the same good step"),
  7: Fault(
    "a save fails, a work folder cannot be written",
    "no space and EIO at 4 drawn operations each, at all with `-m every_operation`; at the commit; on either of two "
    "processes; three in a row; clock forward; folder deleted, read-only",
    "one line, older steps intact, saved again or ended with code 1",
  ),
  8: Fault("stray numbered entries", "9 kinds, and one during the run", "set aside, neither taken nor fatal"),
  9: Fault(
    "two writers in one folder", "a second run, a kill, no file locks, a sleeping owner", "the second is refused"
  ),
  10: Fault(
    "other mesh or number of processes on resume",
    "a run that moves between three meshes; two processes and one",
    "the same state and losses within rounding",
    (
      "test_meshes.test_a_checkpoint_of_any_mesh_is_the_same_on_any_other",
      "test_meshes.test_a_run_that_moves_from_mesh_to_mesh_and_grows_is_the_run_that_stays",
      "test_processes.test_the_state_that_several_processes_save_is_that_of_one",
    ),
  ),
  11: Fault(
    "an axis that the mesh does not divide",
    "100 random arrays and meshes, and a table",
    "split as the rules say, or refused by leaf, axis and size",
    ("test_axes.test_refusals_name_leaf_axes_and_way_out",),
  ),
  12: Fault(
    "another structure, dtype, version or field",
    "a newer format, an unknown field, a step without manifest; leaves of other shape and dtype",
    "refused by name; old steps load with a warning",
    ("test_checkpoints.test_a_state_that_does_not_fit_is_refused_by_its_first_leaf",),
  ),
  13: Fault(
    "kill during a growth",
    "at 2 drawn file operations of more than 150, at all with `-m every_operation`",
    "source untouched, no target, done again the same",
    ("test_stream.test_killed_it_leaves_the_source_and_no_target_and_a_rerun_gives_the_same",),
  ),
  14: Fault(
    "a growth that is none",
    "100 random counts and methods, and a table",
    "refused before anything is written",
    ("test_growth.test_what_is_no_growth_is_refused", "test_stream.test_a_mistake_is_told_and_nothing_is_written"),
  ),
  15: Fault(
    "a wrong growth",
    "every method",
    "function, old rows and moments are kept; new rows learn",
    (
      "test_growth.test_old_rows_moments_and_all_else_are_kept_to_the_bit",
      "test_growth.test_new_rows_learn_at_once",
      "test_loop.test_growth_inside_a_run_keeps_the_held_out_loss",
    ),
  ),
  16: Fault(
    "NaN, Inf, a spike",
    "in loss, gradient and update; in each part of a state; an impossible rate",
    "skipped, counted, never saved; code 3",
    ("test_loop.test_a_run_that_is_no_longer_finite_ends_and_saves_nothing_of_it",),
  ),
  17: Fault(
    "stop and resume",
    "stops at and after a growth, and a kill before it",
    "the uninterrupted run, bit for bit",
    ("test_loop.test_a_run_stopped_at_and_after_its_growth_resumes_bit_by_bit",),
  ),
  18: Fault(
    "broken data",
    "a token file changed in 4 ways under a run, 8 kinds of bad lines, 200 random packings",
    "named by file and line, or counted; no id lost",
  ),
  19: Fault(
    "other data on resume",
    "4 settings, one id at 4 places, an edited record, 100 random orders",
    "refused by fingerprint",
    ("test_loop.test_another_text_of_the_same_name_is_refused_unless_allowed",),
  ),
  20: Fault(
    "another tokenizer",
    "a swapped tokenizer.json for every tool",
    "refused by fingerprint",
    ("test_resume.test_another_tokenizer_is_refused",),
  ),
  21: Fault(
    "ids outside the vocabulary", "3 dtypes; labels of −1 and above", "refused with the position, or as documented"
  ),
  22: Fault(
    "a prompt too long, a full cache",
    "a table of requests",
    "refused; the cache is not overwritten",
    ("test_generate.test_a_bad_request_is_refused", "test_cache.test_a_full_cache_is_refused_and_left_as_it_was"),
  ),
  23: Fault(
    "a process dies or fails, restarts",
    "an error of one of two processes, a mistake of the other, a kill of either; 7 sequences of exit codes, 6 for SLURM",
    "all end within seconds with its reason; restarts stop where no step was gained",
  ),
  24: Fault("a step that hangs", "a stopped process and a wait in C", "stacks of all threads, code 1"),
  25: Fault(
    "a pickle that runs code",
    "a table of hostile pickles",
    "refused, nothing runs",
    (
      "test_interop_torch_file.test_a_pickle_that_runs_code_is_refused_and_runs_nothing",
      "test_interop_torch_file.test_hostile_and_broken_pickles_cost_little",
    ),
  ),
  26: Fault(
    "hostile safetensors",
    "a table of headers",
    "refused at little cost",
    ("test_interop_safetensors_file.test_hostile_and_damaged_files_are_refused_at_little_cost",),
  ),
  27: Fault(
    "paths that leave their folder",
    "`../` in names of arrays, shards and steps",
    "refused",
    (
      "test_interop_safetensors_file.test_hostile_and_damaged_files_are_refused_at_little_cost",
      "test_interop_pretrained.test_a_bad_index_is_refused",
    ),
  ),
  28: Fault(
    "wrong settings",
    "numbers that are not finite, empty folders, 500 random sources, schedules and overrides",
    "kept, or refused in one line, with the nearest name",
    ("test_cli_train.test_a_mistake_is_one_line_and_nothing_is_written",),
  ),
  29: Fault("leaves that collide on disk", "`a.b` beside `a/b`, an empty leaf", "refused at save"),
}


def functions(path: pathlib.Path) -> list[str]:
  """The names of the test functions of a file."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def tests_by_fault() -> dict[int, collections.Counter]:
  """{number of a fault: how many tests of each file in this folder have it in their names}."""
  found: dict[int, collections.Counter] = {number: collections.Counter() for number in FAULTS}
  for path in sorted((FOLDER / "faults").glob("test_*.py")):
    for name in functions(path):
      for number in re.findall(r"(?<=_[fF])\d+(?=_)", name):
        found[int(number)][path.stem] += 1
  return found


def table() -> str:
  """The rows of the table, in Markdown. Raises AssertionError if a test that it names is not there."""
  lines = ["| | fault | injected | what follows | tests |", "|---|---|---|---|---|"]
  for number, counts in tests_by_fault().items():
    fault = FAULTS[number]
    tests = [f"{count} in faults/{name}" for name, count in counts.items()]
    for place in fault.elsewhere:
      file, _, name = place.partition(".")
      assert name in functions(FOLDER / f"{file}.py"), f"F{number}: there is no {place}"
      tests.append(f"{file}: {name.removeprefix('test_').replace('_', ' ')}")
    assert tests, f"F{number} has no test"
    lines.append(f"| F{number} | {fault.name} | {fault.injected} | {fault.result} | {'; '.join(tests)} |")
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  print(table(), end="")
