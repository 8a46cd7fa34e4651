"""Checks of a run's configuration that come before anything is written."""

import jax

from tokenformer_jax import data
from tokenformer_jax.config import Config
from tokenformer_jax.growth.plan import check_growth
from tokenformer_jax.training.held_out import sample_prompt
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.trackers import import_wandb


def check_trackers(config: Config) -> None:
  """Raises ValueError if the run asks for Weights & Biases and the package is not installed on the first process."""
  if config.training.wandb_project and jax.process_index() == 0:
    import_wandb(config.training.wandb_project)


def check_growths(config: Config, mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError for a growth stage that could not be done when its step comes."""
  for stage in config.growth.stages:
    old, new = config.model_at(stage.step - 1), config.model_at(stage.step)
    if old != new:
      check_growth(old, new, config.growth)
      make_program(config, new, mesh)


def check_vocabulary(config: Config, tokenizer: data.Tokenizer | None) -> None:
  """Raises ValueError where the model has fewer ids than the tokenizer; images have none."""
  if tokenizer and tokenizer.vocab_size > config.model.vocab_size:
    raise ValueError(
      f"model.vocab_size={config.model.vocab_size}: the tokenizer {config.data.tokenizer!r} has "
      f"{tokenizer.vocab_size} ids; set it to {tokenizer.padded_vocab_size}."
    )


def check_samples(config: Config, tokenizer: data.Tokenizer | None) -> None:
  """Raises ValueError where the samples that the run is to write are longer than the model's sequences."""
  training = config.training
  if not training.sample_tokens or config.model.task != "next_token" or tokenizer is None:
    return
  prompt = sample_prompt(training, tokenizer)
  length = len(tokenizer.encode(prompt)) if isinstance(prompt, str) else len(prompt)
  if not length:
    raise ValueError(
      f"training.sample_prompt={training.sample_prompt!r}: the tokenizer makes no token of it; give another text, "
      "or set training.sample_tokens=0 to write no samples."
    )
  if length + training.sample_tokens > config.model.seq_length:
    raise ValueError(
      f"training.sample_tokens={training.sample_tokens}: with the prompt's {length} they pass "
      f"model.seq_length={config.model.seq_length}; lower it (0 writes no samples)."
    )
