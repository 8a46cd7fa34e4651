"""Log-likelihoods, perplexity and multiple choice against plain float64 computations."""

import json
import math

import numpy as np
import pytest
from flax import nnx

from tests import oracle
from tokenformer_jax import data
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.data.corpus import tokenize
from tokenformer_jax.data.documents import text_files
from tokenformer_jax.evaluation.evaluate import evaluate, open_model
from tokenformer_jax.evaluation.log_likelihood import Request, _score, encode_pair, log_likelihoods
from tokenformer_jax.evaluation.multiple_choice import answer
from tokenformer_jax.evaluation.perplexity import perplexity, windows
from tokenformer_jax.evaluation.report import table, write_json
from tokenformer_jax.evaluation.tasks import Question, read_task
from tokenformer_jax.interop.names import to_released
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import split

TOKENIZER = data.open_tokenizer("bytes")
CONFIG = ModelConfig(
  vocab_size=384, num_layers=1, hidden_size=16, num_heads=2, qkv_tokens=8, proj_tokens=8, ffn_tokens=16, seq_length=24
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
  model = LanguageModel(CONFIG, rngs=nnx.Rngs(0))
  # Far from uniform, or greedy choices would hang on rounding.
  model.embedding[...] = model.embedding[...] * 20.0
  return model


def plain_logits(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
  arrays = oracle.wide(to_released(split(model)[1]))
  return oracle.language_model(arrays, tokens, CONFIG)


def plain_score(model: LanguageModel, context, continuation) -> tuple[float, bool]:
  """Σ log p over the true vocabulary, by one float64 forward pass."""
  ids = np.concatenate([context, continuation])[-(CONFIG.seq_length + 1) :]
  logits = plain_logits(model, ids[None, :-1])[0][:, : TOKENIZER.vocab_size]
  log_p = (
    logits
    - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    - logits.max(-1, keepdims=True)
  )
  rows = np.arange(len(ids) - 1)[-len(continuation) :]
  labels = ids[1:][-len(continuation) :]
  return float(log_p[rows, labels].sum()), bool((logits[rows].argmax(-1) == labels).all())


def test_log_likelihoods_equal_a_plain_computation_whatever_the_batch(model):
  random = np.random.default_rng(0)
  requests = [
    Request(
      random.integers(0, 257, random.integers(1, 40)).tolist(), random.integers(0, 257, random.integers(1, 20)).tolist()
    )
    for _ in range(50)
  ]
  # One continuation that is greedy by making.
  context = requests[0].context[:5]
  likeliest = int(plain_logits(model, np.array([context]))[0, -1, :257].argmax())
  requests.append(Request(context, [likeliest]))
  scores = log_likelihoods(model, requests, TOKENIZER.vocab_size)
  for request, score in zip(requests, scores):
    expected, greedy = plain_score(model, *request)
    assert score.log_likelihood == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert score.greedy == greedy
  assert scores[-1].greedy


def test_padding_ids_take_no_part(model):
  (score,) = log_likelihoods(model, [Request([1], [2])], 257)
  (wider,) = log_likelihoods(model, [Request([1], [2])], 384)
  assert wider.log_likelihood < score.log_likelihood


def test_one_program_is_compiled_for_each_rounded_length(model):
  before = _score._cache_size()
  requests = [Request([1], [2] * length) for length in (1, 3, 9, 16, 17, 20, 24) for _ in range(50)]
  log_likelihoods(model, requests, 301)  # A vocabulary no other test has.
  assert _score._cache_size() - before == 2  # 16 and 24.


@pytest.mark.parametrize(
  "request_, message",
  [
    (Request([], [1]), "context of 0 ids"),
    (Request([1], []), "continuation of 0"),
    (Request([1], [257]), "id 257 at position 1"),
    (Request([-1], [5]), "id -1 at position 0"),
    (Request([1], [2] * 25), "does not fit"),
  ],
)
def test_bad_requests_are_refused(model, request_, message):
  with pytest.raises(ValueError, match=message):
    log_likelihoods(model, [request_], 257)


def test_encode_pair_splits_as_the_harness_does():
  assert encode_pair(TOKENIZER, "a b ", "c") == (list(b"a b"), list(b" c"))
  assert encode_pair(TOKENIZER, "", "ab") == ([256], list(b"ab"))


def test_windows_score_every_id_once_with_context_before_it():
  ids = list(range(50))
  for length, stride in ((24, 24), (24, 8), (24, 1), (60, 60)):
    requests = list(windows(ids, 256, length, stride))
    assert [i for request in requests for i in request.continuation] == ids
    for request in requests:
      before = [256, *ids[: request.continuation[0]]]
      assert request.context == before[-(length + 1 - len(request.continuation)) :]


def test_perplexity_counts_tokens_words_and_bytes(model, tmp_path):
  text = "Grüße an alle, und \n zwei  Zeilen."
  (tmp_path / "a.txt").write_text(text, encoding="utf-8")
  corpus = tokenize(text_files(str(tmp_path / "*.txt")), TOKENIZER)
  result = perplexity(model, TOKENIZER, corpus, progress=None)
  ids = TOKENIZER.encode(text)
  expected = -sum(plain_score(model, *request)[0] for request in windows(ids, 256, 24, 24))
  assert result.nats == pytest.approx(expected, rel=1e-5)
  assert (result.tokens, result.words, result.bytes) == (len(text.encode()), 6, len(text.encode()))
  assert result.report()["byte_perplexity"] == pytest.approx(math.exp(expected / len(text.encode())), rel=1e-5)
  assert perplexity(model, TOKENIZER, corpus, stride=4, progress=None).nats != result.nats
  with pytest.raises(ValueError, match="stride=25"):
    perplexity(model, TOKENIZER, corpus, stride=25)


def test_answers_are_chosen_by_likelihood_and_by_likelihood_a_character(model):
  questions = [
    Question(("ab",) * 2, (" x", " quite a long one"), 0, (1, 16), "g"),
    Question(("ab",) * 2, (" x", " quite a long one"), 1, (1, 16), "h"),
    Question(("q",) * 2, (" same", " same"), 0, (4, 4), "h"),
  ]
  metrics = answer(model, TOKENIZER, questions)
  values = [
    [plain_score(model, *encode_pair(TOKENIZER, *pair))[0] for pair in zip(q.contexts, q.continuations)]
    for q in questions
  ]
  right = [int(np.argmax(v) == q.gold) for v, q in zip(values, questions)]
  normed = [int(np.argmax(np.divide(v, q.lengths)) == q.gold) for v, q in zip(values, questions)]
  assert right[2] == 1  # The first of equals.
  assert metrics["acc"] == pytest.approx(np.mean(right)) and metrics["acc_norm"] == pytest.approx(np.mean(normed))
  assert metrics["acc_stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(3))
  assert metrics["acc/h"] == pytest.approx(np.mean(right[1:]))


def test_last_words_have_accuracy_and_perplexity(model):
  metrics = answer(model, TOKENIZER, [Question(("a",), (" b",), 0, (1,)), Question(("c",), (" d",), 0, (1,))])
  nats = [-plain_score(model, *encode_pair(TOKENIZER, *pair))[0] for pair in (("a", " b"), ("c", " d"))]
  assert metrics["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
  assert metrics["acc"] == 0.0


def rows_of(folder, name, *rows):
  path = folder / "eval_zero_shot" / name
  path.parent.mkdir(exist_ok=True)
  path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_tasks_are_read_with_the_harness_prompts(tmp_path):
  rows_of(tmp_path, "piqa.jsonl", {"query": "Question: how?\n", "choices": ["so", "thus"], "gold": 1})
  rows_of(tmp_path, "winogrande.jsonl", {"context_options": ["A so A", "A so B"], "continuation": "won.", "gold": 1})
  (question,) = read_task("piqa", tmp_path)
  assert question == Question(("Question: how?\nAnswer:",) * 2, (" so", " thus"), 1, (2, 4))
  (question,) = read_task("winogrande", tmp_path)
  assert question.contexts == ("A so A", "A so B") and question.continuations == (" won.",) * 2
  with pytest.raises(ValueError, match="Did you mean 'piqa'"):
    read_task("piqua", tmp_path)
  with pytest.raises(ValueError, match="no file .*hellaswag_val.jsonl"):
    read_task("hellaswag", tmp_path)
  rows_of(tmp_path, "arc_easy_test.jsonl", {"query": "?"})
  with pytest.raises(ValueError, match="line 1: not a row of arc_easy .*choices"):
    read_task("arc_easy", tmp_path)


def test_real_sets_have_their_questions(data_folder):
  counts = {
    "lambada_openai": 5153,
    "hellaswag": 10042,
    "piqa": 1838,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "winogrande": 1267,
    "blimp": 67000,
  }
  assert {task: len(read_task(task, data_folder)) for task in counts} == counts
  assert {q.group for q in read_task("blimp", data_folder, limit=1)} >= {"anaphor_gender_agreement"}


def test_evaluate_gathers_tasks_and_texts_in_a_table(model, tmp_path):
  rows_of(tmp_path, "piqa.jsonl", {"query": "Question: how?\n", "choices": ["so", "thus"], "gold": 1})
  (tmp_path / "a.txt").write_text("some text", encoding="utf-8")
  results = evaluate(model, TOKENIZER, tasks=["piqa"], data_folder=tmp_path, texts=[f"text:{tmp_path}/a.txt"])
  assert list(results) == ["piqa", f"text:{tmp_path}/a.txt"]
  shown = table(results)
  assert "piqa" in shown and "token_perplexity" in shown
  write_json(tmp_path / "new" / "scores.json", results)
  assert json.loads((tmp_path / "new" / "scores.json").read_text())["piqa"]["questions"] == 1
  with pytest.raises(ValueError, match="nothing to measure"):
    evaluate(model, TOKENIZER)


@pytest.mark.parametrize(
  "arguments",
  [(None, None, None, None), ("run", None, "file", None), (None, None, "f", None), ("run", None, None, "bytes")],
)
def test_open_model_wants_a_run_or_weights_with_a_tokenizer(arguments):
  with pytest.raises(ValueError, match="give|tokenizer"):
    open_model(*arguments)
