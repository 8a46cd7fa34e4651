"""F11, F14, F18, F19, F28 as properties of random inputs: each is either refused in one line or does what it promises."""

import functools
import math
import re

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import small_run
from tests.small_run import MODEL
from tokenformer_jax.config import Config, GrowthConfig, OptimizerConfig
from tokenformer_jax.config.training import GROWTH_METHODS
from tokenformer_jax.data.corpus import Corpus, Part
from tokenformer_jax.data.loader import endless_order
from tokenformer_jax.data.packing import ContiguousWindows, PackedDocuments
from tokenformer_jax.data.spec import KINDS, SourceSpec, parse_sources
from tokenformer_jax.distributed.axes import RULES, sharding
from tokenformer_jax.distributed.mesh import MESH_AXES
from tokenformer_jax.growth import plan
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.schedules import learning_rate_schedule

# The same examples in every run, so that a failure is one of the code and not of the day.
properties = settings(
  max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
sizes = st.integers(1, 64)
UPDATES = np.arange(60)  # One length for all examples, so that JAX compiles once.


def one_line(error) -> bool:
  return "\n" not in str(error.value if hasattr(error, "value") else error)


@pytest.fixture(scope="module")
def shapes():
  """The shapes of a state of MODEL, whose layers are traced once and not for every example."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plan, "layers_of", functools.cache(plan.layers_of))
    yield make_program(small_run.config(), MODEL, small_run.mesh()).shapes


@properties
@given(counts=st.tuples(sizes, sizes, sizes), method=st.sampled_from(GROWTH_METHODS))
def test_f14_a_growth_plan_adds_rows_to_the_leaves_of_its_layers_alone_or_is_refused(shapes, counts, method):
  fields = ("qkv_tokens", "proj_tokens", "ffn_tokens")
  old, new = [getattr(MODEL, field) for field in fields], MODEL.grown(**dict(zip(fields, counts)))
  possible = all(a <= b for a, b in zip(old, counts)) and old != list(counts)
  if method == "duplicate":
    possible = possible and all(b % a == 0 for a, b in zip(old, counts))
  try:
    leaves = plan.plan_growth(shapes, MODEL, new, GrowthConfig(method=method))
  except ValueError as error:
    assert not possible and one_line(error)
    return
  assert possible
  params = {path.partition("/")[2]: leaf.new_shape for path, leaf in leaves.items() if path.startswith("params/")}
  assert sum(map(math.prod, params.values())) == new.num_parameters
  for path, leaf in leaves.items():
    assert (leaf.axis is None) == (leaf.old_shape == leaf.new_shape)
    moment = re.match(r"opt_state/.*?/(?:mu|nu)/(.*)", path)
    assert moment is None or leaf.new_shape == params[moment[1]]


@properties
@given(
  mesh=st.sampled_from([(8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8), (4, 1, 2), (1, 2, 4)]),
  axes=st.lists(st.sampled_from([None, *RULES]), max_size=4),
  data=st.data(),
)
def test_f11_an_array_is_split_as_the_table_says_or_refused(mesh, axes, data):
  shape = tuple(data.draw(st.sampled_from([1, 2, 3, 6, 8, 12, 16, 64])) for _ in axes)
  mesh = small_run.mesh(*mesh)
  parts = [math.prod(mesh.shape[name] for name in RULES[axis]) if axis else 1 for axis in axes]
  used = [name for axis in axes if axis for name in RULES[axis] if mesh.shape[name] > 1]
  possible = all(size % count == 0 for size, count in zip(shape, parts)) and len(used) == len(set(used))
  try:
    result = sharding(mesh, tuple(axes), shape, "leaf")
  except ValueError as error:
    assert not possible and str(error).startswith("leaf: ") and one_line(error)
    return
  assert possible
  assert result.shard_shape(shape) == tuple(size // count for size, count in zip(shape, parts))
  assert set(used) <= set(MESH_AXES)


rests = st.text(st.characters(categories=("L", "N", "P", "S"), exclude_characters="+"), min_size=1, max_size=20)
weights = st.floats(1e-6, 1e6, allow_nan=False)


@properties
@given(sources=st.lists(st.tuples(st.sampled_from(sorted(KINDS)), rests, weights), min_size=1, max_size=4))
def test_f28_a_data_spec_is_read_as_it_was_written(sources):
  specs = [SourceSpec(kind, "" if kind == "python-sources" else rest, weight) for kind, rest, weight in sources]
  assert parse_sources(" + ".join(f"{spec.weight!r}*{spec}" for spec in specs)) == specs


@properties
@given(text=st.text(st.sampled_from("0.5*+ :textjsonlpythonsources#-e\n"), max_size=30))
def test_f28_any_text_is_a_data_spec_or_refused_in_one_line(text):
  try:
    specs = parse_sources(text)
  except ValueError:
    return
  assert all(spec.kind in KINDS and 0 < spec.weight < math.inf for spec in specs)


documents = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@properties
@given(lengths=documents, seq_length=st.integers(1, 16), chosen=st.data())
def test_f18_every_label_is_in_one_row_of_whole_documents(lengths, seq_length, chosen):
  corpus, part, kept = corpus_of(lengths, chosen)
  packer = PackedDocuments(part, seq_length, padding_id=0)
  pairs = []
  for index in range(len(packer)):
    row = packer.row(index)
    assert all(array.shape == (seq_length,) for array in row)
    counted = row.weights > 0
    np.testing.assert_array_equal(counted, row.segments > 0)
    pairs += zip(row.inputs[counted].tolist(), row.labels[counted].tolist())
  expected = [
    pair for a, b in kept for pair in zip(corpus.tokens[a : b - 1].tolist(), corpus.tokens[a + 1 : b].tolist())
  ]
  assert sorted(pairs) == sorted(expected)


@properties
@given(lengths=documents, seq_length=st.integers(1, 16), chosen=st.data())
def test_f18_windows_hold_every_id_of_the_text_in_order(lengths, seq_length, chosen):
  corpus, part, kept = corpus_of(lengths, chosen)
  text = [i for a, b in kept for i in corpus.tokens[a:b].tolist()]
  packer = ContiguousWindows(part, seq_length)
  rows = [packer.row(index) for index in range(len(packer))]
  covered = len(rows) * seq_length
  assert [i for row in rows for i in row.inputs.tolist()] == text[:covered]
  assert [i for row in rows for i in row.labels.tolist()] == text[1 : covered + 1]
  assert len(text) - 1 - covered < seq_length and packer.report["dropped_tokens"] == len(text) - (
    covered + 1 if rows else 0
  )


def corpus_of(lengths, chosen):
  """(corpus of distinct ids, a part of its documents, where these start and end)."""
  ends = np.cumsum(lengths)
  corpus = Corpus(np.arange(1, ends[-1] + 1, dtype=np.uint16), ends, np.zeros(len(ends), np.uint64), {}, "text")
  some = np.array(chosen.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)).filter(any)))
  starts = ends - np.array(lengths)
  return corpus, Part(corpus, some), [(a, b) for a, b, take in zip(starts, ends, some) if take]


@properties
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=2), seed=st.integers(0, 2**40))
def test_f19_every_epoch_of_a_source_has_each_of_its_rows_once(lengths, seed):
  order = endless_order(lengths, [1.0] * len(lengths), seed)
  for packer, length in enumerate(lengths):
    rows = [row for owner, row in (order[n] for n in range(2 * length * len(lengths))) if owner == packer]
    assert sorted(rows[:length]) == sorted(rows[length : 2 * length]) == list(range(length))


@properties
@given(
  schedule=st.sampled_from(("warmup_stable_decay", "warmup_cosine")),  # A triangle has no other lengths than the run's.
  warmup=st.integers(0, 30),
  decay=st.integers(0, 30),
  num_steps=st.integers(1, 60),
  rate=st.floats(1e-6, 1.0),
  share=st.floats(0.0, 1.0),
)
def test_f28_a_schedule_rises_stays_and_falls_between_its_rates_or_is_refused(
  schedule, warmup, decay, num_steps, rate, share
):
  config = OptimizerConfig(
    schedule=schedule, warmup_steps=warmup, decay_steps=decay, learning_rate=rate, min_learning_rate=share * rate
  )
  falls = schedule == "warmup_cosine" or decay > 0
  try:
    rates = np.asarray(jax.vmap(learning_rate_schedule(config, num_steps))(UPDATES))[:num_steps]
  except ValueError as error:
    assert max(warmup, 1) + (1 if schedule == "warmup_cosine" else decay) > num_steps and one_line(error)
    return
  peak = max(warmup, 1) - 1
  assert np.isfinite(rates).all() and (rates >= 0).all()
  np.testing.assert_allclose(rates[0], rate / max(warmup, 1), rtol=1e-5)
  np.testing.assert_allclose(rates[peak], rate, rtol=1e-5)
  assert (np.diff(rates[: peak + 1]) >= 0).all() and (np.diff(rates[peak:]) <= 1e-6 * rate).all()
  assert rates[-1] == pytest.approx(share * rate if falls else rate, rel=1e-5, abs=1e-12)


values = st.one_of(st.integers(-3, 2**40), st.floats(allow_nan=True), st.text(max_size=5), st.booleans(), st.none())
PATHS = [
  (section, field)
  for section, fields in small_run.config().to_dict().items()
  if isinstance(fields, dict)
  for field in fields
]


@properties
@given(path=st.sampled_from(PATHS), value=values)
def test_f28_an_override_is_kept_or_refused_by_its_name(path, value):
  section, field = path
  fields = small_run.config().to_dict()
  fields[section] = {**fields[section], field: value}
  try:
    config = Config.from_dict(fields)
  except ValueError as error:
    assert one_line(error) and "config" in str(error)
    return
  kept = getattr(getattr(config, section), field)
  assert kept == value or kept == (tuple(value) if isinstance(value, (list, str)) else value)
  if type(kept) is float:
    assert math.isfinite(kept) or field == "clip_norm"
  assert Config.from_dict(config.to_dict()) == config


@properties
@given(path=st.sampled_from(PATHS), letter=st.sampled_from("abxyz_"))
def test_f28_a_field_that_is_misspelt_is_refused_with_the_right_name(path, letter):
  section, field = path
  fields = small_run.config().to_dict()
  fields[section] = {**fields[section], field + letter: 1}
  with pytest.raises(ValueError, match=rf"config.{section}.{field}{letter} is unknown. Did you mean '{field}'"):
    Config.from_dict(fields)
