"""The command-line client against a gRPC server.

The server uses TensorFlow Serving's official stubs.
"""

import concurrent.futures
import json
import os
import pty
import resource
import subprocess
import sys
import threading
import time
import types

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import (
  get_model_status_pb2,
  model_service_pb2_grpc,
  predict_pb2,
  prediction_service_pb2_grpc,
)

from realm_tf import evaluate
from realm_tf.examples.answering import Prediction
from realm_tf.examples.questions import Question
from serving import client, pages, signatures
from serving.tf_serving import predict_protocol
from tests.canned_answers import ANSWERS_TEXT, TEXTS, TITLES, answer_outputs
from tests.processes import REPOSITORY, free_ports

FILLED_TEXT = """\
Zoë wrote Übermut.

[MASK] 1, with retrieval                without
 62.5 % █████     wrote                  25.0 % ██        ate
 12.5 % █         read                   12.5 % █         wrote

p(z|x)            utility
 25.0 % ██          +0.00  (no passage)
 75.0 % ██████      +0.92  Zoë
    Zoë Müller wrote »Übermut« in Zürich, long ago.
"""


def fill_outputs(texts: list[str]) -> dict:
  assert len(texts) == 1
  return {
    "num_masks": np.array([1], np.int32),
    "token": np.array([[["wrote", "read"], ["", ""]]], object),
    "token_probability": np.array([[[0.625, 0.125], [0, 0]]], np.float32),
    "token_without_retrieval": np.array([[["ate", "wrote"], ["", ""]]], object),
    "token_probability_without_retrieval": np.array([[[0.25, 0.125], [0, 0]]], np.float32),
    "passage_number": np.array([[-1, 7]], np.int32),
    "title": np.array([["", "Zoë"]], object),
    "text": np.array([["", TEXTS[0]]], object),
    "probability": np.array([[0.25, 0.75]], np.float32),
    "retrieval_utility": np.array([[0, 0.9163]], np.float32),
    "filled": np.array([texts[0].replace("[MASK]", "wrote")], object),
  }


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
  """A stand-in for model "realm", versions 1 and 2 (stable).

  Its errors are in TensorFlow Serving's own words.
  """

  def __init__(self):
    self.requests, self.unavailable, self.not_found, self.sleep_secs = [], 0, 0, 0.0
    self.models = ModelService()

  def Predict(self, request, context):
    self.requests.append(request)
    if self.unavailable:
      self.unavailable -= 1
      context.abort(grpc.StatusCode.UNAVAILABLE, "starting")
    if self.not_found:
      self.not_found -= 1
      context.abort(grpc.StatusCode.NOT_FOUND, "Servable not found for request: Latest(realm)")
    time.sleep(self.sleep_secs)
    spec = request.model_spec
    if spec.name != "realm" or spec.version.value not in (0, 1, 2):
      context.abort(
        grpc.StatusCode.NOT_FOUND, f"Servable not found for request: Latest({spec.name})"
      )
    if spec.version_label not in ("", "stable"):
      context.abort(
        grpc.StatusCode.INVALID_ARGUMENT,
        f"Unrecognized servable version label: {spec.version_label}",
      )
    ((name, tensor),) = request.inputs.items()
    assert (spec.signature_name, name) in (("answer", "question"), ("fill_mask", "text"))
    texts = [text.decode() for text in tf.make_ndarray(tensor)]
    outputs = answer_outputs(texts) if spec.signature_name == "answer" else fill_outputs(texts)
    return predict_pb2.PredictResponse(
      outputs={name: tf.make_tensor_proto(values) for name, values in outputs.items()}
    )


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
  """Gives the states of model "realm" at successive requests: (state, error).

  After the last of them no state is known.
  """

  def __init__(self):
    self.looks = []

  def GetModelStatus(self, request, context):
    if request.model_spec.name != "realm":
      context.set_trailing_metadata((("models-bin", "realm, größe".encode()),))
    if request.model_spec.name != "realm" or not self.looks:
      context.abort(grpc.StatusCode.NOT_FOUND, "Could not find any versions of model")
    response = get_model_status_pb2.GetModelStatusResponse()
    name, error = self.looks.pop(0)
    state = get_model_status_pb2.ModelVersionStatus.State.Value(name)
    response.model_version_status.add(
      version=1, state=state, status={"error_code": 13 if error else 0, "error_message": error}
    )
    return response


@pytest.fixture(scope="module")
def grpc_server():
  service = PredictionService()
  server = grpc.server(
    concurrent.futures.ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", 1 << 20)]
  )
  prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(service, server)
  models = types.SimpleNamespace(
    GetModelStatus=lambda *args: service.models.GetModelStatus(*args),
    HandleReloadConfigRequest=None,
  )
  model_service_pb2_grpc.add_ModelServiceServicer_to_server(models, server)
  address = f"localhost:{server.add_insecure_port('localhost:0')}"
  server.start()
  yield service, address
  server.stop(None)


@pytest.fixture
def service(grpc_server):
  """The service in its initial state, and its address."""
  grpc_server[0].__init__()
  return grpc_server


def run(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "serving.client", *arguments],
    cwd=REPOSITORY,
    input=stdin,
    capture_output=True,
    text=True,
    encoding="utf-8",
    timeout=60,
    env={**os.environ, "COLUMNS": "100", "PYTHONUTF8": "1", **environment},
  )


# ========================================================================================= protocol


@pytest.mark.parametrize(
  "values",
  [
    ["who wrote »Übermut«?", "", "日本"],
    [["a", "b"], ["c", "d"], ["e", "f"]],
    np.float32([[1.5, -2.25, signatures.NO_SCORE]]),
    np.int32([[[-1, 0], [2**31 - 1, -(2**31)]]]),
    np.float32(3.5),
    np.zeros([0, 4], np.int32),
  ],
  ids=repr,
)
def test_tensors_are_tensorflows(values):
  official = tensor_pb2.TensorProto.FromString(
    predict_protocol.to_tensor(values).SerializeToString()
  )
  wanted = np.asarray(values)
  got = tf.make_ndarray(official)
  assert got.shape == wanted.shape
  texts = wanted.dtype.kind == "U"
  assert got.tolist() == (np.char.encode(wanted, "utf-8") if texts else wanted).tolist()
  assert tf.as_dtype(official.dtype) == (tf.string if texts else tf.as_dtype(wanted.dtype))

  listed = tf.make_tensor_proto(values)
  packed = tensor_pb2.TensorProto(
    dtype=listed.dtype, tensor_shape=listed.tensor_shape, tensor_content=wanted.tobytes()
  )
  for form in (official, listed, *([] if texts else [packed])):
    back = predict_protocol.to_array(predict_protocol.Tensor.FromString(form.SerializeToString()))
    assert back.shape == wanted.shape and back.tolist() == wanted.tolist()
    assert back.dtype == (object if texts else wanted.dtype)


def test_tensors_as_other_servers_fill_them():
  """Repetitions of the last value may be left out."""
  shape = tf.TensorShape([2, 2]).as_proto()
  for fields, wanted in (
    ({"dtype": 1, "float_val": [1.5, 2.5]}, [[1.5, 2.5], [2.5, 2.5]]),
    ({"dtype": 3, "int_val": [-7]}, [[-7, -7], [-7, -7]]),
    ({"dtype": 7, "string_val": [b"a", b"b", b"\xc3\xa9", b"d"]}, [["a", "b"], ["é", "d"]]),
  ):
    official = tensor_pb2.TensorProto(tensor_shape=shape, **fields)
    got = predict_protocol.to_array(
      predict_protocol.Tensor.FromString(official.SerializeToString())
    )
    assert got.tolist() == wanted, fields
  for broken, words in (
    ({"dtype": 9}, "type number 9"),
    ({"dtype": 3, "int_val": [1] * 5}, "5 values"),
    ({"dtype": 1}, "0 values"),
  ):
    official = tensor_pb2.TensorProto(tensor_shape=shape, **broken)
    with pytest.raises(ValueError, match=words):
      predict_protocol.to_array(predict_protocol.Tensor.FromString(official.SerializeToString()))
  with pytest.raises(TypeError, match="bool"):
    predict_protocol.to_tensor([True])


def test_requests_are_tensorflow_servings():
  request = predict_protocol.PredictRequest()
  request.model_spec.name, request.model_spec.signature_name, request.model_spec.version.value = (
    "realm",
    "answer",
    3,
  )
  request.inputs.add(key="question", value=predict_protocol.to_tensor(["é"]))
  official = predict_pb2.PredictRequest.FromString(request.SerializeToString())
  spec = official.model_spec
  assert (spec.name, spec.signature_name, spec.version.value) == ("realm", "answer", 3)
  assert tf.make_ndarray(official.inputs["question"]).tolist() == ["é".encode()]
  assert predict_protocol.PredictRequest.FromString(official.SerializeToString()) == request
  request.model_spec.ClearField("version")
  request.model_spec.version_label = "stable"
  official = predict_pb2.PredictRequest.FromString(request.SerializeToString())
  assert (
    official.model_spec.version_label == "stable"
    and official.model_spec.WhichOneof("version_choice") == "version_label"
  )


# ========================================================================================== command


def test_starts_at_once_and_without_tensorflow():
  code = (
    "import sys, serving.client; "
    "print([name for name in sys.modules if name.startswith(('tensorflow', 'keras'))])"
  )
  loaded = subprocess.run(
    [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
  ).stdout.strip()
  assert loaded == "[]"
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert "--question" in run("--help").stdout
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  cpu_secs = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  assert cpu_secs < 1


def test_question(service):
  _, address = service
  done = run(f"--server={address}", "--question=who wrote Übermut")
  assert done.returncode == 0 and done.stdout == ANSWERS_TEXT, done.stderr
  assert run(f"--server={address}", "--question=nothing").stdout == "(no answer)\n"
  assert (
    "Čapek   reader" not in run(f"--server={address}", "--question=q", "--num_passages=0").stdout
  )


def test_fill(service):
  _, address = service
  done = run(f"--server={address}", "--fill=Zoë [MASK] Übermut.")
  assert (
    done.returncode == 0
    and "\n".join(line.rstrip() for line in done.stdout.split("\n")) == FILLED_TEXT
  ), done.stderr
  line = json.loads(run(f"--server={address}", "--fill=Zoë [MASK] Übermut.", "--json").stdout)
  assert line["filled"] == "Zoë wrote Übermut." and line["tokens"] == [
    [["wrote", 0.625], ["read", 0.125]]
  ]
  assert line["candidates"][1] == {
    "number": 7,
    "title": "Zoë",
    "text": TEXTS[0],
    "probability": 0.75,
    "retrieval_utility": pytest.approx(0.9163),
  }


def test_marks_on_a_terminal(service):
  _, address = service
  for environment, wanted in (
    ({}, "\033[1;4mZoë Müller\033[0m wrote"),
    ({"NO_COLOR": "1"}, ">>Zoë Müller<< wrote"),
  ):
    terminal, end = pty.openpty()
    try:
      subprocess.run(
        [sys.executable, "-m", "serving.client", f"--server={address}", "--question=q"],
        cwd=REPOSITORY,
        stdout=end,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONUTF8": "1", "COLUMNS": "80", "NO_COLOR": "", **environment},
      )
      written = os.read(terminal, 1 << 16).decode()
    finally:
      os.close(terminal)
      os.close(end)
    assert wanted in written


def test_lines_are_broken_around_marks():
  page = pages.TextPage(5, ("<b>", "</b>"), 24)
  got = page._wrap(
    pages._marked("The answer is a rather long name of words, she said.", (14, 41)), indent=2
  )
  assert (
    page._finish(got)
    == "  The answer is <b>a</b>\n  <b>rather long name of</b>\n  <b>words</b>, she said."
  )


def test_control_characters_stay_away_from_the_terminal(service):
  _, address = service
  done = run(f"--server={address}", "--question=echo \033]0;owned\007\x9b31mred")
  assert done.stdout.startswith(">> ]0;owned  31mred<<") and "\033" not in done.stdout


def test_questions_file_gives_the_predictions_of_evaluate(service, tmp_path):
  service, address = service
  rows = [Question(f"echo {i} é", [f"wanted {i}"]) for i in range(69)] + [
    Question("nothing", ["x"])
  ]
  source, output = tmp_path / "q.jsonl", tmp_path / "p.jsonl"
  source.write_text(
    "".join(json.dumps({"question": row.text, "answer": row.answers}) + "\n\n" for row in rows)
  )
  done = run(
    f"--server={address}",
    f"--questions={source}",
    f"--output={output}",
    "--num_passages=1",
    "--version=2",
  )
  assert (
    done.returncode == 0
    and "70/70 questions" in done.stderr
    and sorted(os.listdir(tmp_path)) == ["p.jsonl", "q.jsonl"]
  ), done.stderr
  assert [request.inputs["question"].tensor_shape.dim[0].size for request in service.requests] == [
    32,
    32,
    6,
  ]
  lines = [json.loads(line) for line in output.read_text().splitlines()]
  for row, line in zip(rows, lines, strict=True):
    text, found = row.text.removeprefix("echo "), row.text != "nothing"
    table = types.SimpleNamespace(titles=[TITLES[0]] * 8, texts=[text] * 8)
    answer = Prediction("", float("-inf"), -1, (0, 0), np.array([], np.int32), np.array([]))
    if found:
      answer = Prediction(text, 12.5, 7, (0, len(text.encode())), np.array([7]), np.array([8.0]))
    wanted = evaluate.prediction_line(row, answer, table, num_passages=1)
    assert {name: line[name] for name in wanted if name != "passages"} | {
      "passages": wanted["passages"]
    } == wanted
    names = ("number", "title", "text", "score")
    assert [{name: passage[name] for name in names} for passage in line["passages"]] == wanted[
      "passages"
    ]
  passage = lines[3]["passages"][0]
  assert (passage["probability"], passage["reader_score"], passage["byte_span"]) == (
    0.75,
    4.5,
    [0, 4],
  )
  assert lines[3]["other_answers"] == [{"text": "R.U.R.", "score": 3.25, "rank": 1}]


def test_prompt(service):
  _, address = service
  done = run(f"--server={address}", "--json", stdin="who?\nZoë [MASK] Übermut.\n\nnot asked\n")
  assert done.returncode == 0, done.stderr
  first, second = map(json.loads, done.stdout.splitlines())
  assert first["prediction"] == "Zoë Müller" and second["filled"] == "Zoë wrote Übermut."
  # the end of the input ends the client too
  assert run(f"--server={address}", "--json", stdin="who?").stdout.count("\n") == 1


def test_waits_for_a_server_that_is_not_ready(service, capsys):
  """The client says once what it waits for, whatever words the server uses."""
  service, address = service
  asking = client.Client(address, label="stable")
  for unavailable, not_found, looks, wanted in (
    (2, 0, [], ["model 'realm', label 'stable' is not ready."]),
    # TensorFlow Serving's
    (
      0,
      2,
      [("LOADING", ""), ("LOADING", "")],
      ["model 'realm', label 'stable' is still being loaded."],
    ),
    (
      1,
      1,
      [("START", ""), ("LOADING", "")],
      ["model 'realm', label 'stable' is still being loaded."],
    ),
  ):
    service.unavailable, service.not_found, service.models.looks, service.requests = (
      unavailable,
      not_found,
      looks,
      [],
    )
    assert asking.answer(["q"])[0].answers[0].text == "Zoë Müller"
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{address}: {words} Waiting for at most 60 s .." for words in wanted], said
    assert {request.model_spec.version_label for request in service.requests} == {"stable"}


def test_waits_for_a_server_that_does_not_listen_yet(capsys):
  port = free_ports(1)[0]
  server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
  prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(PredictionService(), server)

  def listen():
    server.add_insecure_port(f"localhost:{port}")
    server.start()

  timer = threading.Timer(2, listen)
  timer.start()
  started = time.monotonic()
  try:
    assert client.Client(f"localhost:{port}").answer(["q"])[0].answers[0].text == "Zoë Müller"
    secs = time.monotonic() - started
  finally:
    timer.join()
    server.stop(None)
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(
    f"localhost:{port}: nothing answers there. Is the server running"
  ) and line.endswith("Waiting for at most 60 s ..")
  assert 2 <= secs < 10, f"answered {secs:.1f} s after the call; the server listened after 2 s"


def test_waits_no_longer_than_its_timeout_and_not_for_what_will_not_pass(service, capsys):
  service, address = service
  service.unavailable, service.models.looks = 99, [("LOADING", "")] * 99
  started = time.monotonic()
  with pytest.raises(
    client.ClientError,
    match="still being loaded. Gave up after 1.2 s; to wait longer, set --timeout_secs.\n  UNAV",
  ):
    client.Client(address, timeout_secs=1.2).answer(["q"])
  assert 0.5 < time.monotonic() - started < 5
  service.__init__()
  service.not_found, service.models.looks = 99, [("END", "variables/ is missing")]
  for name, words in (
    ("realm", "model 'realm' could not be loaded there; version 1: variables/ is missing."),
    ("other", "it has no model 'other'. Models there: realm, größe. Give another --model_name."),
  ):
    started = time.monotonic()
    with pytest.raises(client.ClientError) as error:
      client.Client(address, model_name=name).answer(["q"])
    assert words in str(error.value) and time.monotonic() - started < 5, (words, str(error.value))
  assert not [
    line
    for line in capsys.readouterr().err.splitlines()
    if "loaded there" in line or "it has no" in line
  ]


@pytest.mark.parametrize(
  "arguments, words",
  [
    (
      ["--server=localhost:1", "--question=q", "--timeout_secs=0.6"],
      ["localhost:1: nothing answers there", "Gave up after 0.6 s"],
    ),
    (
      ["--model_name=other", "--question=q"],
      ["it has no model 'other'", "Servable not found for request: Latest(other)"],
    ),
    (["--version=9", "--question=q"], ["it has no model 'realm', version 9"]),
    (
      ["--label=canary", "--question=q"],
      [
        "model 'realm', label 'canary' refused the call",
        "INVALID_ARGUMENT: Unrecognized servable version label: canary",
      ],
    ),
    (["--questions=LONG"], ["too large", "--batch_size"]),
    (["--question=q", "--timeout_secs=0.3"], ["no answer within 0.3 s", "--timeout_secs"]),
    (
      ["--questions=BAD"],
      [
        'bad.jsonl\' has no question; wanted lines of {"question": str, ..}',
        "the line is not an object (first: line 1)",
      ],
    ),
    (["--questions=/nowhere.jsonl"], ["/nowhere.jsonl"]),
    (["--questions=BAD", "--question=q"], ["At most one of (question, questions, fill)"]),
    (["--output=x", "--question=q"], ["--output needs --questions"]),
    (["--fill=no blank"], ["put [MASK] where"]),
    (["--questions=LONG", "--output=LONG"], ["is the file of questions; give another file"]),
    (["--questions=LONG", "--output=/tmp"], ["is a folder; give the name of a file"]),
  ],
  ids=lambda value: value[-1][:30],
)
def test_mistakes_end_with_a_clear_line(service, tmp_path, arguments, words):
  service, address = service
  service.sleep_secs = 2.0 if "--timeout_secs=0.3" in arguments else 0.0
  (tmp_path / "bad.jsonl").write_text("[1]\n")
  (tmp_path / "long.jsonl").write_text('{"question": "' + "q " * (1 << 20) + '"}\n')
  for name in ("bad", "long"):
    arguments = [
      argument.replace(name.upper(), str(tmp_path / f"{name}.jsonl")) for argument in arguments
    ]
  done = run(f"--server={address}", *arguments)
  assert done.returncode == 1 and "Traceback" not in done.stderr and done.stdout == "", done.stderr
  for word in words:
    assert word in done.stderr
