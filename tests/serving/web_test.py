"""The web page in a real browser.

Behind it is a stand-in that answers like TensorFlow Serving's REST API.
"""

import asyncio
import contextlib
import gzip
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from aiohttp import web
from selenium.webdriver.common.keys import Keys

from tests.browsing import press, text, texts, wait_for
from tests.processes import REPOSITORY, free_ports, page_server, wait_until

TEXTS = [
  "In 1911 schrieb Zoë Müller »Übermut« — in Zürich, 日本語 aside — and lived off it for years.",
  "Karel Čapek wrote R.U.R. in Prague; the word robot comes from it.",
  "Nothing here answers anything.",
]
ENCODINGS: list[str | None] = []  # of the questions that the stand-in was asked
INJECTION = "<script>window.owned = 1</script><img src=x onerror='window.owned = 2'>"


def span(text: str, answer: str) -> tuple[int, int]:
  start = len(text[: text.index(answer)].encode())
  return start, start + len(answer.encode())


def answer_row(question: str) -> dict:
  """Returns the outputs for one question, with TensorFlow Serving's names."""
  texts, titles, answers = (
    list(TEXTS),
    ["Zoë Müller", "Čapek", "Other"],
    ["»Übermut«", "R.U.R.", ""],
  )
  spans = [span(texts[0], "»Übermut«"), span(texts[1], "R.U.R."), (0, 0)]
  if question == "inject":
    texts[0], titles[0], answers[0], spans[0] = INJECTION, INJECTION, INJECTION, (0, len(INJECTION))
  if question == "nothing":
    answers = ["", "", ""]
  return {
    "answer": answers,
    "score": [12.5, 3.25, -3.40282e38],
    "answer_rank": [0, 1, -1] if answers[0] else [-1, -1, -1],
    "passage_number": [7, 3, 5],
    "title": titles,
    "text": texts,
    "probability": [0.625, 0.25, 0.0625],
    "retrieval_score": [8.0, 4.5, 2.0],
    "reader_score": [4.5, -1.25, -3.40282e38],
    "answer_start": [start for start, _ in spans],
    "answer_end": [end for _, end in spans],
  }


def fill_row(text: str) -> dict:
  return {
    "num_masks": text.count("[MASK]"),
    "token": [["wrote", "read"]] * 2,
    "token_probability": [[0.75, 0.125]] * 2,
    "token_without_retrieval": [["ate", "wrote"]] * 2,
    "token_probability_without_retrieval": [[0.25, 0.0625]] * 2,
    "passage_number": [-1, 7, 3],
    "title": ["", "Zoë Müller", "Čapek"],
    "text": ["", *TEXTS[:2]],
    "probability": [0.125, 0.75, 0.125],
    "retrieval_utility": [0.0, 1.75, -0.5],
    "filled": text.replace("[MASK]", "wrote"),
  }


async def status(request: web.Request) -> web.Response:
  del request
  return web.json_response(
    {
      "model_version_status": [
        {"version": "4", "state": "AVAILABLE", "status": {"error_code": "OK"}},
        {"version": "3", "state": "END"},
      ]
    }
  )


async def predict(request: web.Request) -> web.Response:
  ENCODINGS.append(request.headers.get("Content-Encoding"))
  body = await request.json()
  (row,) = body["instances"]
  if row.get("question", "").startswith("slow"):
    await asyncio.sleep(1.5)
  if row.get("question") == "refused":
    return web.json_response(
      {"error": 'Serving signature name: "answer" not found in signature def'}, status=400
    )
  outputs = (
    answer_row(row["question"]) if body["signature_name"] == "answer" else fill_row(row["text"])
  )
  return web.json_response({"predictions": [outputs]})


async def unknown(request: web.Request) -> web.Response:
  return web.json_response(
    {"error": f"Servable not found for request: Latest({request.match_info['model']})"}, status=404
  )


@contextlib.contextmanager
def rest_api(port: int | None = None):
  """Runs the stand-in in a thread. Yields its URL."""
  port = port or free_ports(1)[0]
  application, loop, started = web.Application(), asyncio.new_event_loop(), threading.Event()
  application.add_routes(
    [
      web.get("/v1/models/realm", status),
      web.post("/v1/models/realm:predict", predict),
      web.get("/v1/models/{model}", unknown),
      web.post("/v1/models/{model}:predict", unknown),
    ]
  )
  runner = web.AppRunner(application)

  async def start():
    await runner.setup()
    await web.TCPSite(runner, "localhost", port).start()
    started.set()

  def serve():
    loop.run_until_complete(start())
    loop.run_forever()
    loop.run_until_complete(runner.cleanup())

  thread = threading.Thread(target=serve)
  thread.start()
  assert started.wait(20)
  try:
    yield f"http://localhost:{port}"
  finally:
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture(scope="module")
def servers():
  """URLs of pages: for the stand-in, for no server, and for a model that does not exist."""
  with (
    rest_api() as rest,
    page_server(rest) as page,
    page_server(f"http://localhost:{free_ports(1)[0]}") as away,
    page_server(rest, "--model_name=other") as other,
  ):
    yield {"page": page, "away": away, "other": other}


@pytest.fixture
def visit(servers, browser):
  """Returns visit(hash, server="page"), which opens a page afresh and returns the browser."""

  def open_page(address: str = "", *, server: str = "page"):
    browser.get("about:blank")
    browser.get(f"{servers[server]}/{address}")
    return browser

  yield open_page
  severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
  assert not [message for message in severe if "status of" not in message], (
    "the console has errors other than those of HTTP"
  )


def widths(browser, selector: str) -> list[tuple[float, float]]:
  """Returns (from, to) of bars, as shares of the whole bar."""
  return browser.execute_script(
    """
      return [...document.querySelectorAll(arguments[0])].map((node) => {
        const [outer, inner] = [node, node.firstChild].map((part) => part.getBoundingClientRect());
        return [(inner.left - outer.left) / outer.width, (inner.right - outer.left) / outer.width];
      })""",
    selector,
  )


# ============================================================================================= page


def test_question_by_keyboard_alone(visit):
  browser = visit()
  wait_for(browser, ".formula")
  assert (
    "Σ" in text(browser, ".formula") and text(browser, "label[for=question]") == "Your question"
  )
  press(browser, "who wrote Übermut?", Keys.ENTER)  # the input has the focus; Enter
  wait_for(browser, "#best")
  assert text(browser, "#best") == "»Übermut«" and texts(browser, ".other") == ["R.U.R."]
  assert (
    text(browser, "#announcement").startswith("Answer: »Übermut«. ")
    and text(browser, "#server") == "realm, version 4"
  )
  assert browser.title == "»Übermut« · who wrote Übermut? · REALM"
  assert browser.current_url.endswith("#ask=who+wrote+%C3%9Cbermut%3F")
  for _ in range(4):  # past the button, to the passage that the answer was read in, and there
    press(browser, Keys.TAB)
    if browser.execute_script("return document.activeElement.textContent") == "1. Zoë Müller":
      break
  press(browser, Keys.ENTER)
  assert browser.execute_script("return document.activeElement.id") == "passage-1"
  assert (
    browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    == "solid"
  )
  # back to the input, whose text is selected and replaced
  press(browser, "/", "nothing", Keys.ENTER)
  wait_for(browser, ".best.none")
  assert browser.current_url.endswith("#ask=nothing") and text(browser, "#announcement").startswith(
    "No answer."
  )


def test_passages_with_evidence_and_measures(visit):
  browser = visit("#ask=q")
  wait_for(browser, "#best")
  assert texts(browser, ".passages p") == TEXTS  # nothing lost around the marks
  assert texts(browser, "mark") == ["»Übermut«", "R.U.R."] and texts(browser, "mark.evidence") == [
    "»Übermut«"
  ]
  assert texts(browser, ".passages h3") == ["1Zoë Müller", "2Čapek", "3Other"]
  assert texts(browser, ".measures .number") == [
    "62.5 %",
    "4.50",
    "25.0 %",
    "−1.25",
    "6.3 %",
    "no span",
  ]
  got = [share for bar in widths(browser, ".measures .bar") for share in bar]
  zero = 1.25 / 5.75  # the reader's axis goes from -1.25 to 4.5
  assert got == pytest.approx([0, 0.625, zero, 1, 0, 0.25, 0, zero, 0, 0.0625], abs=0.01)
  books = browser.execute_script(
    "return [...document.querySelectorAll('.book')].map((node) => node.offsetHeight)"
  )
  assert books[0] > books[1] > books[2] and "6.3 % not read" in text(browser, ".shelf figcaption")


def test_fill(visit):
  browser = visit("#fill")
  wait_for(browser, ".lead")
  assert "Utility" in text(browser, ".lead")
  press(browser, "Zoë [MASK] Übermut, then [MASK].", Keys.ENTER)
  wait_for(browser, "#best")
  assert text(browser, "#best") == "Zoë wrote Übermut, then wrote." and texts(browser, "mark") == [
    "wrote",
    "wrote",
  ]
  assert (
    texts(browser, ".blank ~ .blank .with .token") == ["wrote", "read"]
    and len(texts(browser, ".blank")) == 2
  )
  assert texts(browser, ".blank:nth-of-type(1) .number") == ["75.0 %", "12.5 %", "25.0 %", "6.3 %"]
  left, right = browser.execute_script(
    "return ['.with', '.without'].map("
    "(side) => document.querySelector(side).getBoundingClientRect().toJSON())"
  )
  assert left["right"] < right["left"] and left["top"] == right["top"]  # side by side
  assert texts(browser, ".candidates h3") == ["No passage", "Zoë Müller", "Čapek"]
  assert texts(browser, ".candidates .number") == [
    "12.5 %",
    "+0.00",
    "75.0 %",
    "+1.75",
    "12.5 %",
    "−0.50",
  ]
  helped, hurt = widths(browser, ".candidates .bar")[3::2]
  limit = 1.05 * 1.75
  assert helped == pytest.approx([0.5, 0.5 + 1.75 / limit / 2], abs=0.01)
  assert hurt == pytest.approx([0.5 - 0.5 / limit / 2, 0.5], abs=0.01)
  assert browser.current_url.endswith("Zo%C3%AB+%5BMASK%5D+%C3%9Cbermut%2C+then+%5BMASK%5D.")


def test_fill_needs_a_blank_and_a_button_puts_one(visit):
  browser = visit("#fill")
  press(browser, "Zoë ", Keys.ENTER)
  wait_for(browser, ".error")
  assert "There is no blank." in text(browser, ".error")
  browser.find_element("id", "mask").click()
  press(browser, " ate", Keys.ENTER)
  wait_for(browser, "#best")
  assert (
    browser.execute_script("return document.getElementById('text').value").replace(" ", "")
    == "Zoë[MASK]ate"
  )


@pytest.mark.parametrize(
  "server, address, title, detail",
  [
    (
      "away",
      "#ask=q",
      "The model server cannot be reached.",
      "No model server answers at http://localhost:",
    ),
    ("other", "#ask=q", "There is no such model.", "Servable not found for request: Latest(other)"),
    (
      "page",
      "#ask=refused",
      "The model cannot process this input.",
      '"answer" not found in signature def',
    ),
  ],
)
def test_errors(visit, server, address, title, detail):
  browser = visit(address, server=server)
  wait_for(browser, ".error")
  assert text(browser, ".error h2") == title and detail in text(browser, ".error p")
  assert browser.execute_script("return document.querySelector('.error').role") == "alert"
  assert not browser.execute_script("return document.body.classList.contains('busy')")
  if server != "page":
    wait_for(browser, "#server.down")


def test_the_newest_question_wins(visit):
  browser = visit("#ask=slow")
  wait_until(
    lambda: browser.execute_script("return document.body.classList.contains('busy')"), "busy"
  )
  assert text(browser, "#announcement") == "Searching …"
  browser.execute_script("location.hash = '#ask=slow+too'")
  # the first one has been cancelled silently
  browser.execute_async_script("setTimeout(arguments[0], 300)")
  assert (
    browser.execute_script("return document.body.classList.contains('busy')")
    and text(browser, ".error") is None
  )
  browser.execute_script("location.hash = '#ask=nothing'")
  wait_for(browser, ".best.none")
  browser.execute_async_script("setTimeout(arguments[0], 1700)")
  assert text(browser, "#best") is None and text(browser, ".best.none") is not None


def test_text_is_never_html(visit):
  browser = visit("#ask=inject")
  wait_for(browser, "#best")
  assert text(browser, "#best") == text(browser, "#passage-1 p") == INJECTION
  browser = visit(f"#fill={urllib.request.quote(INJECTION + ' [MASK]')}")
  wait_for(browser, "#best")
  assert text(browser, "#best") == INJECTION + " wrote"
  browser.execute_async_script("setTimeout(arguments[0], 300)")
  assert browser.execute_script(
    "return [window.owned ?? null, document.images.length, document.scripts.length]"
  ) == [None, 0, 1]


@pytest.mark.parametrize(
  "address",
  ["", "#ask=q", "#ask=inject", "#fill=Zo%C3%AB+%5BMASK%5D+%C3%9Cbermut", "#ask=" + "x" * 400],
)
def test_fits_a_phone(visit, address):
  browser = visit("")
  phone = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
  browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
  try:
    visit(address)
    wait_for(browser, "#results > *")
    width, inner = browser.execute_script(
      "return [document.documentElement.scrollWidth, innerWidth]"
    )
    assert width <= inner == 360, address
  finally:
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# =========================================================================================== server


def test_server_forwards_models_only_and_bounds_sizes(servers):
  def get(path: str, body: bytes | None = None, **headers: str):
    try:
      with urllib.request.urlopen(
        urllib.request.Request(servers["page"] + path, body, headers), timeout=10
      ) as response:
        return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
      return error.code, error.read(), error.headers

  status_code, body, headers = get("/v1/models/realm")
  assert status_code == 200 and json.loads(body)["model_version_status"][0]["version"] == "4"
  assert (
    "default-src 'none'" in headers["Content-Security-Policy"]
    and headers["X-Content-Type-Options"] == "nosniff"
  )
  assert [
    get(path)[0] for path in ("/v2/models/realm", "/style.css", "/../conftest.py", "/__main__.py")
  ] == [404, 200, 404, 404]
  assert get("/v1/models/realm:predict", b"x" * (1 << 20) + b"x")[0] == 413
  question = json.dumps({"signature_name": "answer", "instances": [{"question": "who?"}]}).encode()
  plain = get("/v1/models/realm:predict", question)
  packed = get("/v1/models/realm:predict", gzip.compress(question), **{"Content-Encoding": "gzip"})
  assert plain[0] == 200 and packed[:2] == plain[:2]
  assert ENCODINGS[-2:] == [None, "gzip"], "it is passed on as it came"


def test_says_once_that_the_model_server_is_not_up_and_then_that_it_is():
  port, rest_port = free_ports(2)
  command = [
    sys.executable,
    "-m",
    "serving.web",
    f"--rest=http://localhost:{rest_port}",
    f"--port={port}",
  ]
  process = subprocess.Popen(
    command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
  )
  try:
    line = process.stderr.readline()
    assert line.startswith(
      f"The page is ready, but the model is not: no model server answers at http://localhost:{rest_port}/v1/models/realm"
    ), line
    with pytest.raises(urllib.error.HTTPError) as error:
      urllib.request.urlopen(f"http://localhost:{port}/v1/models/realm", timeout=10)
    assert (
      error.value.code == 502 and "No model server answers at" in json.load(error.value)["error"]
    )
    time.sleep(1.5)  # polls again, and logs nothing new
    with rest_api(rest_port):
      assert process.stderr.readline() == "The model is ready.\n"
  finally:
    process.terminate()
    process.wait(20)


def test_port_in_use_is_one_clear_line():
  with socket.socket() as taken:
    taken.bind(("localhost", 0))
    taken.listen()
    command = [
      sys.executable,
      "-m",
      "serving.web",
      f"--port={taken.getsockname()[1]}",
      "--host=127.0.0.1",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
  assert (
    done.returncode == 1 and "Give another --port" in done.stderr and "Traceback" not in done.stderr
  ), done.stderr
