"""Evaluation inside a run: losses on its held-out sets, and a sample of text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from tokenformer_jax import data
from tokenformer_jax.config import TrainingConfig
from tokenformer_jax.inference.generate import generate
from tokenformer_jax.training.objective import measures, summed
from tokenformer_jax.training.program import Program
from tokenformer_jax.training.state import TrainState
from tokenformer_jax.training.weight_average import evaluation_params

# JAX makes a random key of 32 bits of a seed.
SEEDS = 2**32
# Evaluations that may wait for the devices at once. With more than 32 programs waiting, XLA on several CPU devices
# blocks for ever in a collective operation, and ends the process after 40 seconds.
_WAITING = 8


def held_out_measures(
  program: Program, state: TrainState, batches: Mapping[str, Sequence[Any]]
) -> dict[str, dict[str, float]]:
  """Returns what `measures` reads from each set of batches, with the average of the weights if the run keeps one.

  For a model with routed blocks that is what the causal rule gives, with `loss_as_trained` beside it: the loss with the
  choices of training.

  Args:
    batches: for each set its batches, on the run's devices.
  """
  params = evaluation_params(state)

  def of_a_set(step: Callable, batches: Sequence[Any]) -> dict[str, float]:
    sums: list = []
    for number, batch in enumerate(batches):
      if number >= _WAITING:
        jax.block_until_ready(sums[number - _WAITING])
      sums.append(step(params, state.tau, batch))
    return measures(program.model, summed(jax.device_get(sums)))

  found = {name: of_a_set(program.eval_step, of_all) for name, of_all in batches.items()}
  if (as_trained := program.eval_step_as_trained) is not None:
    for name, of_all in batches.items():
      found[name]["loss_as_trained"] = of_a_set(as_trained, of_all)["loss"]
  return found


def sample_prompt(training: TrainingConfig, tokenizer: data.Tokenizer) -> str | list[int]:
  """Returns the prompt of samples; an empty one begins a document."""
  return training.sample_prompt or [tokenizer.end_of_document]


def write_sample(
  program: Program, state: TrainState, tokenizer: data.Tokenizer, training: TrainingConfig, step: int
) -> str:
  """Returns `training.sample_prompt` with a continuation by the model.

  Decoding holds a second copy of the parameters, in the dtype of products and one layer apart from the other. It is
  freed when this returns. A train step holds gradients of that size or more, so this does not raise the run's peak.
  """
  model = nnx.merge(program.graphdef, evaluation_params(state), state.tau)
  (text,) = generate(
    model,
    tokenizer,
    [sample_prompt(training, tokenizer)],
    max_new_tokens=training.sample_tokens,
    temperature=0.8,
    seed=(training.seed + step) % SEEDS,
  )
  return training.sample_prompt + text
