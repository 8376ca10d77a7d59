"""Serves the web page and forwards its calls to the REST API of a model server.

    python -m serving.web --rest=http://localhost:8501 --port=8080      # then open http://localhost:8080

The page is static. TensorFlow Serving sends no CORS headers by default
(--rest_api_enable_cors_support), so browsers let the page call it only through the page's own
origin. If the model server is not ready yet, the program waits for it; standard error and the page
say so.
"""

import asyncio
import dataclasses
import html
import ipaddress
import pathlib
import re
import sys
import urllib.parse
from collections.abc import Awaitable, Callable, Collection

from absl import flags

from realm_tf import cli
from serving import signatures

if __name__ == "__main__":
  flags.DEFINE_string(
    "rest", f"http://localhost:{signatures.REST_PORT}", "URL of the model server's REST API."
  )
  flags.DEFINE_string("model_name", signatures.MODEL_NAME, "Name of the model to query.")
  flags.DEFINE_string(
    "host", "localhost", "Address to listen on; 0.0.0.0 gives other machines access."
  )
  flags.DEFINE_integer("port", 8080, "Port of the page.", lower_bound=0, upper_bound=65535)
  flags.DEFINE_float(
    "timeout_secs", 30.0, "Time limit of a call to the model server.", lower_bound=0.001
  )
  flags.DEFINE_list(
    "allowed_hosts",
    [],
    "Host names, in addition to localhost and --host, under which browsers may open the page.",
  )
  cli.start("serving.web.__main__", tensorflow=False)

import aiohttp
import yarl
from aiohttp import web

from serving.tf_serving import http_log

_FOLDER = pathlib.Path(__file__).parent
_FILES = {
  "/": ("index.html", "text/html"),
  "/style.css": ("style.css", "text/css"),
  "/app.js": ("app.js", "text/javascript"),
}
_CALL = re.compile(
  r"/v1/models/(?P<name>[^/:]+)(?:/versions/[0-9]+|/labels/(?P<label>[^/:]+))?"
  r"(?:/metadata|:(?:predict|classify|regress))?"
)
_SESSION = web.AppKey("session", aiohttp.ClientSession)
_MAX_IDLE_SECS = 75.0  # of a connection, or while a request's headers are incomplete
_LOOK_SECS = 1.0  # between two checks of a model server that is not ready
_MAX_REQUEST_BYTES, _MAX_RESPONSE_BYTES = 1 << 20, 32 << 20
_PASSED_ON = ("Content-Encoding",)
_HEADERS = {  # the page loads nothing from other sites, and no passage can make it do so
  "Content-Security-Policy": (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
  ),
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
  "Cache-Control": "no-cache",
}


@dataclasses.dataclass(frozen=True)
class _Page:
  """The page, and the calls that it forwards; the attributes are the arguments of `make_app`."""

  rest: str
  model_name: str
  timeout_secs: float
  host: str
  allowed_hosts: Collection[str]

  async def file(self, request: web.Request) -> web.Response:
    name, content_type = _FILES[request.path]
    text = (_FOLDER / name).read_text(encoding="utf-8")
    if name == "index.html":
      text = text.replace(
        f'data-model="{signatures.MODEL_NAME}"', f'data-model="{html.escape(self.model_name)}"'
      )
    return web.Response(text=text, content_type=content_type)

  async def forward(self, request: web.Request) -> web.Response:
    path = request.rel_url.raw_path
    if not is_call(path):
      return _error(404, "This path is not a call to a model.")
    try:
      async with asyncio.timeout(self.timeout_secs):
        content = await request.read()
    except TimeoutError:
      return _error(408, f"The request did not arrive within {self.timeout_secs:g} s.")
    try:
      async with request.app[_SESSION].request(
        request.method,
        yarl.URL(self.rest.rstrip("/") + path, encoded=True),  # otherwise `..` would be resolved
        data=content,  # compressed if it came so: the model server has a limit for what it unpacks
        headers={
          "Content-Type": "application/json",
          **{name: request.headers[name] for name in _PASSED_ON if name in request.headers},
        },
        allow_redirects=False,
      ) as response:
        body = bytearray()
        async for chunk in response.content.iter_chunked(1 << 16):
          body += chunk
          if len(body) > _MAX_RESPONSE_BYTES:
            return _error(
              502, f"The model server's answer exceeds {_MAX_RESPONSE_BYTES >> 20} MiB."
            )
        return web.Response(
          status=response.status, body=bytes(body), content_type="application/json"
        )
    except TimeoutError:
      return _error(
        504, f"The model server at {self.rest} gave no answer within {self.timeout_secs:g} s."
      )
    except aiohttp.ClientError as error:
      name = type(error).__name__
      return _error(
        502,
        f"No model server answers at {self.rest} ({name}). Start it, or set --rest to its address.",
      )

  async def session(self, application: web.Application):
    async with aiohttp.ClientSession(
      timeout=aiohttp.ClientTimeout(total=self.timeout_secs)
    ) as application[_SESSION]:
      watching = asyncio.create_task(
        _say_when_ready(
          application[_SESSION], f"{self.rest.rstrip('/')}/v1/models/{self.model_name}"
        )
      )
      yield
      watching.cancel()

  @web.middleware
  async def refuse_strangers(
    self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
  ) -> web.StreamResponse:
    authority = request.headers.get("Host", "")
    name = _host_name(f"//{authority}")
    if not _is_known(name, host=self.host, allowed_hosts=self.allowed_hosts):
      return _error(403, "The page is not served under this host name; see --allowed_hosts.")
    origin = request.headers.get("Origin")
    if origin not in (None, f"http://{authority}", f"https://{authority}"):
      return _error(403, "Pages of other origins may not call this one.")
    return await handler(request)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
  del request
  response.headers.update(_HEADERS)


def make_app(
  rest: str,
  *,
  model_name: str = signatures.MODEL_NAME,
  timeout_secs: float = 30.0,
  host: str = "localhost",
  allowed_hosts: Collection[str] = (),
) -> web.Application:
  """Makes an application with the page at / and the REST API of `rest` under /v1/models/.

  Args:
    rest: URL of the model server, without /v1.
    model_name: the model that the page queries.
    timeout_secs: time limit of a call to the model server.
    host: the address on which the application listens.
    allowed_hosts: host names, in addition to localhost and `host`, under which browsers may open
      the page.
  """
  page = _Page(rest, model_name, timeout_secs, host, allowed_hosts)
  application = web.Application(
    client_max_size=_MAX_REQUEST_BYTES, middlewares=[page.refuse_strangers]
  )
  application.cleanup_ctx.append(page.session)
  application.on_response_prepare.append(_add_headers)
  application.router.add_routes([web.get(path, page.file) for path in _FILES])
  application.router.add_get("/v1/models/{call:.+}", page.forward)
  application.router.add_post("/v1/models/{call:.+}", page.forward)
  return application


def is_call(path: str) -> bool:
  """Returns whether a raw path is a call to a model; nothing else is forwarded."""
  match = _CALL.fullmatch(path)
  if not match:
    return False
  names = [urllib.parse.unquote(name) for name in match.groups() if name]
  return not any(name in (".", "..") or re.search(r"[/\\\0]", name) for name in names)


def _host_name(url: str) -> str:
  """Returns the host in a URL, or "" if it has none."""
  try:
    return urllib.parse.urlsplit(url).hostname or ""
  except ValueError:
    return ""


def _is_known(name: str, *, host: str, allowed_hosts: Collection[str]) -> bool:
  """Returns whether the page may be opened under a host name.

  Another site can make its name resolve to this machine, and would then have the same origin as
  this page (DNS rebinding). It cannot do that with an address.
  """
  if name in ("localhost", host.lower(), *map(str.lower, allowed_hosts)):
    return True
  try:
    address = ipaddress.ip_address(name)
  except ValueError:
    return False
  return address.is_loopback or not _is_loopback(host)


def _is_loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


async def _say_when_ready(session: aiohttp.ClientSession, url: str) -> None:
  """Reports on standard error, once, that the model server is not ready, and when it becomes ready.

  The page shows the same.
  """
  waits = False
  while reason := await _not_ready(session, url):
    if not waits:
      print(
        f"The page is ready, but the model is not: {reason} Waiting for it ..",
        file=sys.stderr,
        flush=True,
      )
    waits = True
    await asyncio.sleep(_LOOK_SECS)
  if waits:
    print("The model is ready.", file=sys.stderr, flush=True)


async def _not_ready(session: aiohttp.ClientSession, url: str) -> str | None:
  """Returns why a model does not answer, or None if it does."""
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
  """Returns an error in TensorFlow Serving's format."""
  return web.json_response({"error": words}, status=status)


def main(argv):
  del argv
  args = flags.FLAGS
  application = make_app(
    args.rest,
    model_name=args.model_name,
    timeout_secs=args.timeout_secs,
    host=args.host,
    allowed_hosts=args.allowed_hosts,
  )
  try:
    http_log.leave_out_strangers()
    web.run_app(
      application,
      host=args.host,
      port=args.port,
      access_log=None,
      keepalive_timeout=_MAX_IDLE_SECS,
      auto_decompress=False,
    )
  except OSError as error:
    sys.exit(f"{error}. Give another --port or --host.")
