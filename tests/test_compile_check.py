"""What the programs of a run need on TPUs and GPUs that are not present."""

import dataclasses
import math

import pytest

from tokenformer_jax.config import Config, DataConfig, GrowthConfig, GrowthStage, MeshConfig, ModelConfig
from tokenformer_jax.distributed.chips import CHIPS
from tokenformer_jax.distributed.collectives import collectives
from tokenformer_jax.distributed.topologies import abstract_mesh, can_compile, parse_topology, slice_devices
from tokenformer_jax.training import compile_check
from tokenformer_jax.training.compile_check import check
from tokenformer_jax.training.compile_report import report
from tokenformer_jax.training.program import make_program

MODEL = ModelConfig(
  vocab_size=512,
  num_layers=2,
  hidden_size=256,
  num_heads=4,
  qkv_tokens=256,
  proj_tokens=128,
  ffn_tokens=512,
  seq_length=128,
  compute_dtype="bfloat16",
  remat="full",
)
needs_libtpu, needs_cuda = (
  pytest.mark.skipif(bool(can_compile(CHIPS[chip])), reason=can_compile(CHIPS[chip])) for chip in ("v5e", "h100")
)


def config(batch_size: int = 16, **mesh) -> Config:
  return Config(model=MODEL, data=DataConfig(batch_size=batch_size), mesh=MeshConfig(**mesh))


@pytest.mark.parametrize(
  "topology, message",
  [
    ("v5e", "expected a chip and the sizes of a slice"),
    ("v5e:4x", "expected a chip"),
    ("4x4", "expected a chip"),
    ("v5:4x4", "chip 'v5' is unknown: choose one of v4, v5e, v5p, v6e, a100, h100, h200. Did you mean"),
    ("v5e:4x4x4", "a slice of v5e has 2 sizes"),
    ("v5p:4x4", "a slice of v5p has 3 sizes"),
    ("v5e:0x4", "a slice of v5e has 2 sizes, each at least 1"),
    ("h100:9", "a machine has 1 to 8 GPUs, such as h100:8"),
    ("a100:0", "a machine has 1 to 8 GPUs"),
    ("h200:2x4", "a machine has 1 to 8 GPUs"),
  ],
)
def test_an_invalid_topology_is_refused(topology, message):
  with pytest.raises(ValueError, match=f"topology='{topology}': {message}"):
    parse_topology(topology)


def test_a_topology_is_a_chip_and_sizes():
  assert parse_topology("v5p:2x2x4") == (CHIPS["v5p"], (2, 2, 4))
  assert parse_topology("h100:8") == (CHIPS["h100"], (8,))


@pytest.fixture
def no_compiler(monkeypatch):
  monkeypatch.setattr(compile_check, "can_compile", lambda chip: "none here")


@pytest.mark.parametrize("topology", ["v5e:2x4", "h100:8"])
def test_without_a_compiler_the_programs_are_lowered_and_their_arguments_counted(no_compiler, topology):
  train, decode = check(config(data=2, fsdp=2, token=2), topology)
  chip, _ = parse_topology(topology)
  assert train.peak is None and train.sent is None and train.sent_seconds == {}
  # Every chip holds all of the final norm, the step count, the births of rows and τ.
  norm, matrices = 2 * 256, MODEL.num_parameters - 2 * 256
  assert train.held["parameters"] == 4 * (matrices // 4 + norm)
  assert 2 * train.held["parameters"] < train.held["optimizer state"] < 2.1 * train.held["parameters"]
  # The gradient takes twice the forward pass. Remat computes a layer again except for its last product, and the scores
  # of attention once more; three quarters of the scores are computed, of which two thirds are not masked.
  tokens, seen = 16 * 128, MODEL.num_layers * 2 * 128 * 256
  assert train.model_flops == 3 * MODEL.forward_flops_per_token * tokens / 8
  pattentions = MODEL.forward_flops_per_token - 2 * 512 * 256 - seen
  assert (
    train.flops
    == (4 * pattentions - MODEL.num_layers * 2 * 512 * 256 + 9 * 0.75 * seen + 3 * 2 * 512 * 256) * tokens / 8
  )
  assert train.step_seconds == (max(train.compute_seconds, train.memory_seconds),) * 2
  assert train.compute_seconds == train.flops / chip.peak_flops and train.tokens == tokens
  assert decode.tokens == 16 and decode.memory_seconds == sum(decode.held.values()) / chip.memory_bandwidth
  assert "if nothing were sent" in report(config(data=2, fsdp=2, token=2), topology, [train, decode])


def test_what_the_mesh_cannot_split_is_refused_before_anything_is_compiled(no_compiler):
  with pytest.raises(ValueError, match="key/keys: param_token=256 cannot be split over the 3 devices"):
    check(config(data=1, token=3), "v5e:1x3")
  with pytest.raises(ValueError, match="mesh data=1, .* takes 2 devices, but there are 8"):
    check(config(data=1, token=2), "v5e:2x4")


def test_a_growth_is_counted_with_the_most_of_both_states_and_the_largest_model_is_checked_too(no_compiler):
  stages = (GrowthStage(10, 256, 128, 512), GrowthStage(20, 512, 128, 1024))  # The first changes nothing.
  grown = MODEL.grown(qkv_tokens=512, ffn_tokens=1024)
  run = dataclasses.replace(config(token=4, data=2), growth=GrowthConfig(stages=stages))
  train, growth, grown_train, decode = check(run, "v5e:2x4")
  assert [one.name for one in (train, growth, grown_train, decode)] == [
    "train step", "growth at step 20", "train step from step 20", "decode step from step 20"
  ]  # fmt: skip
  assert growth.old == sum(train.held.values()) and growth.new == sum(grown_train.held.values())
  # Leaves are replaced one by one: the most is the new state and the last old leaf that grows, a moment of the values.
  last = 4 * MODEL.num_layers * MODEL.ffn_tokens * MODEL.hidden_size // 4
  assert growth.new < growth.peak < growth.new + 1.01 * last
  assert grown_train.model_flops == 3 * grown.forward_flops_per_token * 16 * 128 / 8
  text = report(run, "v5e:2x4", [train, growth, grown_train, decode])
  assert f"{MODEL.num_parameters:,} to {grown.num_parameters:,} parameters" in text
  assert f"growth at step 20\n  state before               {growth.old / 2**30:10.4f} GiB" in text
  chip = dataclasses.replace(CHIPS["v5e"], memory=growth.peak - 1)
  with pytest.raises(ValueError, match="the growth at step 20 does not fit: it holds .* in old and new state. Take mo"):
    compile_check._growth("growth at step 20", *_programs(run, grown), chip)


def _programs(run, grown):
  mesh = abstract_mesh(run.mesh, "v5e:2x4")
  return [make_program(run, model, mesh) for model in (run.model, grown)]


@needs_libtpu
@pytest.mark.parametrize("topology", ["v4:2x2x2", "v5e:1x1", "v5e:2x4", "v5e:16x16", "v5p:2x2x2", "v6e:4x4"])
def test_a_chip_is_one_device(topology):
  chip, sizes = parse_topology(topology)
  devices = slice_devices(topology)
  assert len(devices) == math.prod(sizes) and devices[0].device_kind.startswith(chip.kinds)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.usefixtures("users_precision")
def test_compiled_for_a_slice_what_is_sent_and_held_is_known():
  train, decode = check(config(data=1, fsdp=2, token=2), "v5e:2x2")
  for one in (train, decode):
    assert sum(one.held.values()) < one.peak < one.chip.memory
    assert one.step_seconds[0] < one.step_seconds[1]
  # The parameters of every layer are gathered along fsdp in bfloat16, in the forward pass and again by remat.
  gathered = sum(c.trips * c.bytes for c in train.sent if c.kind == "all-gather" and c.axes == ("fsdp",))
  assert gathered >= 2 * 2 * MODEL.num_non_embedding_parameters / 2
  assert {axis for c in train.sent for axis in c.axes} == {"fsdp", "token"}
  lines = report(config(data=1, fsdp=2, token=2), "v5e:2x2", [train, decode])
  assert "mesh fsdp=2, token=2" in lines and "sent along fsdp" in lines and "nothing hidden" in lines


@needs_cuda
@pytest.mark.slow
@pytest.mark.usefixtures("users_precision")
@pytest.mark.parametrize("chip", ["a100", "h100", "h200"])
def test_compiled_for_gpus_attention_is_cudnns(chip, monkeypatch):
  texts = []
  monkeypatch.setattr(compile_check, "collectives", lambda text, mesh: texts.append(text) or collectives(text, mesh))
  train, decode = check(config(data=1, fsdp=2, token=2), f"{chip}:4")
  for one in (train, decode):
    assert sum(one.held.values()) < one.peak < one.chip.memory
  assert {axis for c in train.sent for axis in c.axes} == {"fsdp", "token"}
  # The parameters of layers are gathered in bfloat16, and their gradients are summed in float32.
  assert {c.dtype for c in train.sent if c.kind == "all-gather" and c.trips > 1} == {"bf16"}
  assert {c.dtype for c in train.sent if c.kind in ("reduce-scatter", "all-reduce") and c.axes == ("fsdp",)} == {"f32"}
  assert "__cudnn$fmhaSoftmaxBackward" in texts[0]
  # cuDNN computes only scores that are not masked: two products, two again by remat, and five for the gradient.
  tokens, seen = 16 * 128, MODEL.num_layers * 2 * 128 * 256
  pattentions = MODEL.forward_flops_per_token - 2 * 512 * 256 - seen
  assert (
    train.flops == (4 * pattentions - MODEL.num_layers * 2 * 512 * 256 + 9 / 2 * seen + 3 * 2 * 512 * 256) * tokens / 4
  )


@needs_cuda
@pytest.mark.slow
@pytest.mark.usefixtures("users_precision")
def test_a_gpu_decodes_one_row_without_writing_its_products_to_memory():
  _, decode = check(config(batch_size=1), "h100:1")
  assert decode.peak - sum(decode.held.values()) < 4 * MODEL.ffn_tokens * MODEL.hidden_size


@pytest.mark.slow
@pytest.mark.usefixtures("users_precision")
@pytest.mark.parametrize(
  "topology, said",
  [
    pytest.param("v5e:2x2", "Ran out of memory .*15.75G.*", marks=needs_libtpu),
    pytest.param("h100:1", "it takes .* GiB of 80.", marks=needs_cuda),
  ],
)
def test_a_program_that_does_not_fit_is_refused(topology, said):
  with pytest.raises(ValueError, match=f"the train step does not fit: {said} Take more chips"):
    check(config(batch_size=2**18), topology)
