"""Log-likelihoods, perplexity and multiple choice against plain float64 computations, and errors of their input."""

import json
import math

import numpy as np
import pytest
from flax import nnx

from tests import oracle
from tests.object_store import bucket  # noqa: F401
from tokenformer_jax import data
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.data.corpus import tokenize
from tokenformer_jax.data.documents import text_files
from tokenformer_jax.evaluation import evaluate as evaluate_module
from tokenformer_jax.evaluation import multiple_choice
from tokenformer_jax.evaluation.evaluate import evaluate, open_model
from tokenformer_jax.evaluation.log_likelihood import Request, Score, _program, encode_pair, log_likelihoods
from tokenformer_jax.evaluation.multiple_choice import answer
from tokenformer_jax.evaluation.perplexity import Perplexity, perplexity, windows
from tokenformer_jax.evaluation.report import Report, table, write_json
from tokenformer_jax.evaluation.tasks import TASKS, Question, read_task
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
  # Logits far from uniform, so that greedy choices do not depend on rounding.
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


def test_log_likelihoods_of_a_batch_equal_a_plain_computation(model):
  random = np.random.default_rng(0)
  requests = [
    Request(
      random.integers(0, 257, random.integers(1, 40)).tolist(), random.integers(0, 257, random.integers(1, 20)).tolist()
    )
    for _ in range(50)
  ]
  # One continuation that is greedy by construction.
  context = requests[0].context[:5]
  likeliest = int(plain_logits(model, np.array([context]))[0, -1, :257].argmax())
  requests.append(Request(context, [likeliest]))
  scores = log_likelihoods(model, requests, TOKENIZER.vocab_size)
  for request, score in zip(requests, scores):
    expected, greedy = plain_score(model, *request)
    assert score.log_likelihood == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert score.greedy == greedy
  assert scores[-1].greedy


def test_probabilities_exclude_the_ids_that_pad_the_vocabulary(model):
  (score,) = log_likelihoods(model, [Request([1], [2])], 257)
  (wider,) = log_likelihoods(model, [Request([1], [2])], 384)
  assert wider.log_likelihood < score.log_likelihood


def test_one_program_is_compiled_for_each_rounded_length(model):
  score = _program(split(model)[0], None)
  before = score._cache_size()
  requests = [Request([1], [2] * length) for length in (1, 3, 9, 16, 17, 20, 24) for _ in range(50)]
  log_likelihoods(model, requests, 301)  # No other test uses this vocabulary.
  assert score._cache_size() - before == 2  # For the lengths 16 and 24.


@pytest.mark.parametrize(
  "request_, message",
  [
    (Request([], [1]), "request 0: its context has no ids"),
    (Request([1], []), "request 0: its continuation has no ids"),
    (Request([1], [257]), "id 257 at position 1"),
    (Request([-1], [5]), "id -1 at position 0"),
    (Request([1], [2] * 25), "does not fit"),
  ],
)
def test_bad_requests_are_refused(model, request_, message):
  with pytest.raises(ValueError, match=message):
    log_likelihoods(model, [request_], 257)


@pytest.mark.parametrize("leaf, value", [("embedding", math.nan), ("final_norm", math.inf), ("values", math.nan)])
def test_a_model_with_parameters_that_are_not_finite_scores_nothing(model, leaf, value):
  broken = nnx.merge(*split(model))
  ((_, variable), *_) = [item for item in nnx.to_flat_state(nnx.state(broken, nnx.Param)) if leaf in map(str, item[0])]
  variable[...] = variable[...].at[..., 0].set(value)
  with pytest.raises(ValueError, match=r"question, answer 0: its log-likelihood is nan, so the model is broken"):
    answer(broken, TOKENIZER, [Question(("a",), (" b",), 0, (1,))])


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


def test_perplexity_of_text_with_few_spaces_is_infinite_and_its_bits_per_byte_are_finite(tmp_path):
  report = Perplexity(nats=2000.0, tokens=1000, words=1, bytes=1000).report()
  assert report["word_perplexity"] == math.inf and report["bits_per_byte"] == pytest.approx(2 / math.log(2))
  write_json(tmp_path / "scores.json", {"text": report})
  assert json.loads((tmp_path / "scores.json").read_text())["text"]["word_perplexity"] is None


def test_answers_are_chosen_by_likelihood_and_by_likelihood_per_character(model):
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


def test_single_answers_have_accuracy_and_perplexity(model):
  metrics = answer(model, TOKENIZER, [Question(("a",), (" b",), 0, (1,)), Question(("c",), (" d",), 0, (1,))])
  nats = [-plain_score(model, *encode_pair(TOKENIZER, *pair))[0] for pair in (("a", " b"), ("c", " d"))]
  assert metrics["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
  assert metrics["acc"] == 0.0


def test_perplexity_of_unlikely_single_answers_is_infinite_and_its_logarithm_finite(model, monkeypatch):
  monkeypatch.setattr(
    multiple_choice,
    "log_likelihoods",
    lambda model, requests, *args, **kwargs: [Score(-800.0, False) for _ in requests],
  )
  metrics = answer(model, TOKENIZER, [Question(("a",), (" b",), 0, (1,))] * 2)
  assert metrics["perplexity"] == math.inf and metrics["log_perplexity"] == 800.0


class MergingTokenizer:
  """Bytes, except that "ab" is one token, as in a vocabulary that a tokenizer has merged."""

  end_of_document, vocab_size = 256, 257

  def encode(self, text: str) -> list[int]:
    return list(text.encode().replace(b"ab", b"\xff"))


@pytest.mark.parametrize("answers", [("c", "b"), ("c", "d" * 25)])
def test_questions_whose_answers_cannot_be_scored_are_left_out_counted_and_reported(model, caplog, answers):
  good = Question(("a", "a"), ("c", "d"), 0, (1, 1), where="set.jsonl, line 1")
  bad = Question(("a", "a"), answers, 1, (1, 1), where="set.jsonl, line 2")
  metrics = answer(model, MergingTokenizer(), [good, bad])
  assert metrics == pytest.approx(answer(model, MergingTokenizer(), [good]) | {"left_out": 1}, nan_ok=True)
  assert "set.jsonl, line 2: an answer" in caplog.text and "line 1" not in caplog.text
  with pytest.raises(ValueError, match="no question can be scored; set.jsonl, line 2: an answer"):
    answer(model, MergingTokenizer(), [bad])


def rows_of(folder, name, *rows):
  path = folder / "eval_zero_shot" / name
  path.parent.mkdir(exist_ok=True)
  path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
  return path


def test_tasks_are_read_with_the_harness_prompts(tmp_path):
  rows_of(tmp_path, "piqa.jsonl", {"query": "Question: how?\n", "choices": ["so", "thus"], "gold": 1})
  rows_of(tmp_path, "winogrande.jsonl", {"context_options": ["A so A", "A so B"], "continuation": "won.", "gold": 1})
  (question,) = read_task("piqa", tmp_path)
  where = f"{tmp_path}/eval_zero_shot/piqa.jsonl, line 1"
  assert question == Question(("Question: how?\nAnswer:",) * 2, (" so", " thus"), 1, (2, 4), where=where)
  (question,) = read_task("winogrande", tmp_path)
  assert question.contexts == ("A so A", "A so B") and question.continuations == (" won.",) * 2
  with pytest.raises(ValueError, match="Did you mean 'piqa'"):
    read_task("piqua", tmp_path)
  with pytest.raises(ValueError, match="there is no file .*hellaswag_val.jsonl"):
    read_task("hellaswag", tmp_path)


PIQA = {"query": "how?", "choices": ["so", "thus"], "gold": 1}


@pytest.mark.parametrize(
  "task, row, message",
  [
    *[
      ("piqa", PIQA | {"gold": gold}, f"gold={gold!r}: expected an index into the 2 choices") for gold in (-1, 2, None)
    ],
    *[("piqa", PIQA | {"gold": gold}, f"gold={gold!r}: expected an index") for gold in ("1", True, 1.0)],
    ("piqa", PIQA | {"choices": "so"}, "choices='so': expected a list of two or more texts"),
    ("piqa", PIQA | {"choices": ["so", 1]}, "choices=['so', 1]: expected a list"),
    ("hellaswag", PIQA | {"choices": ["so", ""]}, "choices=['so', '']: expected a list"),
    ("arc_easy", PIQA | {"choices": ["so"]}, "choices=['so']: expected a list"),
    ("piqa", PIQA | {"query": ["how?"]}, "query=['how?']: expected a text"),
    ("piqa", PIQA | {"query": "\ud800"}, "query='\\ud800': the text holds half of a surrogate pair"),
    ("arc_challenge", {"query": "?"}, "it has no field 'choices'; it has 'query'"),
    ("winogrande", {"context_options": ["a", "b"], "continuation": "c", "gold": 2}, "gold=2: expected an index"),
    ("winogrande", {"context_options": "ab", "continuation": "c", "gold": 0}, "context_options='ab': expected a list"),
    ("lambada_openai", {"context": "a", "continuation": ""}, "continuation='': expected a text with characters"),
  ],
)
def test_a_row_that_is_no_question_is_refused_by_file_line_and_value(tmp_path, task, row, message):
  path = rows_of(tmp_path, TASKS[task].file.split("/")[1], row)
  with pytest.raises(ValueError) as raised:
    read_task(task, tmp_path)
  assert f"{path}, line 1 is not a row of {task}: {message}" in str(raised.value)


@pytest.mark.parametrize(
  "line, message",
  [
    (b'{"query": "\xff"}', r"line 3 is not UTF-8 \(byte 0xff\)"),
    (b'{"gold": ' + b"1" * 5000 + b"}", "line 3: the JSON holds an integer with too many digits"),
    (b"[" * 100_000, "line 3: the JSON is nested too deeply"),
    (b'{"query": ', "line 3 is not JSON: .* at column"),
    (b"3", "line 3: expected a JSON object .* got a int"),
  ],
)
def test_a_line_that_cannot_be_read_is_refused_by_file_and_line(tmp_path, line, message):
  path = rows_of(tmp_path, "piqa.jsonl")
  path.write_bytes(json.dumps(PIQA).encode() + b"\n\n" + line)
  with pytest.raises(ValueError, match=f"piqa.jsonl, {message}"):
    read_task("piqa", tmp_path)


def test_rows_are_separated_by_newlines_alone_and_blank_lines_are_no_rows(tmp_path):
  path = rows_of(tmp_path, "piqa.jsonl")
  lines = [json.dumps(PIQA | {"query": f"{i} \u2028 \x85 ?"}, ensure_ascii=False) for i in range(3)]
  path.write_text("\ufeff" + "\r\n \n".join(lines) + "\n\n", encoding="utf-8", newline="")
  questions = read_task("piqa", tmp_path, limit=2)
  assert [q.contexts[0] for q in questions] == [f"{i} \u2028 \x85 ?\nAnswer:" for i in range(2)]
  assert questions[1].where.endswith("line 3")


@pytest.mark.slow  # Reads 89,000 questions.
def test_real_tasks_have_their_questions(data_folder):
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


@pytest.fixture
def small_set(tmp_path, monkeypatch):
  """A home folder that holds one question and one text."""
  monkeypatch.setenv("HOME", str(tmp_path))
  rows_of(tmp_path, "piqa.jsonl", PIQA)
  (tmp_path / "a.txt").write_bytes(b"some text")
  return tmp_path


def test_evaluate_measures_tasks_and_texts(model, small_set):
  text = f"text:{small_set}/a.txt"
  results = evaluate(model, TOKENIZER, tasks="piqa", texts=text, data_folder="~")
  assert results["piqa"]["questions"] == 1 and results[text]["bytes"] == 9
  assert list(results) == ["piqa", text]
  shown = table(results)
  assert "piqa" in shown and "token_perplexity" in shown


def test_results_of_finished_tasks_survive_a_later_failure(model, small_set, monkeypatch, capsys):
  def fail(*args, **kwargs):
    raise RuntimeError("out of memory")

  monkeypatch.setattr(evaluate_module, "perplexity", fail)
  with pytest.raises(RuntimeError), Report("~/new/scores.json") as report:
    evaluate(model, TOKENIZER, tasks="piqa", texts="text:~/a.txt", data_folder="~", on_result=report.add)
  assert json.loads((small_set / "new" / "scores.json").read_text())["piqa"]["questions"] == 1
  assert "piqa  questions  1" in capsys.readouterr().out
  assert [path.name for path in (small_set / "new").iterdir()] == ["scores.json"]


def test_tasks_are_read_from_a_bucket_and_results_are_written_to_it(bucket):  # noqa: F811
  rows_of(bucket.folder, "piqa.jsonl", PIQA)
  assert read_task("piqa", "gs://bucket")[0].where == "gs://bucket/eval_zero_shot/piqa.jsonl, line 1"
  Report("gs://bucket/new/scores.json").add("piqa", {"acc": 1.0})
  assert json.loads((bucket.folder / "new" / "scores.json").read_text()) == {"piqa": {"acc": 1.0}}


@pytest.mark.parametrize("path, message", [("", "output='': the path is empty"), ("~", "is a folder; name a file")])
def test_an_output_that_is_no_file_is_refused_before_the_work(small_set, path, message):
  with pytest.raises(ValueError, match=message):
    Report(path)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(model="a model", tasks=["piqa"]), "model is a str: expected a LanguageModel"),
    (dict(tasks=[]), "tasks=\\[\\]: there is nothing to measure"),
    (dict(tasks=["piqa"], limit=0), "limit=0: must be a positive"),
    (dict(tasks=["piqa"], stride=4), "stride=4: belongs to the perplexity of texts"),
    (dict(texts=["text:~/a.txt"], stride=25), "stride=25: choose 1 … 24"),
    (dict(tasks=["piqa"], task_files="f"), "task_files='f': only the harness reads them"),
    (dict(tasks=["piqa"], harness=True, data_folder="~"), "data_folder='~': the harness downloads its own data"),
    (dict(texts=["text:~/a.txt"], harness=True), "harness=True: runs tasks"),
    (dict(tasks=["piqa"], data_folder=""), "data_folder='': the path is empty"),
    (dict(texts=["0.5*text:~/a.txt"]), "weight=0.5: texts are measured one by one"),
    (dict(texts=["text:~/a.txt"], bad_text="ignore"), "bad_text='ignore': choose one of"),
  ],
)
def test_arguments_that_do_nothing_or_are_out_of_range_are_refused(model, small_set, arguments, message):
  with pytest.raises(ValueError, match=message):
    evaluate(**{"model": model, "tokenizer": TOKENIZER} | arguments)


def test_text_that_is_not_utf8_is_measured_if_bad_text_allows_it(model, small_set):
  (small_set / "a.txt").write_bytes(b"some \xff text")
  with pytest.raises(ValueError, match="bad_text=replace"):
    evaluate(model, TOKENIZER, texts="text:~/a.txt")
  (metrics,) = evaluate(model, TOKENIZER, texts="text:~/a.txt", bad_text="replace").values()
  assert metrics["bytes"] == len("some \ufffd text".encode())


def test_table_pairs_each_metric_and_filter_with_its_own_standard_error():
  shown = table(
    {"gsm8k": {"em,a": 0.25, "em_stderr,a": 0.5, "em,b": 0.75, "em_stderr,b": 0.125, "acc/group": 1.0, "ppl": 2e9}}
  )
  lines = ["gsm8k  em,a    0.2500 ± 0.5000", "gsm8k  em,b    0.7500 ± 0.1250", "gsm8k  ppl     2.0000e+09"]
  assert shown.splitlines()[1:] == lines


@pytest.mark.parametrize(
  "arguments",
  [
    (None, None, None, None),
    ("run", None, "file", None),
    (None, None, "f", None),
    ("run", None, None, "bytes"),
    ("", None, None, None),
    (None, None, "", "bytes"),
    (None, 3, "f", "bytes"),
  ],
)
def test_open_model_takes_a_run_or_weights_with_a_tokenizer(arguments):
  with pytest.raises(
    ValueError, match="give exactly one|tokenizer|path is empty|name a weight file|only a run|no such file"
  ):
    open_model(*arguments)
