"""Serves the web page and passes its calls on to the REST API of a model server.

    python -m serving.web --rest=http://localhost:8501 --port=8080      # then open http://localhost:8080

The page is static; TensorFlow Serving sends no CORS headers unless told to (--rest_api_enable_cors_support), so a browser lets
the page call it only through its own origin. A model server that is not up yet is waited for: standard error and the page say so.
"""

import asyncio
import html
import pathlib
import sys

import aiohttp
from absl import app, flags
from aiohttp import web

from serving import signatures

_FOLDER = pathlib.Path(__file__).parent
_FILES = {"/": ("index.html", "text/html"), "/style.css": ("style.css", "text/css"), "/app.js": ("app.js", "text/javascript")}
_SESSION = web.AppKey("session", aiohttp.ClientSession)
_LOOK_SECS = 1.0  # between two looks at a model server that is not ready
_MAX_REQUEST_BYTES, _MAX_RESPONSE_BYTES = 1 << 20, 32 << 20
_HEADERS = {  # the page loads nothing from elsewhere, and nothing in a passage can make it
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


def make_app(rest: str, *, model_name: str = signatures.MODEL_NAME, timeout_secs: float = 30.0) -> web.Application:
  """The page at /, and the REST API at `rest` below /v1/models/.

  Args:
    rest: URL of the model server, without /v1.
    model_name: the model that the page asks.
    timeout_secs: for one call of the model server.
  """
  async def file(request: web.Request) -> web.Response:
    name, content_type = _FILES[request.path]
    text = (_FOLDER / name).read_text(encoding="utf-8")
    if name == "index.html":
      text = text.replace(f'data-model="{signatures.MODEL_NAME}"', f'data-model="{html.escape(model_name)}"')
    return web.Response(text=text, content_type=content_type)

  async def forward(request: web.Request) -> web.Response:
    try:
      async with request.app[_SESSION].request(
          request.method, rest.rstrip("/") + request.rel_url.raw_path_qs, data=await request.read(),
          headers={"Content-Type": "application/json"}, allow_redirects=False) as response:
        body = bytearray()
        async for chunk in response.content.iter_chunked(1 << 16):
          body += chunk
          if len(body) > _MAX_RESPONSE_BYTES:
            return _error(502, f"The model server answered more than {_MAX_RESPONSE_BYTES >> 20} MiB.")
        return web.Response(status=response.status, body=bytes(body), content_type="application/json")
    except TimeoutError:
      return _error(504, f"The model server at {rest} gave no answer within {timeout_secs:g} s.")
    except aiohttp.ClientError as error:
      name = type(error).__name__
      return _error(502, f"No model server answers at {rest} ({name}). Start it, or give its address with --rest.")

  async def session(application: web.Application):
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_secs)) as application[_SESSION]:
      watching = asyncio.create_task(
        _say_when_ready(application[_SESSION], f"{rest.rstrip('/')}/v1/models/{model_name}")
      )
      yield
      watching.cancel()

  async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    del request
    response.headers.update(_HEADERS)

  application = web.Application(client_max_size=_MAX_REQUEST_BYTES)
  application.cleanup_ctx.append(session)
  application.on_response_prepare.append(add_headers)
  application.router.add_routes([web.get(path, file) for path in _FILES])
  application.router.add_get("/v1/models/{call:.+}", forward)
  application.router.add_post("/v1/models/{call:.+}", forward)
  return application


async def _say_when_ready(session: aiohttp.ClientSession, url: str) -> None:
  """Says once on standard error that the model server is not ready, and then when it is; the page shows the same."""
  waits = False
  while reason := await _not_ready(session, url):
    if not waits:
      print(
        f"The page is up, the model is not: {reason} Waiting for it ..", file=sys.stderr, flush=True
      )
    waits = True
    await asyncio.sleep(_LOOK_SECS)
  if waits:
    print("The model answers.", file=sys.stderr, flush=True)


async def _not_ready(session: aiohttp.ClientSession, url: str) -> str | None:
  """Why a model does not answer; None if it does."""
  try:
    async with session.get(url) as response:
      if response.status == 200:
        return None
      body = await response.json(content_type=None)
      return (
        f"{url}: {body['error'] if isinstance(body, dict) and 'error' in body else response.status}"
      )
  except (TimeoutError, ValueError, aiohttp.ClientError) as error:
    return f"no model server answers at {url} ({type(error).__name__})."


def _error(status: int, words: str) -> web.Response:
  """In TensorFlow Serving's form."""
  return web.json_response({"error": words}, status=status)


def main(argv):
  del argv
  args = flags.FLAGS
  application = make_app(args.rest, model_name=args.model_name, timeout_secs=args.timeout_secs)
  try:
    web.run_app(application, host=args.host, port=args.port, access_log=None)
  except OSError as error:
    sys.exit(f"{error}. Give another --port or --host.")


if __name__ == "__main__":
  flags.DEFINE_string("rest", f"http://localhost:{signatures.REST_PORT}", "Model server's REST API.")
  flags.DEFINE_string("model_name", signatures.MODEL_NAME, "Model to ask.")
  flags.DEFINE_string("host", "localhost", "Address to listen at; 0.0.0.0 lets other machines in.")
  flags.DEFINE_integer("port", 8080, "Port of the page.", lower_bound=0, upper_bound=65535)
  flags.DEFINE_float("timeout_secs", 30.0, "Time for one call of the model server.", lower_bound=0.001)
  app.run(main)
