"""One answer everywhere: evaluation, the loaded SavedModel, gRPC, REST and the web page say the same of the same questions."""

import base64
import contextlib
import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import grpc
import numpy as np
import pytest
import tensorflow as tf
from selenium.webdriver.common.keys import Keys
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from serving import client, signatures
from tests.export_test import answerer, ask, asked, loaded, servable, workdirs  # noqa: F401  fixtures
from tests.processes import REPOSITORY, free_ports, is_listening, wait_until
from tests.web_test import browser, page_server, press, text, texts, wait_for  # noqa: F401  fixtures

NUM_QUESTIONS = 24
NUMBERS = ("score", "answer_rank", "passage_number", "probability", "retrieval_score", "reader_score", "answer_start", "answer_end")
STRINGS = ("answer", "title", "text")


@contextlib.contextmanager
def model_server(base_path: str, *arguments: str):
  """Runs python -m serving.model_server. Yields its gRPC and REST ports."""
  grpc_port, rest_port = free_ports(2)
  process = subprocess.Popen(
      [sys.executable, "-m", "serving.model_server", f"--model_base_path={base_path}", f"--model_name={signatures.MODEL_NAME}",
       f"--port={grpc_port}", f"--rest_api_port={rest_port}", *arguments], cwd=REPOSITORY)
  try:
    wait_until(lambda: is_listening(grpc_port) and answers(rest_port), "the model server")
    yield grpc_port, rest_port
  finally:
    process.terminate()
    assert process.wait(30) == 0


def answers(rest_port: int) -> bool:
  """Whether the model is available over REST."""
  with contextlib.suppress(OSError):
    status = json.load(urllib.request.urlopen(f"http://localhost:{rest_port}/v1/models/{signatures.MODEL_NAME}", timeout=5))
    return status["model_version_status"][0]["state"] == "AVAILABLE"
  return False


@pytest.fixture(scope="module")
def ports(servable):  # noqa: F811
  with model_server(servable.rpartition("/")[0]) as found:
    yield found


@pytest.fixture(scope="module")
def wanted(asked, loaded) -> dict[str, np.ndarray]:  # noqa: F811
  """What the SavedModel says in this process."""
  return ask(loaded, "answer", [row.text for row in asked[:NUM_QUESTIONS]])


def check(name: str, got: dict, wanted: dict[str, np.ndarray]) -> None:  # noqa: F811
  far = max(np.abs(np.array(got[key], np.float64) - wanted[key])[wanted[key] > signatures.NO_SCORE].max() for key in NUMBERS)
  print(f"{name}: {NUM_QUESTIONS} questions, numbers differ by at most {far:.1e}; {got['answer'][0][0]!r} with {got['score'][0][0]}")
  for key in STRINGS:
    assert np.array(got[key], object).tolist() == wanted[key].tolist(), key
  for key in NUMBERS:
    np.testing.assert_allclose(np.array(got[key], np.float64), wanted[key], atol=1e-5, err_msg=key)


def test_evaluation(asked, answerer, wanted):  # noqa: F811
  here = answerer(asked[:NUM_QUESTIONS])
  print(here[0], wanted["answer"][0], wanted["score"][0])
  assert [answer.text for answer in here] == wanted["answer"][:, 0].tolist()
  np.testing.assert_allclose([answer.score for answer in here], wanted["score"][:, 0], atol=1e-5)
  assert len({answer.text for answer in here}) > 3


def test_grpc(asked, ports, wanted):  # noqa: F811
  request = predict_pb2.PredictRequest()
  request.model_spec.name, request.model_spec.signature_name = signatures.MODEL_NAME, "answer"
  request.inputs["question"].CopyFrom(tf.make_tensor_proto([row.text for row in asked[:NUM_QUESTIONS]]))
  with grpc.insecure_channel(f"localhost:{ports[0]}") as channel:
    response = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=60)
  got = {name: tf.make_ndarray(value) for name, value in response.outputs.items()}
  check("gRPC", got | {name: np.vectorize(bytes.decode, otypes=[object])(got[name]) for name in STRINGS}, wanted)


def test_client(asked, ports, wanted):  # noqa: F811
  found = client.Client(f"localhost:{ports[0]}", timeout_secs=60).answer([row.text for row in asked[:NUM_QUESTIONS]])
  print(found[0])
  assert [one.answers[0].text for one in found] == wanted["answer"][:, 0].tolist()
  np.testing.assert_allclose([one.answers[0].score for one in found], wanted["score"][:, 0], atol=1e-5)
  np.testing.assert_allclose([[passage.probability for passage in one.passages] for one in found], wanted["probability"], atol=1e-5)


LONG = "where is the harbour ? " * 435  # 10,005 characters
UTF8 = b"who founded \xff\xfe ?"
REQUESTS = {  # what is asked → how it differs from a good request, gRPC's code, REST's status
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
    "a deadline of 1 ms": ({"value": [LONG] * 256, "timeout": 0.001}, "DEADLINE_EXCEEDED", None),  # REST has no deadlines
}


@pytest.mark.parametrize("name", REQUESTS)
def test_status_codes(ports, name):
  """Bad and odd requests through the official stubs and plain REST get what TensorFlow Serving gives them."""
  wish, code, status = REQUESTS[name]
  wish = {"name": signatures.MODEL_NAME, "version": None, "signature": "answer", "input": "question", "value": ["who ?"], "timeout": 60} | wish
  request = predict_pb2.PredictRequest()
  request.model_spec.name, request.model_spec.signature_name = wish["name"], wish["signature"]
  if wish["version"]:
    request.model_spec.version.value = wish["version"]
  request.inputs[wish["input"]].CopyFrom(tf.make_tensor_proto(wish["value"]))
  with grpc.insecure_channel(f"localhost:{ports[0]}", options=[("grpc.max_send_message_length", -1)]) as channel:
    try:
      outputs = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=wish["timeout"]).outputs
      got, said = "OK", {key: tf.make_ndarray(value).shape for key, value in outputs.items()}
      assert {shape[0] for shape in said.values()} == {len(wish["value"])}
    except grpc.RpcError as error:
      got, said = error.code().name, error.details()
  print(f"{name}: gRPC {got}, {str(said)[:150]}")
  assert got == code
  if status:
    version = f"/versions/{wish['version']}" if wish["version"] else ""
    values = [{"b64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value for value in wish["value"]]
    body = {"signature_name": wish["signature"], "inputs": {wish["input"]: values}}
    request = urllib.request.Request(f"http://localhost:{ports[1]}/v1/models/{wish['name']}{version}:predict", json.dumps(body).encode())
    try:
      with urllib.request.urlopen(request, timeout=60) as response:
        got, said = response.status, response.read()
    except urllib.error.HTTPError as error:
      got, said = error.code, error.read()
    print(f"{name}: REST {got}, {said[:150]}")
    assert got == status


def over_rest(port: int, asked) -> dict:  # noqa: F811
  body = {"signature_name": "answer", "inputs": {"question": [row.text for row in asked[:NUM_QUESTIONS]]}}
  request = urllib.request.Request(f"http://localhost:{port}/v1/models/{signatures.MODEL_NAME}:predict", json.dumps(body).encode())
  return json.load(urllib.request.urlopen(request, timeout=60))["outputs"]


def test_rest(asked, ports, wanted):  # noqa: F811
  check("REST", over_rest(ports[1], asked), wanted)


@pytest.fixture(scope="module")
def page(ports):
  with page_server(f"http://localhost:{ports[1]}") as url:
    yield url


def test_what_the_page_fetches(asked, page, wanted):  # noqa: F811
  check("page", over_rest(int(page.rpartition(":")[2]), asked), wanted)


@pytest.mark.skipif(shutil.which("chromium") is None or shutil.which("chromedriver") is None,
                    reason="no browser: apt-get install chromium chromium-driver")
def test_what_the_page_shows(asked, browser, page, wanted):  # noqa: F811
  for number in range(3):
    browser.get("about:blank")
    browser.get(page)
    press(browser, asked[number].text, Keys.ENTER)
    wait_for(browser, "#best")
    shown = text(browser, "#best"), texts(browser, ".other"), text(browser, "#best ~ .small")
    print(asked[number].text, shown)
    others = [answer for answer in wanted["answer"][number, 1:] if answer]
    assert shown[:2] == (wanted["answer"][number, 0], others)
    assert f"score {wanted['score'][number, 0]:.2f}".replace("-", "−") in shown[2]
