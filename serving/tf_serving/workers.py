"""Threads that answer requests, with a limit on waiting requests."""

import asyncio
import math
import threading
from collections.abc import Callable
from concurrent import futures
from typing import TypeVar

import grpc
from absl import logging

from serving.tf_serving.status import StatusError, status_of

T = TypeVar("T")


class Workers:
  """Threads for requests that an event loop has read.

  Attributes:
    num_tasks: requests in progress or waiting.
  """

  def __init__(self, num_threads: int, *, max_waiting: int, name: str):
    """Args: number of threads; how many requests may wait for one; and the threads' name."""
    self.num_tasks = 0
    self._most = num_threads + max_waiting
    self._lock = threading.Lock()
    self._threads = futures.ThreadPoolExecutor(num_threads, thread_name_prefix=name)

  async def run(self, call: Callable[[], T], timeout_secs: float) -> T:
    """Runs a call in a thread; a call whose waiter has given up is not started.

    Raises:
      StatusError: raised by the call; RESOURCE_EXHAUSTED if too many wait; DEADLINE_EXCEEDED.
    """
    with self._lock:
      if self.num_tasks >= self._most:
        raise StatusError(
          grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests are waiting; try again later."
        )
      self.num_tasks += 1
    future = self._threads.submit(call)
    future.add_done_callback(self._forget)
    try:
      return await asyncio.wait_for(
        asyncio.wrap_future(future), timeout_secs if timeout_secs < math.inf else None
      )
    except StatusError:
      raise
    except TimeoutError:
      raise StatusError(
        grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer within {timeout_secs:g} s."
      ) from None
    except Exception as error:
      logging.exception("a request failed")
      raise status_of(error) from error

  def _forget(self, future: futures.Future) -> None:
    del future
    with self._lock:
      self.num_tasks -= 1
