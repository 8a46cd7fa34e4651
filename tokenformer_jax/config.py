"""Configurations: frozen dataclasses, validated where they are made. Imports no jax.

A whole run is one `Config`. Experiments return it as an `ml_collections.ConfigDict`
(`Config(...).to_config_dict()`), so that any field can be set on the command line; the doors turn
the result back into the validated, frozen form with `Config.from_dict`.
"""

import dataclasses
from typing import Any

import ml_collections

from tokenformer_jax.checked import Checked, build, nearest, require, require_choice

THETAS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
GELUS = ("erf", "tanh")
KERNELS = ("auto", "reference", "fused")
REMAT_POLICIES = ("none", "dots", "full")
COMPUTE_DTYPES = ("float32", "bfloat16", "float64")
MOMENT_DTYPES = ("float32", "bfloat16")
SCHEDULES = ("warmup_stable_decay", "warmup_cosine")
PACKINGS = ("contiguous", "documents")
BAD_TEXTS = ("error", "replace", "skip")
WAYS_OF_GROWING = ("exact", "released", "duplicate")
TAUS_AFTER_GROWTH = ("kept", "recomputed", "moved", "learned")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Checked):
  """A TokenFormer language model (arXiv 2410.23168, section 3).

  `qkv_tokens` parameter tokens in each of query, key and value; `proj_tokens` in the attention's
  output projection; `ffn_tokens` in the feed-forward. These three are what growth changes.

  `remat`: what the backward pass computes again instead of keeping it: `none`, only norms and Θ; `dots`, all but
  products with parameters; `full`, a layer from its input. `kernel` of pattention: the `reference`; `fused`
  (`kernels/fused_pattention.py`), on TPUs; `auto`, the fastest, which no measurement has yet shown `fused` to be.
  """

  vocab_size: int
  num_layers: int
  hidden_size: int
  num_heads: int
  qkv_tokens: int
  proj_tokens: int
  ffn_tokens: int
  seq_length: int = 2048
  theta: str = "l2_norm_gelu"
  gelu: str = "erf"
  rotary_fraction: float = 0.25
  rotary_base: float = 10_000.0
  compute_dtype: str = "float32"
  remat: str = "none"
  kernel: str = "auto"

  def validate(self):
    for field in (
      "vocab_size",
      "num_layers",
      "hidden_size",
      "num_heads",
      "qkv_tokens",
      "proj_tokens",
      "ffn_tokens",
      "seq_length",
    ):
      require(getattr(self, field) >= 1, field, getattr(self, field), "must be at least 1.")
    require(
      self.hidden_size % self.num_heads == 0,
      "num_heads",
      self.num_heads,
      f"must divide hidden_size={self.hidden_size}.",
    )
    require(0.0 <= self.rotary_fraction <= 1.0, "rotary_fraction", self.rotary_fraction, "must be in [0, 1].")
    require(
      self.rotary_dims % 2 == 0,
      "rotary_fraction",
      self.rotary_fraction,
      f"rotates {self.rotary_dims} of {self.head_dim} channels a head; the number must be even.",
    )
    require(self.rotary_base > 0, "rotary_base", self.rotary_base, "must be positive.")
    require_choice("theta", self.theta, THETAS)
    require_choice("gelu", self.gelu, GELUS)
    require_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
    require_choice("remat", self.remat, REMAT_POLICIES)
    require_choice("kernel", self.kernel, KERNELS)
    require(
      self.kernel != "fused" or self.theta != "softmax",
      "kernel",
      self.kernel,
      f"theta={self.theta!r} has none; choose reference.",
    )

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def rotary_dims(self) -> int:
    """Channels of each head that rotate: int(head_dim · rotary_fraction)."""
    return int(self.head_dim * self.rotary_fraction)

  @property
  def num_parameters(self) -> int:
    """Trained numbers: V·d + 2d + L·2d·(3·n_qkv + n_proj + n_ffn). τ is state and not counted."""
    return self.vocab_size * self.hidden_size + 2 * self.hidden_size + self.num_non_embedding_parameters

  @property
  def num_non_embedding_parameters(self) -> int:
    rows = 3 * self.qkv_tokens + self.proj_tokens + self.ffn_tokens
    return self.num_layers * 2 * self.hidden_size * rows

  @property
  def forward_flops_per_token(self) -> int:
    """Forward FLOPs a token at full context, causal attention counted at half; training is 3×."""
    rows = 3 * self.qkv_tokens + self.proj_tokens + self.ffn_tokens
    per_layer = 4 * self.hidden_size * rows + 2 * self.seq_length * self.hidden_size
    return self.num_layers * per_layer + 2 * self.vocab_size * self.hidden_size

  def grown(self, **tokens: int) -> "ModelConfig":
    """The same model with other token counts, e.g. `config.grown(ffn_tokens=8560)`."""
    return dataclasses.replace(self, **tokens)

  @classmethod
  def named(cls, name: str, **changes) -> "ModelConfig":
    """A named size; `changes` replace fields, e.g. `ModelConfig.named("tiny", vocab_size=384)`."""
    if name not in NAMED_SIZES:
      raise ValueError(
        f"model size {name!r} is unknown: choose one of {', '.join(NAMED_SIZES)}." + nearest(name, NAMED_SIZES)
      )
    layers, hidden, heads, attention_tokens, ffn_tokens, seq_length = NAMED_SIZES[name]
    fields = dict(
      vocab_size=50304,
      num_layers=layers,
      hidden_size=hidden,
      num_heads=heads,
      qkv_tokens=attention_tokens,
      proj_tokens=attention_tokens,
      ffn_tokens=ffn_tokens,
      seq_length=seq_length,
    )
    unknown = set(changes) - {f.name for f in dataclasses.fields(cls)}
    if unknown:
      raise ValueError(
        f"model field {sorted(unknown)[0]!r} is unknown."
        + nearest(sorted(unknown)[0], [f.name for f in dataclasses.fields(cls)])
      )
    return cls(**{**fields, **changes})


# name: layers, hidden, heads, tokens in each of q, k, v and proj, feed-forward tokens, sequence length
NAMED_SIZES = {
  # For CPUs and tests.
  "tiny": (2, 64, 4, 64, 256, 128),
  "mini": (4, 128, 4, 128, 512, 128),
  "small": (4, 256, 4, 256, 1024, 256),
  # The released Pile models.
  "150m": (12, 768, 12, 768, 3072, 2048),
  "450m": (24, 1024, 16, 1024, 4096, 2048),
  "900m": (32, 1280, 16, 1280, 5120, 2048),
  "1.5b": (40, 1536, 16, 1536, 6144, 2048),
  # Continues them; nobody has released one. Its counts divide by every mesh of 2^k chips.
  "7b": (26, 4096, 32, 4096, 16384, 2048),
  # The paper's growth chain on OpenWebText (Table 9); it prints the last as 1.4B.
  "124m": (12, 768, 12, 576, 2304, 1024),
  "354m": (12, 768, 12, 2140, 8560, 1024),
  "757m": (12, 768, 12, 4850, 19400, 1024),
  "1.3b": (12, 768, 12, 8620, 34480, 1024),
  # The released growth chain on OpenWebText2: deeper and wider models than the paper's.
  "owt2-354m": (24, 1024, 16, 768, 3072, 1024),
  "owt2-757m": (24, 1024, 16, 1792, 7168, 1024),
}


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
  """What the model reads.

  `source` is one spec string (see `tokenformer_jax.data`): `python-sources`, `text:GLOB`, …
  Held-out text is `held_out_source` if given, else `held_out_fraction` of the source's documents,
  chosen by a hash of each (of a file's name, or of the text of a part of one). `batch_size` is the
  global number of sequences in one optimizer step. `bad_text`: text that cannot be read stops the run
  (`error`); or bytes that are not UTF-8 become U+FFFD (`replace`); or the document is left out
  (`skip`); both are counted.
  """

  source: str = "python-sources"
  held_out_source: str = ""
  held_out_fraction: float = 0.05
  tokenizer: str = "bytes"
  packing: str = "contiguous"
  bad_text: str = "error"
  batch_size: int = 16
  seed: int = 0

  def validate(self):
    require(bool(self.source), "source", self.source, "name a source, e.g. python-sources or text:GLOB.")
    require(0.0 < self.held_out_fraction < 1.0, "held_out_fraction", self.held_out_fraction, "must be between 0 and 1.")
    require_choice("packing", self.packing, PACKINGS)
    require_choice("bad_text", self.bad_text, BAD_TEXTS)
    require(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1.")
    require(self.seed >= 0, "seed", self.seed, "must not be negative.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Checked):
  """AdamW with global-norm clipping and a learning-rate schedule.

  `warmup_cosine`: linear from 0, then cosine to `min_learning_rate` at the last step.
  `warmup_stable_decay`: linear from 0, constant, linear to `min_learning_rate` over the last
  `decay_steps`; the one to grow under, since it has no restart and no early decay.
  `first_moment_dtype`, `second_moment_dtype`: of Adam's means of gradients and of their squares between updates;
  bfloat16 saves 2 bytes a parameter each.
  """

  schedule: str = "warmup_stable_decay"
  learning_rate: float = 6e-4
  min_learning_rate: float = 6e-5
  warmup_steps: int = 100
  decay_steps: int = 0
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  z_loss: float = 0.0
  first_moment_dtype: str = "float32"
  second_moment_dtype: str = "float32"

  def validate(self):
    require_choice("schedule", self.schedule, SCHEDULES)
    for field in ("first_moment_dtype", "second_moment_dtype"):
      require_choice(field, getattr(self, field), MOMENT_DTYPES)
    require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be positive.")
    require(
      0 <= self.min_learning_rate <= self.learning_rate,
      "min_learning_rate",
      self.min_learning_rate,
      f"must be in [0, learning_rate={self.learning_rate}].",
    )
    for field in ("warmup_steps", "decay_steps", "weight_decay", "z_loss"):
      require(getattr(self, field) >= 0, field, getattr(self, field), "must not be negative.")
    for field in ("beta1", "beta2"):
      require(0 <= getattr(self, field) < 1, field, getattr(self, field), "must be in [0, 1).")
    for field in ("eps", "clip_norm"):
      require(getattr(self, field) > 0, field, getattr(self, field), "must be positive.")
    require(
      self.second_moment_dtype == "float32" or self.beta2 <= 0.99,
      "beta2",
      self.beta2,
      "must be at most 0.99 with second_moment_dtype=bfloat16: what a step takes off would be rounded away.",
    )


@dataclasses.dataclass(frozen=True)
class GrowthStage(Checked):
  """At `step` (after that many updates) the model gets these token counts."""

  step: int
  qkv_tokens: int
  proj_tokens: int
  ffn_tokens: int

  @property
  def tokens(self) -> dict[str, int]:
    return dict(qkv_tokens=self.qkv_tokens, proj_tokens=self.proj_tokens, ffn_tokens=self.ffn_tokens)


@dataclasses.dataclass(frozen=True)
class GrowthConfig(Checked):
  """Growth: when, and how new rows and old ones go on. The defaults are the best seen in experiments/growth_seam.py.

  `how` the new rows begin (`growth.grow`):
    `exact`: keys zero, values random, τ as it was: the function stays.
    `released`: keys and values random, τ that of a new layer: the function changes, as in the released code.
    `duplicate`: all rows repeated, each value cut in uneven parts, τ to fit: the function stays, for whole
      multiples of the count.
  `tau`, from then on: `kept`; `recomputed`, at once that of a new layer, which changes the function; `moved`
    there over `tau_steps` steps, τ² linearly; `learned`, by Adam on log τ at the run's learning rate.
  `value_scale`: size of the new values of `exact`, in units of a new layer's.
  `warmup_steps`: over how many steps the new rows' updates rise to full size.
  `new_rows_rate`, `old_rows_rate`: factors on the learning rate of the rows of the last growth, and of the
    parameter tokens before them; 0 for old rows freezes them.
  """

  stages: tuple[GrowthStage, ...] = ()
  how: str = "exact"
  tau: str = "moved"
  tau_steps: int = 500
  value_scale: float = 0.3
  warmup_steps: int = 100
  new_rows_rate: float = 1.0
  old_rows_rate: float = 0.5

  def validate(self):
    require_choice("how", self.how, WAYS_OF_GROWING)
    require_choice("tau", self.tau, TAUS_AFTER_GROWTH)
    require(self.tau_steps >= 1, "tau_steps", self.tau_steps, "must be at least 1.")
    require(
      self.value_scale > 0,
      "value_scale",
      self.value_scale,
      "must be positive: new rows with zero keys and zero values would never learn.",
    )
    require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "must not be negative.")
    require(self.new_rows_rate > 0, "new_rows_rate", self.new_rows_rate, "must be positive.")
    require(self.old_rows_rate >= 0, "old_rows_rate", self.old_rows_rate, "must not be negative.")
    steps = [stage.step for stage in self.stages]
    require(all(a < b for a, b in zip([0, *steps], steps)), "stages", steps, "the steps must be at least 1 and rise.")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked):
  """Devices along each mesh axis; −1 takes what the others leave.

  `data` splits the batch; `fsdp` the batch and the parameters' channels; `token` parameter tokens, heads and
  vocabulary; `sequence` the positions of each sequence, for those too long for one device.
  """

  data: int = -1
  fsdp: int = 1
  token: int = 1
  sequence: int = 1

  def validate(self):
    sizes = dataclasses.asdict(self)
    for axis, size in sizes.items():
      require(size >= 1 or size == -1, f"{axis}", size, "must be at least 1, or −1 for the rest.")
    require(list(sizes.values()).count(-1) <= 1, "mesh", sizes, "only one axis may be −1.")


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Checked):
  """Length of the run, and how often it reports, evaluates and saves (all in optimizer steps)."""

  num_steps: int = 1000
  seed: int = 1234
  gradient_accumulation: int = 1
  log_every: int = 10
  eval_every: int = 100
  eval_batches: int = 20
  checkpoint_every: int = 500
  checkpoints_kept: int = 2
  sample_prompt: str = "def "
  sample_tokens: int = 100

  def validate(self):
    for field in (
      "num_steps",
      "gradient_accumulation",
      "log_every",
      "eval_every",
      "eval_batches",
      "checkpoint_every",
      "checkpoints_kept",
    ):
      require(getattr(self, field) >= 1, field, getattr(self, field), "must be at least 1.")
    for field in ("seed", "sample_tokens"):
      require(getattr(self, field) >= 0, field, getattr(self, field), "must not be negative.")


@dataclasses.dataclass(frozen=True)
class Config(Checked):
  """One run. `init_from` names a work folder whose weights this run starts from, optimizer fresh."""

  model: ModelConfig
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  growth: GrowthConfig = GrowthConfig()
  training: TrainingConfig = TrainingConfig()
  mesh: MeshConfig = MeshConfig()
  init_from: str = ""

  def validate(self):
    model = self.model
    for stage in self.growth.stages:
      for field, count in stage.tokens.items():
        require(
          count >= getattr(model, field),
          f"stages: {field} at step {stage.step}",
          count,
          f"growth cannot take rows away; the model has {getattr(model, field)}.",
        )
      model = model.grown(**stage.tokens)
    accumulation = self.training.gradient_accumulation
    require(
      self.data.batch_size % accumulation == 0,
      "gradient_accumulation",
      accumulation,
      f"must divide data.batch_size={self.data.batch_size}.",
    )

  def model_at(self, step: int) -> ModelConfig:
    """The model's configuration after `step` updates and the growths due by then."""
    model = self.model
    for stage in self.growth.stages:
      if stage.step <= step:
        model = model.grown(**stage.tokens)
    return model

  def to_dict(self) -> dict[str, Any]:
    """Plain nested dicts, as stored in a work folder's config.json."""
    return dataclasses.asdict(self)

  def to_config_dict(self) -> ml_collections.ConfigDict:
    """The mutable form that `get_config()` returns, for `--config.field=value` on the command line."""
    return ml_collections.ConfigDict(self.to_dict())

  @classmethod
  def from_dict(cls, fields) -> "Config":
    """The validated form of `to_dict()`; unknown keys are refused with the nearest match."""
    if isinstance(fields, ml_collections.ConfigDict):
      fields = fields.to_dict()
    return build(cls, fields, "config")
