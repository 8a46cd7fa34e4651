"""EleutherAI's harness on our models: the same scores as ours, NumPy's log-likelihoods through its API."""

import dataclasses
import json
import zipfile

import numpy as np
import pytest
from flax import nnx

lm_eval = pytest.importorskip("lm_eval", reason="no lm_eval (pip install 'tokenformer_jax[eval]').")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.utils import get_rolling_token_windows  # noqa: E402

from tests.harness_agreement import agreement  # noqa: E402
from tests.test_evaluation import (  # noqa: E402
  CONFIG,
  TOKENIZER,
  model,  # noqa: F401
  plain_logits,
  plain_score,
  rows_of,
)
from tokenformer_jax import data  # noqa: E402
from tokenformer_jax.data.corpus import tokenize  # noqa: E402
from tokenformer_jax.data.documents import text_files  # noqa: E402
from tokenformer_jax.evaluation.harness import HarnessModel, run_harness  # noqa: E402
from tokenformer_jax.evaluation.log_likelihood import encode_pair  # noqa: E402
from tokenformer_jax.evaluation.perplexity import perplexity  # noqa: E402
from tokenformer_jax.models.language_model import LanguageModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # The harness's own.
LENGTH = CONFIG.seq_length


@pytest.fixture(scope="module")
def harness(model):  # noqa: F811
  return HarnessModel(model, TOKENIZER)


def instances(kind, *arguments):
  return [Instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in arguments]


def check(both, tasks, tolerance=1e-5):
  assert both.ours.keys() == both.theirs.keys()
  assert both.largest_difference() < tolerance
  for task in tasks:
    for metric in ("acc", "acc_norm", "perplexity"):
      if metric in both.their_scores[task]:
        assert both.their_scores[task][metric] == pytest.approx(both.our_scores[task][metric], rel=1e-5), task
    error = both.their_scores[task]["acc_stderr"]
    assert error == pytest.approx(both.our_scores[task]["acc_stderr"], rel=1e-5), task


def test_same_scores_on_made_up_items(model, tmp_path):  # noqa: F811
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


@pytest.mark.slow
def test_same_scores_on_real_items(data_folder):
  tokenizer = data.open_tokenizer(str(data_folder / "tokenizers" / "gpt2_tiny_5k"))
  config = dataclasses.replace(CONFIG, vocab_size=5120, seq_length=256)
  tasks = ["lambada_openai", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande"]
  random_model = LanguageModel(config, rngs=nnx.Rngs(0))
  random_model.embedding[...] = random_model.embedding[...] * 20.0
  both = agreement(random_model, tokenizer, tasks, data_folder, limit=40)
  assert sum(both.our_scores[task]["questions"] for task in tasks) == 240
  check(both, tasks)


@pytest.mark.parametrize(
  "context, continuation",
  [
    ("", "ab"),  # The end-of-document token is the context.
    ("", "abc" * 8),  # As many ids as the model reads.
    ("a b ", "c"),  # The space goes to the continuation.
    ("left out" * 9, " seen"),  # The context loses its beginning …
    ("x" * 20, "abc" * 8),
  ],
)  # … or all but its last id.
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


def test_generate_until(model, harness):  # noqa: F811
  def written(context, **settings):
    (text,) = harness.generate_until(instances("generate_until", (context, settings)), disable_tqdm=True)
    return text

  whole = written("abc", max_gen_toks=8)
  assert len(whole) > 3 and whole == greedy_text(model, b"abc", 8)
  assert written("abc", max_gen_toks=8, do_sample=False, temperature=0.7) == whole
  cut = whole[: whole.index(whole[2:4])]
  assert written("abc", max_gen_toks=8, until=["\x00never", whole[2:4], ""]) == cut
  assert written("abc", max_new_tokens=8, until=whole[3]) == whole[: whole.index(whole[3])]
  long = "the beginning is forgotten, the end is read"
  assert written(long, max_gen_toks=8) == greedy_text(model, long.encode()[-(LENGTH - 8) :], 8)
  assert written("", max_gen_toks=4) == greedy_text(model, [TOKENIZER.end_of_document], 4)
  assert written("abc") == greedy_text(model, b"abc", LENGTH // 2)
  settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
  drawn = harness.generate_until(instances("generate_until", *[("abc", settings)] * 2), disable_tqdm=True)
  assert drawn[0] != drawn[1]
  with pytest.raises(ValueError, match="max_gen_toks=24 leaves no room"):
    written("abc", max_gen_toks=LENGTH)
  with pytest.raises(ValueError, match="num_beams"):
    written("abc", num_beams=4)


@pytest.mark.slow  # Reads the harness's 14,000 task files.
def test_an_unknown_task_is_told_with_the_nearest_name(model):  # noqa: F811
  with pytest.raises(ValueError, match="unknown to lm_eval.*Did you mean 'arc_easy'"):
    run_harness(model, TOKENIZER, ["arc_eazy"])


def test_folders_and_data_that_are_not_there_are_told(model, tmp_path, monkeypatch):  # noqa: F811
  (tmp_path / "far.yaml").write_text(
    "{task: local_far, dataset_path: nobody/nothing, test_split: test, "
    "output_type: multiple_choice, doc_to_text: a, doc_to_choice: b}"
  )
  with pytest.raises(ValueError, match="is no folder"):
    run_harness(model, TOKENIZER, ["arc_easy"], include_path=str(tmp_path / "absent"))

  def unreachable(*args, **kwargs):
    raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

  monkeypatch.setattr("datasets.load_dataset", unreachable)
  with pytest.raises(ValueError, match="nobody/nothing.*--task_files"):
    run_harness(model, TOKENIZER, ["local_far"], include_path=str(tmp_path))
