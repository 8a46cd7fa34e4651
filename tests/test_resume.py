"""Whether a run may resume in a work folder: what may change, what may not, and the messages."""

import dataclasses
import json

import pytest

from tests import small_run
from tests.small_run import GROWN, MODEL
from tokenformer_jax import data
from tokenformer_jax.config import MeshConfig, ModelConfig
from tokenformer_jax.training.resume import (
  changed_rate,
  check_same_model,
  check_same_optimizer,
  check_same_run,
  check_same_tokenizer,
  check_same_weights,
  check_tokenizer_file,
  stored_config,
)

CONFIG = small_run.config(stages=[small_run.stage(10)])


def stored(model=MODEL):
  return json.loads(json.dumps(dataclasses.asdict(model)))


@pytest.mark.parametrize("step, model", [(0, MODEL), (9, MODEL), (10, MODEL), (11, GROWN), (500, GROWN)])
def test_the_model_is_that_of_the_step_and_at_a_growth_the_one_before(step, model):
  assert check_same_model(stored(model), CONFIG, step, "runs/a") == model
  other = GROWN if model == MODEL else MODEL
  with pytest.raises(
    ValueError,
    match=f"runs/a: its model at step {step} has qkv_tokens={other.qkv_tokens}, "
    f"this run's would have {model.qkv_tokens}; use another --workdir",
  ):
    check_same_model(stored(other), CONFIG, step, "runs/a")


def test_growth_to_come_may_change():
  for stages in ([], [small_run.stage(7)], [small_run.stage(5), small_run.stage(9, GROWN.grown(ffn_tokens=99))]):
    assert check_same_model(stored(), small_run.config(stages=stages), 5, "runs/a") == MODEL


@pytest.mark.parametrize(
  "field, value",
  [
    ("vocab_size", 512),
    ("num_layers", 3),
    ("num_heads", 1),
    ("seq_length", 32),
    ("theta", "gelu_l2_norm"),
    ("gelu", "tanh"),
    ("rotary_base", 1e5),
    ("compute_dtype", "bfloat16"),
  ],
)
def test_another_model_is_refused_by_its_field(field, value):
  with pytest.raises(ValueError, match=f"has {field}={getattr(MODEL, field)!r}, this run's would have {value!r}"):
    check_same_model(stored(), small_run.replace(CONFIG, model={field: value}), 3, "runs/a")


def test_a_record_without_a_field_had_its_default(tmp_path):
  model, config = stored(), CONFIG.to_dict()
  del model["qk_norm" if "qk_norm" in model else "gelu"], config["data"]["held_out_sets"]
  assert check_same_model(model, CONFIG, 0, "runs/a") == MODEL
  (tmp_path / "config.json").write_text(json.dumps(config))
  check_same_run(CONFIG, str(tmp_path), allow_data_change=False)
  with pytest.raises(ValueError, match="reads data.held_out_sets='', this one 'a=text:b'"):
    check_same_run(small_run.replace(CONFIG, data=dict(held_out_sets="a=text:b")), str(tmp_path), False)


def test_remat_may_change():
  changed = small_run.replace(CONFIG, model=dict(remat="full"))
  assert check_same_model(stored(), changed, 3, "runs/a").remat == "full"


@pytest.fixture
def workdir(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
  return str(tmp_path)


def test_a_run_may_change_all_but_model_and_data(workdir):
  changed = small_run.replace(
    CONFIG,
    optimizer=dict(learning_rate=1.0),
    training=dict(num_steps=3, seed=5, gradient_accumulation=4),
    mesh=dict(token=2),
    growth=dict(stages=()),
    model=dict(remat="dots"),
  )
  assert changed.mesh != MeshConfig()
  check_same_run(changed, workdir, allow_data_change=False)
  check_same_run(small_run.config("text:elsewhere"), workdir + "/new", allow_data_change=False)


@pytest.mark.parametrize(
  "field, value",
  [
    ("source", "text:b"),
    ("batch_size", 4),
    ("seed", 1),
    ("tokenizer", "x.json"),
    ("held_out_fraction", 0.5),
    ("packing", "documents"),
  ],
)
def test_other_data_is_refused_unless_allowed(workdir, field, value):
  changed = small_run.replace(CONFIG, data={field: value})
  with pytest.raises(
    ValueError,
    match=f"reads data.{field}={getattr(CONFIG.data, field)!r}, this one {value!r}; use "
    "another --workdir, or pass --allow_data_change",
  ):
    check_same_run(changed, workdir, allow_data_change=False)
  check_same_run(changed, workdir, allow_data_change=True)


def test_another_model_is_refused_even_if_other_data_is_allowed(workdir):
  with pytest.raises(ValueError, match="num_layers"):
    check_same_run(small_run.replace(CONFIG, model=dict(num_layers=5)), workdir, allow_data_change=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"model_type": "bert"}', '{"model": {}}'])
def test_a_folder_of_something_else_is_refused(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match="config.json: not the configuration of a run; use another --workdir"):
    check_same_run(CONFIG, str(tmp_path), allow_data_change=True)


def test_another_tokenizer_is_refused():
  tokenizer = data.open_tokenizer("bytes")
  check_same_tokenizer(tokenizer.fingerprint, tokenizer, "runs/a")
  with pytest.raises(ValueError, match=f"runs/a: .*tokenizer other, this run's is {tokenizer.fingerprint}"):
    check_same_tokenizer("other", tokenizer, "runs/a")


def test_weights_fit_another_length_precision_and_remat_but_no_other_model():
  check_same_weights(MODEL, dataclasses.replace(MODEL, seq_length=64, compute_dtype="bfloat16", remat="full"), "runs/a")
  for field, value in (("ffn_tokens", 32), ("theta", "gelu_l2_norm"), ("rotary_fraction", 0.5), ("num_heads", 1)):
    with pytest.raises(
      ValueError,
      match=f"init_from=runs/a: its model has {field}={getattr(MODEL, field)!r}, this "
      f"run's {value!r}; set model.{field}={getattr(MODEL, field)!r}",
    ):
      check_same_weights(MODEL, dataclasses.replace(MODEL, **{field: value}), "runs/a")
  gpt2 = ModelConfig.named("tiny", "gpt2")
  with pytest.raises(
    ValueError, match="seq_length=128, this run's 64, tied=True, .* set model.seq_length=128, model.tied="
  ):
    check_same_weights(gpt2, dataclasses.replace(gpt2, seq_length=64, tied=False), "runs/a")


@pytest.mark.parametrize(
  "preset, field, values", [("mixtral", "ffn.experts", (1, 8)), ("mod", "depth.capacity", (1.0, 0.125))]
)
def test_a_router_that_only_one_of_two_models_has_is_named_with_both_values(preset, field, values):
  plain, routed = (ModelConfig.named("tiny", name) for name in ("transformer", preset))
  none, some = (f"({field}={value})" for value in values)
  for models, said in (
    ((plain, routed), f"{none} and this run's needs one {some}: set model.{field}={values[0]} and"),
    ((routed, plain), f"{some} and this run's has none {none}: take model."),
  ):
    with pytest.raises(ValueError) as caught:
      check_same_weights(*models, "runs/a")
    assert "\n" not in str(caught.value) and said in str(caught.value)
    assert str(caught.value).startswith("init_from=runs/a: its model has ")


def test_a_tokenizer_file_of_something_else_is_refused(tmp_path):
  tokenizer = data.open_tokenizer("bytes")
  check_tokenizer_file(str(tmp_path), tokenizer)
  data.save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
  check_tokenizer_file(str(tmp_path), tokenizer)
  (tmp_path / "tokenizer_config.json").unlink()
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="tokenizer.json: is not the tokenizer of this run and is not overwritten"):
    check_tokenizer_file(str(tmp_path), tokenizer)


def test_a_stored_configuration_is_read_under_the_earlier_name_of_a_field(tmp_path):
  config = small_run.replace(CONFIG, growth=dict(method="duplicate")).to_dict()
  config["growth"]["how"] = config["growth"].pop("method")
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.warns(FutureWarning, match="config.growth.how is now called config.growth.method"):
    assert stored_config(str(tmp_path)).growth.method == "duplicate"
  config["growth"]["method"] = "exact"
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="config.json: config.growth.how='duplicate': .* config.growth.method, .* too"):
    stored_config(str(tmp_path))


def test_a_rate_that_jumps_because_the_run_is_longer_now_is_reported_with_both_values():
  decaying = small_run.replace(
    small_run.config(num_steps=100),
    optimizer=dict(learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=10, decay_steps=20),
  )
  stored = decaying.to_dict()
  longer = small_run.replace(decaying, training=dict(num_steps=200))
  assert changed_rate(stored, longer, 100) == (
    "The learning rate changes from 0.001 (the update before, of a run with training.num_steps=100) to 0.01 (the next "
    "one, with training.num_steps=200)."
  )
  # Before the decay both schedules agree; a run that is complete has no next update.
  assert (
    changed_rate(stored, longer, 50) == changed_rate(stored, decaying, 90) == changed_rate(stored, decaying, 100) == ""
  )
  assert changed_rate({}, longer, 100) == ""


@pytest.mark.parametrize(
  "stored, now, message",
  [
    ({"name": "adamw"}, {"name": "lion", "eps": 1e-8}, "optimizer.name='adamw', this one 'lion'"),
    ({}, {"ema_decay": 0.9}, "optimizer.ema_decay=0.0, this one 0.9"),
    ({"ema_decay": 0.9}, {}, "optimizer.ema_decay=0.9, this one 0.0"),
    ({}, {"first_moment_dtype": "bfloat16"}, "first_moment_dtype='float32', this one 'bfloat16'"),
  ],
)
def test_another_kind_of_optimizer_is_refused_by_its_field(stored, now, message):
  config = small_run.replace(small_run.config(), optimizer=now)
  with pytest.raises(ValueError, match=message):
    check_same_optimizer({"optimizer": stored}, config, "run")


def test_another_rate_or_decay_of_the_average_is_the_same_kind_of_optimizer():
  config = small_run.replace(small_run.config(), optimizer=dict(ema_decay=0.99, learning_rate=1.0))
  check_same_optimizer({"optimizer": {"ema_decay": 0.9, "learning_rate": 0.1}}, config, "run")
