"""Configurations: exact parameter counts, every refusal, and the way there and back."""

import dataclasses
import itertools
import json

import pytest

from tokenformer_jax.config import (
  NAMED_SIZES,
  Config,
  DataConfig,
  GrowthConfig,
  GrowthStage,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  TrainingConfig,
)
from tokenformer_jax.config.parts import AttentionConfig

TINY = ModelConfig.named("tiny", vocab_size=384)

# Name: all parameters, those beside the embedding and the final norm (the paper, and the released files).
COUNTS = {
  "150m": (151_881_216, 113_246_208),
  "450m": (454_166_528, 402_653_184),
  "900m": (903_252_480, 838_860_800),
  "1.5b": (1_587_219_456, 1_509_949_440),
  "7b": (7_185_375_232, 7_185_375_232 - 50_304 * 4096 - 2 * 4096),
  "124m": (123_569_664, 123_569_664 - 50_304 * 768 - 2 * 768),
  "354m": (354_190_848, 354_190_848 - 50_304 * 768 - 2 * 768),
  "757m": (753_796_608, 753_796_608 - 50_304 * 768 - 2 * 768),
  "1.3b": (1_309_705_728, 1_309_705_728 - 50_304 * 768 - 2 * 768),
  "owt2-354m": (353_503_232, 353_503_232 - 50_304 * 1024 - 2 * 1024),
  "owt2-757m": (756_156_416, 756_156_416 - 50_304 * 1024 - 2 * 1024),
}


def run(**parts):
  return Config(**{"model": TINY, **parts})


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
  config = ModelConfig.named(name)
  assert (config.num_parameters, config.num_non_embedding_parameters) == COUNTS[name]


def test_every_named_size_is_counted_or_small():
  assert set(NAMED_SIZES) == {*COUNTS, "tiny", "mini", "small"}
  for name in ("tiny", "mini", "small"):
    assert ModelConfig.named(name, vocab_size=384).num_parameters < 12e6


def test_growth_chains_differ_in_their_tokens_alone():
  for chain in (["124m", "354m", "757m", "1.3b"], ["owt2-354m", "owt2-757m"]):
    for small, large in itertools.pairwise(chain):
      large = ModelConfig.named(large)
      assert (
        ModelConfig.named(small).grown(
          qkv_tokens=large.qkv_tokens, proj_tokens=large.proj_tokens, ffn_tokens=large.ffn_tokens
        )
        == large
      )


def test_a_part_may_be_given_whole():
  whole = ModelConfig.named("tiny", attention=AttentionConfig(num_kv_heads=2), projection="dense")
  assert whole == ModelConfig.named("tiny", attention=dict(num_kv_heads=2), projection="dense")


def test_released_rotary_dims():
  dims = [ModelConfig.named(name).rotary_dims for name in ("150m", "450m", "900m", "1.5b")]
  assert dims == [16, 16, 20, 24]


def test_flops():
  """Twice the parameters in products, the tied logits, and the two products of causal attention at half."""
  expected = 2 * 113_246_208 + 2 * 50_304 * 768 + 12 * (2 * 2 * 2048 * 768) // 2
  assert ModelConfig.named("150m").forward_flops_per_token == expected


SIZES = (
  "vocab_size",
  "num_layers",
  "hidden_size",
  "num_heads",
  "qkv_tokens",
  "proj_tokens",
  "ffn_tokens",
  "seq_length",
)


@pytest.mark.parametrize(
  "changes, message",
  [
    *(({field: 0}, f"{field}=0: must be at least 1") for field in SIZES),
    ({"num_heads": 5}, "num_heads=5: must divide hidden_size=64"),
    ({"rotary_fraction": 1.1}, r"rotary_fraction=1.1: must be in \[0, 1\]"),
    ({"rotary_fraction": float("nan")}, "rotary_fraction=nan: must be a finite number"),
    ({"rotary_fraction": 0.2}, "rotary_fraction=0.2: rotates 3 of 16 channels a head; .* must be even"),
    ({"rotary_base": 0.0}, "rotary_base=0.0: must be positive"),
    ({"theta": "l2_gelu_norm"}, "theta='l2_gelu_norm': choose one of .* Did you mean '"),
    ({"gelu": "tan"}, "gelu='tan': choose one of erf, tanh. Did you mean 'tanh'?"),
    ({"compute_dtype": "float16"}, "compute_dtype='float16': choose one of float32, bfloat16"),
    ({"remat": "all"}, "remat='all': choose one of none, dots, full"),
    ({"num_layers": 2.0}, "num_layers=2.0: expected int, got float"),
    ({"num_layers": True}, "num_layers=True: expected int, got bool"),
    ({"theta": None}, "theta=None: expected str, got NoneType"),
    ({"ffn_token": 3}, "model field 'ffn_token' is unknown. Did you mean 'ffn_tokens'?"),
  ],
)
def test_model_refusals(changes, message):
  with pytest.raises(ValueError, match=message):
    ModelConfig.named("tiny", **changes)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: ModelConfig.named("150"), "model size '150' is unknown: choose .* Did you mean '150m'?"),
    (lambda: ModelConfig.named("tiny", "sasp"), "model preset 'sasp' is unknown: choose .* Did you mean 'sas-p'?"),
    (
      lambda: ModelConfig.named("tiny", "transformer", attention=dict(positions="learned")),
      "rotary_fraction=1.0: attention.positions='learned': nothing rotates; leave it at 0.25",
    ),
    (
      lambda: ModelConfig.named("tiny", "gpt2", theta="softmax"),
      "theta='softmax': attention.projection='dense', ffn.kind='mlp': there are no parameter tokens; leave it at",
    ),
    (lambda: ModelConfig.named("tiny", "gpt2", kernel="fused"), "kernel='fused': attention.projection='dense'"),
    (
      lambda: ModelConfig.named("tiny", "gpt2", proj_tokens=8),
      "proj_tokens=8: attention.projection='dense', .*: there are no such tokens; choose 0",
    ),
    (
      lambda: ModelConfig.named("tiny", "sas", attention=dict(num_kv_heads=1)),
      "model.attention: num_kv_heads=1: values='identity' are the inputs themselves",
    ),
    (
      lambda: ModelConfig.named("tiny", "sas-eq6", attention=dict(bias="all")),
      "model.attention: bias='all': values='identity_plus' have none; choose 'query_key' or 'none'",
    ),
    (
      lambda: ModelConfig.named("tiny", ffn=dict(bias=True)),
      "model.ffn: bias=True: kind='pattention' has Θ and no bias",
    ),
    (
      lambda: ModelConfig.named("tiny", "parallel", residual=dict(attention_skip=0.5)),
      "model.residual: attention_skip=0.5: a parallel block has ffn_skip alone",
    ),
    (lambda: DataConfig(source=""), "source='': name a source"),
    (lambda: DataConfig(held_out_fraction=0.0), "held_out_fraction=0.0: must be between 0 and 1"),
    (lambda: DataConfig(packing="document"), "packing='document': .* Did you mean 'documents'?"),
    (lambda: DataConfig(bad_text="ignore"), "bad_text='ignore': choose one of error, replace, skip"),
    (lambda: DataConfig(batch_size=0), "batch_size=0: must be at least 1"),
    (lambda: DataConfig(seed=-1), "seed=-1: must not be negative"),
    (lambda: DataConfig(mask_rate=1.0), "mask_rate=1.0: must be between 0 and 1"),
    (
      lambda: Config(model=ModelConfig.named("tiny"), data=DataConfig(mask_rate=0.5)),
      "data.mask_rate=0.5: model.task='next_token' does not use it; leave it at 0.25",
    ),
    (lambda: OptimizerConfig(schedule="cosine"), "schedule='cosine': .* Did you mean 'warmup_cosine'?"),
    (lambda: OptimizerConfig(learning_rate=0.0), "learning_rate=0.0: must be positive"),
    (lambda: OptimizerConfig(learning_rate=float("nan")), "learning_rate=nan: must be a finite number"),
    (lambda: OptimizerConfig(weight_decay=float("inf")), "weight_decay=inf: must be a finite number"),
    (lambda: GrowthConfig(value_scale=float("-inf")), "value_scale=-inf: must be a finite number"),
    (lambda: OptimizerConfig(name="adam"), "name='adam': choose one of adamw, lion, muon. Did you mean 'adamw'?"),
    (lambda: OptimizerConfig(name="lion", eps=1e-6), "eps=1e-06: name='lion' divides by nothing"),
    (
      lambda: OptimizerConfig(name="muon", second_moment_dtype="bfloat16"),
      "second_moment_dtype='bfloat16': applies to name='adamw' only",
    ),
    (lambda: OptimizerConfig(ema_decay=1.0), r"ema_decay=1.0: must be in \[0, 1\)"),
    (lambda: OptimizerConfig(min_learning_rate=1.0), r"min_learning_rate=1.0: .* \[0, learning_rate=0.0006\]"),
    (lambda: OptimizerConfig(warmup_steps=-1), "warmup_steps=-1: must not be negative"),
    (lambda: OptimizerConfig(decay_steps=-1), "decay_steps=-1: must not be negative"),
    (lambda: OptimizerConfig(weight_decay=-0.1), "weight_decay=-0.1: must not be negative"),
    (lambda: OptimizerConfig(z_loss=-1e-4), "z_loss=-0.0001: must not be negative"),
    (lambda: OptimizerConfig(beta1=1.0), r"beta1=1.0: must be in \[0, 1\)"),
    (lambda: OptimizerConfig(beta2=-0.1), r"beta2=-0.1: must be in \[0, 1\)"),
    (
      lambda: OptimizerConfig(beta2=0.999, second_moment_dtype="bfloat16"),
      "beta2=0.999: must be at most 0.99 with second_moment_dtype=bfloat16",
    ),
    (lambda: OptimizerConfig(eps=0.0), "eps=0.0: must be positive"),
    (lambda: OptimizerConfig(clip_norm=0.0), "clip_norm=0.0: must be positive"),
    (lambda: GrowthConfig(warmup_steps=-1), "warmup_steps=-1: must not be negative"),
    (lambda: GrowthConfig(stages=(GrowthStage(0, 1, 1, 1),)), r"stages=\[0\]: .* must be at least 1 and rise"),
    (lambda: GrowthConfig(stages=(GrowthStage(5, 1, 1, 1),) * 2), r"stages=\[5, 5\]: .* rise"),
    (lambda: MeshConfig(fsdp=0), "fsdp=0: must be at least 1, or −1 for all remaining devices"),
    (lambda: MeshConfig(data=-1, token=-1), "mesh=.*: only one axis may be −1"),
    (lambda: TrainingConfig(num_steps=0), "num_steps=0: must be at least 1"),
    (lambda: TrainingConfig(checkpoints_kept=0), "checkpoints_kept=0: must be at least 1"),
    (lambda: TrainingConfig(sample_tokens=-1), "sample_tokens=-1: must not be negative"),
    (
      lambda: run(data=DataConfig(batch_size=10), training=TrainingConfig(gradient_accumulation=4)),
      "gradient_accumulation=4: must divide data.batch_size=10",
    ),
    (
      lambda: run(growth=GrowthConfig(stages=(GrowthStage(9, 64, 63, 256),))),
      "stages: proj_tokens at step 9=63: growth cannot remove rows; the model has 64",
    ),
  ],
)
def test_other_refusals(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize(
  "change, message",
  [
    ({"modle": {}}, "config.modle is unknown. Did you mean 'model'?"),
    ({"optimizer": {"eps_": 1.0}}, "config.optimizer.eps_ is unknown. Did you mean 'eps'?"),
    ({"model": {"vocab_size": 10}}, "config.model.num_layers is missing: give ModelConfig its num_layers, hid"),
    ({"model": 3}, "config.model=3: expected the fields of ModelConfig"),
    ({"data": {"batch_size": 0}}, "config.data: batch_size=0: must be at least 1"),
    ({"data": {"batch_size": "16"}}, "config.data: batch_size='16': expected int, got str"),
    ({"growth": {"stages": 5}}, "config.growth.stages=5: expected a sequence of GrowthStage"),
    ({"growth": {"stages": [{"stepp": 1}]}}, r"config.growth.stages\[0\].stepp is unknown. .* 'step'?"),
  ],
)
def test_dictionaries_that_do_not_fit(change, message):
  with pytest.raises(ValueError, match=message):
    Config.from_dict({**run().to_dict(), **change})


@pytest.mark.parametrize(
  "through",
  [
    lambda config: config.to_dict(),
    lambda config: config.to_config_dict(),
    lambda config: json.loads(json.dumps(config.to_dict())),
  ],
  ids=["dict", "ConfigDict", "json"],
)
def test_there_and_back(through):
  stages = (GrowthStage(5, 64, 80, 256), GrowthStage(9, 96, 80, 300))
  config = run(
    model=ModelConfig.named("tiny", "parallel", projection="pattention", attention=dict(shaped="skip")),
    growth=GrowthConfig(stages=stages),
    optimizer=OptimizerConfig(beta2=0.5),
    init_from="elsewhere",
    mesh=MeshConfig(data=2, token=-1),
  )
  assert Config.from_dict(through(config)) == config


def test_a_field_set_on_the_command_line_arrives():
  fields = run().to_config_dict()
  fields.optimizer.learning_rate = 1e-3
  fields.model.theta = "softmax"
  fields.model.attention.shaped = "centred"
  fields.model.residual.attention_skip = 0.0
  config = Config.from_dict(fields)
  assert (config.optimizer.learning_rate, config.model.theta) == (1e-3, "softmax")
  assert (config.model.attention.shaped, config.model.residual.attention_skip) == ("centred", 0.0)


def test_model_at_each_step_of_its_growth():
  config = run(growth=GrowthConfig(stages=(GrowthStage(5, 64, 80, 256), GrowthStage(9, 96, 80, 300))))
  tokens = [
    (model.qkv_tokens, model.proj_tokens, model.ffn_tokens) for model in map(config.model_at, (0, 4, 5, 8, 9, 100))
  ]
  assert tokens == [(64, 64, 256)] * 2 + [(64, 80, 256)] * 2 + [(96, 80, 300)] * 2


def test_values_are_what_they_say():
  assert type(OptimizerConfig(weight_decay=1).weight_decay) is float
  with pytest.raises(dataclasses.FrozenInstanceError):
    TINY.num_layers = 3
