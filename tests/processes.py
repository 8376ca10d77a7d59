"""What tests of real processes share: waiting, and ports."""

import contextlib
import os
import socket
import time
from collections.abc import Callable

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def wait_until(condition: Callable[[], bool], what: str, *, timeout_secs: float = 60) -> None:
  """Returns when the condition holds; fails when it does not in time."""
  deadline = time.monotonic() + timeout_secs
  while not condition():
    assert time.monotonic() < deadline, f"{what} did not appear in {timeout_secs} s"
    time.sleep(0.002)


def free_ports(number: int) -> list[int]:
  """Different ports of the loopback interface that nobody listens on."""
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
    return [one.getsockname()[1] for one in sockets]


def is_listening(port: int) -> bool:
  """Whether somebody accepts connections on a port of the loopback interface."""
  with socket.socket() as client:
    return client.connect_ex(("127.0.0.1", port)) == 0
