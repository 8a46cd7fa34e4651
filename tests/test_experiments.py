"""The growth chains are those of the paper and of the released code."""

import importlib

import pytest

from tokenformer_jax.config import Config

CHAINS = {"paper": [123_569_664, 354_190_848, 753_796_608, 1_309_705_728], "released": [353_503_232, 756_156_416]}


@pytest.mark.parametrize("chain", CHAINS)
def test_chains_grow_through_the_published_sizes(chain):
  config = Config.from_dict(importlib.import_module("experiments.paper_chain").get_config(chain))
  steps = [0, *(stage.step for stage in config.growth.stages)]
  assert [config.model_at(step).num_parameters for step in steps] == CHAINS[chain]
  assert config.training.num_steps > steps[-1] + config.optimizer.decay_steps


def test_architectures_are_compared_at_equal_parameters(monkeypatch):
  monkeypatch.setenv("TOKENFORMER_DATA", "data")
  experiment = importlib.import_module("experiments.architectures")
  for name in ("tokenformer", "transformer", "gpt2", "sas-p", "sas-p/pattention"):
    config = Config.from_dict(experiment.get_config(name))
    assert abs(config.model.num_non_embedding_parameters / 589_824 - 1) < 0.01, name
    assert experiment.steps_at_equal_flops(name) == experiment.NUM_STEPS
  with pytest.raises(ValueError, match="model preset 'sass' is unknown: .* Did you mean 'sas'"):
    experiment.get_config("sass")


def test_an_unknown_chain_is_refused():
  with pytest.raises(ValueError, match="chain 'paperr' is unknown: choose one of paper, released"):
    importlib.import_module("experiments.paper_chain").get_config("paperr")
