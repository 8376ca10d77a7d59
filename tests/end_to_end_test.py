"""The same answer everywhere.

Evaluation, the loaded SavedModel, gRPC, REST and the web page agree on the same questions.
"""

import base64
import json
import shutil
import urllib.error
import urllib.request

import grpc
import numpy as np
import pytest
import tensorflow as tf
from selenium.webdriver.common.keys import Keys
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from serving import client, signatures
from tests.browsing import press, text, texts, wait_for
from tests.processes import model_server, page_server
from tests.servables import ask

NUM_QUESTIONS = 24
NUMBERS = (
  "score",
  "answer_rank",
  "passage_number",
  "probability",
  "retrieval_score",
  "reader_score",
  "answer_start",
  "answer_end",
)
STRINGS = ("answer", "title", "text")


@pytest.fixture(scope="module")
def ports(servable):
  with model_server(servable.rpartition("/")[0]) as found:
    yield found


@pytest.fixture(scope="module")
def wanted(asked, loaded) -> dict[str, np.ndarray]:
  """What the SavedModel answers in this process."""
  return ask(loaded, "answer", [row.text for row in asked[:NUM_QUESTIONS]])


def check(name: str, got: dict, wanted: dict[str, np.ndarray]) -> None:
  for key in STRINGS:
    assert np.array(got[key], object).tolist() == wanted[key].tolist(), f"{name}: {key}"
  for key in NUMBERS:
    np.testing.assert_allclose(
      np.array(got[key], np.float64), wanted[key], atol=1e-5, err_msg=f"{name}: {key}"
    )


def test_evaluation(asked, answerer, wanted):
  here = answerer.predict(asked[:NUM_QUESTIONS])
  assert [answer.text for answer in here] == wanted["answer"][:, 0].tolist()
  np.testing.assert_allclose([answer.score for answer in here], wanted["score"][:, 0], atol=1e-5)
  assert len({answer.text for answer in here}) > 3


def test_grpc(asked, ports, wanted):
  request = predict_pb2.PredictRequest()
  request.model_spec.name, request.model_spec.signature_name = signatures.MODEL_NAME, "answer"
  request.inputs["question"].CopyFrom(
    tf.make_tensor_proto([row.text for row in asked[:NUM_QUESTIONS]])
  )
  with grpc.insecure_channel(f"localhost:{ports[0]}") as channel:
    response = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(
      request, timeout=60
    )
  got = {name: tf.make_ndarray(value) for name, value in response.outputs.items()}
  check(
    "gRPC",
    got | {name: np.vectorize(bytes.decode, otypes=[object])(got[name]) for name in STRINGS},
    wanted,
  )


def test_client(asked, ports, wanted):
  found = client.Client(f"localhost:{ports[0]}", timeout_secs=60).answer(
    [row.text for row in asked[:NUM_QUESTIONS]]
  )
  assert [one.answers[0].text for one in found] == wanted["answer"][:, 0].tolist()
  np.testing.assert_allclose(
    [one.answers[0].score for one in found], wanted["score"][:, 0], atol=1e-5
  )
  np.testing.assert_allclose(
    [[passage.probability for passage in one.passages] for one in found],
    wanted["probability"],
    atol=1e-5,
  )


LONG = "where is the harbour ? " * 435  # 10,005 characters
UTF8 = b"who founded \xff\xfe ?"
REQUESTS = {  # request → how it differs from a good one, gRPC's code, REST's status
  "unknown model": ({"name": "nope"}, "NOT_FOUND", 404),
  "unknown version": ({"version": 9}, "NOT_FOUND", 404),
  "unknown signature": ({"signature": "nope"}, "FAILED_PRECONDITION", 400),
  "unknown input": ({"input": "text"}, "INVALID_ARGUMENT", 400),
  "wrong dtype": ({"value": [1.0]}, "INVALID_ARGUMENT", 400),
  "wrong shape": ({"value": [["who ?"]]}, "INVALID_ARGUMENT", 400),
  "empty batch": ({"value": np.array([], object)}, "OK", 200),
  "empty question": ({"value": [""]}, "OK", 200),
  "10,000 characters": ({"value": [LONG]}, "OK", 200),
  "invalid UTF-8": ({"value": [UTF8]}, "OK", 200),
  "100 MB": ({"value": ["x" * 100_000_000]}, "RESOURCE_EXHAUSTED", 413),
  # REST has no deadlines
  "a deadline of 1 ms": (
    {"value": [LONG] * 256, "timeout": 0.001},
    "DEADLINE_EXCEEDED",
    None,
  ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_status_codes(ports, name):
  """Bad and odd requests get the responses of TensorFlow Serving.

  They are sent through the official stubs and plain REST.
  """
  wish, code, status = REQUESTS[name]
  wish = {
    "name": signatures.MODEL_NAME,
    "version": None,
    "signature": "answer",
    "input": "question",
    "value": ["who ?"],
    "timeout": 60,
  } | wish
  request = predict_pb2.PredictRequest()
  request.model_spec.name, request.model_spec.signature_name = wish["name"], wish["signature"]
  if wish["version"]:
    request.model_spec.version.value = wish["version"]
  request.inputs[wish["input"]].CopyFrom(tf.make_tensor_proto(wish["value"]))
  with grpc.insecure_channel(
    f"localhost:{ports[0]}", options=[("grpc.max_send_message_length", -1)]
  ) as channel:
    try:
      outputs = (
        prediction_service_pb2_grpc.PredictionServiceStub(channel)
        .Predict(request, timeout=wish["timeout"])
        .outputs
      )
      got, said = "OK", {key: tf.make_ndarray(value).shape for key, value in outputs.items()}
      assert {shape[0] for shape in said.values()} == {len(wish["value"])}
    except grpc.RpcError as error:
      got, said = error.code().name, error.details()
  assert got == code, f"{name}: {said}"
  if status:
    version = f"/versions/{wish['version']}" if wish["version"] else ""
    values = [
      {"b64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value
      for value in wish["value"]
    ]
    body = {"signature_name": wish["signature"], "inputs": {wish["input"]: values}}
    request = urllib.request.Request(
      f"http://localhost:{ports[1]}/v1/models/{wish['name']}{version}:predict",
      json.dumps(body).encode(),
    )
    try:
      with urllib.request.urlopen(request, timeout=60) as response:
        got, said = response.status, response.read()
    except urllib.error.HTTPError as error:
      got, said = error.code, error.read()
    assert got == status, f"{name}: {said}"


def over_rest(port: int, asked) -> dict:
  body = {
    "signature_name": "answer",
    "inputs": {"question": [row.text for row in asked[:NUM_QUESTIONS]]},
  }
  request = urllib.request.Request(
    f"http://localhost:{port}/v1/models/{signatures.MODEL_NAME}:predict", json.dumps(body).encode()
  )
  return json.load(urllib.request.urlopen(request, timeout=60))["outputs"]


def test_rest(asked, ports, wanted):
  check("REST", over_rest(ports[1], asked), wanted)


@pytest.fixture(scope="module")
def page(ports):
  with page_server(f"http://localhost:{ports[1]}") as url:
    yield url


def test_what_the_page_fetches(asked, page, wanted):
  check("page", over_rest(int(page.rpartition(":")[2]), asked), wanted)


@pytest.mark.skipif(
  shutil.which("chromium") is None or shutil.which("chromedriver") is None,
  reason="no browser: apt-get install chromium chromium-driver",
)
def test_what_the_page_shows(asked, browser, page, wanted):
  for number in range(3):
    browser.get("about:blank")
    browser.get(page)
    press(browser, asked[number].text, Keys.ENTER)
    wait_for(browser, "#best")
    assert asked[number].text in browser.title
    shown = text(browser, "#best"), texts(browser, ".other"), text(browser, "#best ~ .small")
    others = [answer for answer in wanted["answer"][number, 1:] if answer]
    assert shown[:2] == (wanted["answer"][number, 0], others), asked[number].text
    assert f"score {wanted['score'][number, 0]:.2f}".replace("-", "−") in shown[2]
