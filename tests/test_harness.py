"""EleutherAI's harness on our models: its scores equal ours, and its API gives the log-likelihoods of a NumPy oracle."""

import dataclasses
import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

lm_eval = pytest.importorskip("lm_eval", reason="no lm_eval (pip install 'tokenformer_jax[eval]').")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import get_rolling_token_windows  # noqa: E402

from tests.harness_agreement import agreement  # noqa: E402
from tests.test_evaluation import (  # noqa: E402
  CONFIG,
  TOKENIZER,
  MergingTokenizer,
  model,  # noqa: F401
  plain_logits,
  plain_score,
  rows_of,
)
from tokenformer_jax import data  # noqa: E402
from tokenformer_jax.data.corpus import tokenize  # noqa: E402
from tokenformer_jax.data.documents import text_files  # noqa: E402
from tokenformer_jax.evaluation import harness as harness_module  # noqa: E402
from tokenformer_jax.evaluation import harness_model, log_likelihood  # noqa: E402
from tokenformer_jax.evaluation.evaluate import evaluate  # noqa: E402
from tokenformer_jax.evaluation.harness import metrics_of, run_harness  # noqa: E402
from tokenformer_jax.evaluation.harness_model import HarnessModel  # noqa: E402
from tokenformer_jax.evaluation.log_likelihood import encode_pair  # noqa: E402
from tokenformer_jax.evaluation.perplexity import perplexity  # noqa: E402
from tokenformer_jax.models.language_model import LanguageModel  # noqa: E402
from tokenformer_jax.nn.cache import KVCache  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # The harness and its dependencies warn.
LENGTH = CONFIG.seq_length


@pytest.fixture(scope="module")
def harness(model):  # noqa: F811
  return HarnessModel(model, TOKENIZER)


def instances(kind, *arguments):
  return [
    Instance(request_type=kind, doc={}, arguments=pair, idx=0, metadata=("some_task", number, 1))
    for number, pair in enumerate(arguments)
  ]


def check(both, tasks, tolerance=1e-5):
  assert both.ours.keys() == both.theirs.keys()
  assert both.largest_difference() < tolerance
  for task in tasks:
    for metric in ("acc", "acc_norm", "perplexity"):
      if metric in both.their_scores[task]:
        assert both.their_scores[task][metric] == pytest.approx(both.our_scores[task][metric], rel=1e-5), task
    error = both.their_scores[task]["acc_stderr"]
    assert error == pytest.approx(both.our_scores[task]["acc_stderr"], rel=1e-5), task


def test_scores_on_synthetic_items_are_the_same(model, tmp_path):  # noqa: F811
  """With ties, empty contexts (BLiMP), contexts that end in a space, and contexts longer than the model."""
  random = np.random.default_rng(1)
  words = ["sun", "moon", "a tree", "the river", "stone", "rain"]

  def some(count, replace=False):
    return [str(word) for word in random.choice(words, count, replace=replace)]

  def choices(query):
    return {"query": query, "choices": some(3, replace=True), "gold": int(random.integers(3))}

  rows_of(tmp_path, "arc_easy_test.jsonl", *(choices(" and ".join(some(4))) for _ in range(12)))
  rows_of(
    tmp_path,
    "hellaswag_val.jsonl",
    *(choices(" und ".join(some(2)) + " ") for _ in range(12)),
    {"query": "a", "choices": ["rain", "rain"], "gold": 0},
    {"query": "b", "choices": ["sun", "sun"], "gold": 1},
  )
  rows_of(tmp_path, "piqa.jsonl", *(choices(f"Question: {word}?\n") for word in words))
  rows_of(
    tmp_path,
    "winogrande.jsonl",
    *({"context_options": some(2), "continuation": "shone.", "gold": i % 2} for i in range(12)),
  )
  rows_of(
    tmp_path, "lambada_openai.jsonl", *({"context": " ".join(some(6)), "continuation": some(1)[0]} for _ in range(6))
  )
  (tmp_path / "blimp").mkdir()
  pairs = [
    json.dumps({"sentence_good": " is ".join(some(2)), "sentence_bad": " are ".join(some(2)), "UID": "verb"})
    for _ in range(12)
  ]
  with zipfile.ZipFile(tmp_path / "blimp" / "BLiMP.zip", "w") as archive:
    archive.writestr("data/verb.jsonl", "\n".join(pairs))
  tasks = ["arc_easy", "hellaswag", "piqa", "winogrande", "lambada_openai", "blimp"]
  both = agreement(model, TOKENIZER, tasks, tmp_path, limit=20)
  check(both, tasks)
  assert any(len(context) + len(continuation) > LENGTH + 1 for context, continuation in both.ours)
  assert any(context == (TOKENIZER.end_of_document,) for context, _ in both.ours)


def test_scores_on_real_items_are_the_same(data_folder, monkeypatch):
  monkeypatch.setattr(log_likelihood, "_MAX_ROWS", 16)  # The few items of a task would be padded to 128 rows.
  tokenizer = data.open_tokenizer(str(data_folder / "tokenizers" / "gpt2_tiny_5k"))
  config = dataclasses.replace(CONFIG, vocab_size=5120, seq_length=128)
  tasks = ["lambada_openai", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande"]
  random_model = LanguageModel(config, rngs=nnx.Rngs(0))
  random_model.embedding[...] = random_model.embedding[...] * 20.0
  both = agreement(random_model, tokenizer, tasks, data_folder, limit=8)
  assert sum(both.our_scores[task]["questions"] for task in tasks) == 48
  check(both, tasks)


@pytest.mark.parametrize(
  "context, continuation",
  [
    ("", "ab"),  # The end-of-document token is the context.
    ("", "abc" * 8),  # As many ids as the model reads.
    ("a b ", "c"),  # The space is moved to the continuation.
    ("left out" * 9, " seen"),  # The context loses its beginning.
    ("x" * 20, "abc" * 8),  # The context loses all but its last id.
  ],
)
def test_log_likelihood_of_a_pair_of_texts(model, harness, context, continuation):  # noqa: F811
  pair = instances("loglikelihood", (context, continuation))
  ((value, greedy),) = harness.loglikelihood(pair, disable_tqdm=True)
  if context:
    context_ids, continuation_ids = harness._encode_pair(context, continuation)
  else:
    context_ids, continuation_ids = [TOKENIZER.end_of_document], list(continuation.encode())
  assert tuple(encode_pair(TOKENIZER, context, continuation)) == (context_ids, continuation_ids)
  assert (value, greedy) == pytest.approx(plain_score(model, context_ids, continuation_ids), rel=1e-5)


def test_rolling_log_likelihood_is_that_of_the_harness_windows(model, harness, tmp_path):  # noqa: F811
  texts = ["a", "b" * LENGTH, "c" * (LENGTH + 1), "The whole of a longer text, read in windows of a length."]
  values = harness.loglikelihood_rolling(
    instances("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True
  )
  for text, value in zip(texts, values):
    expected = 0.0
    ids = list(text.encode())
    for inputs, labels in get_rolling_token_windows(ids, TOKENIZER.end_of_document, LENGTH, context_len=1):
      logits = plain_logits(model, np.array([inputs]))[0][:, : TOKENIZER.vocab_size]
      log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
      expected += log_p[-len(labels) :][np.arange(len(labels)), labels].sum()
    assert value == pytest.approx(expected, rel=1e-5)
  (tmp_path / "a.txt").write_text(texts[-1], encoding="utf-8")
  corpus = tokenize(text_files(str(tmp_path / "*.txt")), TOKENIZER)
  assert perplexity(model, TOKENIZER, corpus, progress=None).nats == pytest.approx(-values[-1], rel=1e-6)


def greedy_text(model, prompt, count) -> str:  # noqa: F811
  ids = list(prompt)
  for _ in range(count):
    ids.append(int(plain_logits(model, np.array([ids]))[0, -1, : TOKENIZER.vocab_size].argmax()))
  new = [*ids[len(prompt) :], TOKENIZER.end_of_document]
  return TOKENIZER.decode(new[: new.index(TOKENIZER.end_of_document)])


def written(harness, *contexts, **settings) -> list[str]:
  requests = instances("generate_until", *((context, settings) for context in contexts))
  return harness.generate_until(requests, disable_tqdm=True)


def test_generated_text_ends_at_a_stop_string_or_the_number_of_new_tokens(model, harness):  # noqa: F811
  (whole,) = written(harness, "abc", max_gen_toks=8)
  assert len(whole) > 3 and whole == greedy_text(model, b"abc", 8)
  assert written(harness, "abc", max_gen_toks=8, do_sample=False, temperature=0.7, top_k=3) == [whole]
  cut = whole[: whole.index(whole[2:4])]
  assert written(harness, "abc", max_gen_toks=8, until=["\x00never", whole[2:4], ""]) == [cut]
  assert written(harness, "abc", max_new_tokens=8, until=whole[3]) == [whole[: whole.index(whole[3])]]
  assert written(harness, "abc", max_gen_toks=8, repetition_penalty=50.0) != [whole]
  assert written(harness, "abc") == [greedy_text(model, b"abc", LENGTH // 2)]


def test_batched_generation_equals_generation_one_by_one(model, harness, monkeypatch):  # noqa: F811
  lengths = []

  def counted(model, tokenizer, prompts, **settings):
    lengths.append([len(prompt) for prompt in prompts])
    return generate(model, tokenizer, prompts, **settings)

  generate = harness_model.generate
  monkeypatch.setattr(harness_model, "generate", counted)
  monkeypatch.setattr(harness_model, "_MAX_ROWS", 4)
  # An empty context, and one that loses its beginning.
  contexts = ["abc", "", "the beginning is forgotten, the end is read", "x", "abc", "some more", "of it"]
  texts = written(harness, *contexts, max_gen_toks=8)
  assert lengths == [[16, 9, 5, 3], [3, 1, 1, 1]]  # Longest first; the seven rows are filled up to two batches of four.
  prompts = [context.encode()[-(LENGTH - 8) :] or [TOKENIZER.end_of_document] for context in contexts]
  assert texts == [greedy_text(model, prompt, 8) for prompt in prompts]
  assert len(set(texts)) > 3


def test_the_rows_of_a_batch_are_a_power_of_two_whose_cache_is_within_the_limit(harness, monkeypatch):
  cache = KVCache.empty(CONFIG, jnp.zeros(1, jnp.int32), num_slots=32)  # 3 + 8 tokens, rounded up.
  row_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))
  monkeypatch.setattr(harness_model, "_CACHE_BYTES", 3 * row_bytes)
  assert harness._max_rows(3, 8) == 2
  monkeypatch.setattr(harness_model, "_CACHE_BYTES", 2 * row_bytes - 1)
  assert harness._max_rows(3, 8) == 1


def test_requests_with_different_settings_are_generated_in_batches_of_their_own(harness):
  requests = instances("generate_until", *(("abc", {"max_gen_toks": number}) for number in (3, 5, 3, 3)))
  short, long, *again = harness.generate_until(requests, disable_tqdm=True)
  assert again == [short, short] and long.startswith(short) and len(long) > len(short)


def test_a_sampled_text_depends_on_the_number_of_its_request_and_on_no_other_request(harness):
  settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
  first, second = written(harness, "abc", "abc", **settings)
  assert first != second
  assert written(harness, "another", "abc", "a longer one", **settings)[1] == second


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"max_gen_toks": LENGTH}, "max_gen_toks=24 leaves no space"),
    ({"max_gen_toks": 0}, "max_gen_toks=0 leaves no space|max_gen_toks=0.*choose 1"),
    ({"num_beams": 4}, "num_beams unknown: remove it"),
    ({"until": [3]}, r"until=\[3\]: expected strings"),
    ({"do_sample": True, "temperature": -1.0}, "temperature=-1.0"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ({"max_gen_toks": "many"}, "invalid literal"),
  ],
)
def test_generation_settings_are_refused_by_task_and_document(harness, settings, message):
  requests = instances("generate_until", ("abc", {}), ("abc", settings))
  with pytest.raises(ValueError, match=f"task some_task, document 1: generation_kwargs: .*({message})"):
    harness.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize("context, continuation", [("ab", ""), ("a", "b"), ("", "")])
def test_a_continuation_without_tokens_of_its_own_is_refused_by_task_and_document(model, context, continuation):  # noqa: F811
  merging = HarnessModel(model, MergingTokenizer())
  pair = instances("loglikelihood", ("a", "c"), (context, continuation))
  with pytest.raises(ValueError, match="task some_task, document 1: its continuation has no ids of its own"):
    merging.loglikelihood(pair, disable_tqdm=True)


def test_metric_names_keep_the_filter_if_there_are_several():
  one = {"alias": "a", "acc,none": np.float64(0.5), "acc_stderr,none": "N/A", "acc_norm,none": 1.0, "sample_len": 3}
  assert metrics_of(one) == {"acc": 0.5, "acc_norm": 1.0, "sample_len": 3}
  several = {"em,none": 0.25, "em_stderr,none": 0.5, "em,strict-match": 0.75, "em_stderr,strict-match": 0.125}
  assert metrics_of(several | {"alias": " - a"}) == several
  strict = {"em,strict-match": 0.75, "em_stderr,strict-match": 0.125}
  assert metrics_of(strict) == {"em": 0.75, "em_stderr": 0.125}


@pytest.fixture
def own_tasks(tmp_path):
  """A folder of task files: data that must be downloaded, rolling texts and their group, two filters."""
  (tmp_path / "far.yaml").write_text(
    "{task: local_far, dataset_path: nobody/nothing, test_split: test, "
    "output_type: multiple_choice, doc_to_text: a, doc_to_choice: b}"
  )
  rows = tmp_path / "rows.jsonl"
  rows.write_text("".join(json.dumps({"text": "没有空格的文字" * 20 + str(i)}) + "\n" for i in range(2)))
  shared = {
    "dataset_path": "json",
    "test_split": "test",
    "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": f"{tmp_path}/cache"},
  }
  rolling = {
    "task": "local_rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
  }
  filtered = {
    "task": "local_filtered",
    "output_type": "generate_until",
    "doc_to_text": "abc",
    "doc_to_target": "x",
    "generation_kwargs": {"max_gen_toks": 2},
    "metric_list": [{"metric": "exact_match"}],
    "filter_list": [
      {"name": "as-it-is", "filter": [{"function": "take_first"}]},
      {
        "name": "other",
        "filter": [{"function": "regex", "regex_pattern": "$", "fallback": "x"}, {"function": "take_first"}],
      },
    ],
  }
  for task in (rolling, filtered):
    (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(shared | task))  # JSON is YAML.
  (tmp_path / "group.yaml").write_text("{group: local_group, task: [local_rolling]}")
  return tmp_path


def test_a_perplexity_that_overflows_in_the_harness_is_infinite_and_loses_no_result(model, own_tasks):  # noqa: F811
  came = []
  results = evaluate(
    model,
    TOKENIZER,
    tasks=["local_group", "local_filtered"],
    harness=True,
    task_files=own_tasks,
    progress=False,
    on_result=lambda *result: came.append(result),
  )
  assert results["local_rolling"]["word_perplexity"] == np.inf
  assert 5 < results["local_rolling"]["bits_per_byte"] < 100
  assert {"exact_match,as-it-is", "exact_match,other"} < set(results["local_filtered"])
  assert came == list(results.items())


def test_the_standard_error_of_a_perplexity_is_still_found():
  from lm_eval.api.metrics import perplexity as their_perplexity
  from lm_eval.api.metrics import stderr_for_metric

  safe = harness_module._OrInfinity(their_perplexity)
  assert safe([-1000.0]) == np.inf and safe([-1.0]) == their_perplexity([-1.0])
  assert stderr_for_metric(safe, 100) is not None


def test_an_unknown_task_is_refused_with_the_nearest_name(model, own_tasks, monkeypatch):  # noqa: F811
  def small_default(*, include_path=None, include_defaults=True):
    # The harness's own 14,000 task files take seconds to read.
    return TaskManager(include_path=include_path or str(own_tasks), include_defaults=False)

  monkeypatch.setattr(harness_module, "TaskManager", small_default)
  harness_module._default_task_manager.cache_clear()
  with pytest.raises(ValueError, match="unknown to lm_eval.*Did you mean 'local_far'"):
    run_harness(model, TOKENIZER, ["local_fra"])
  harness_module._default_task_manager.cache_clear()


@pytest.mark.parametrize("folder", ["absent", "gs://bucket/tasks"])
def test_a_folder_of_task_files_that_is_no_local_folder_is_refused(model, folder):  # noqa: F811
  with pytest.raises(ValueError, match=f"task_files='{folder}' is no local folder"):
    run_harness(model, TOKENIZER, ["arc_easy"], task_files=folder)


def test_data_that_cannot_be_downloaded_is_told(model, own_tasks, monkeypatch):  # noqa: F811
  def unreachable(*args, **kwargs):
    raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

  monkeypatch.setattr("datasets.load_dataset", unreachable)
  monkeypatch.setenv("HOME", str(own_tasks.parent))
  with pytest.raises(ValueError, match="nobody/nothing.*--task_files"):
    run_harness(model, TOKENIZER, ["local_far"], task_files=f"~/{own_tasks.name}")
