"""Helpers for tests of the web page in a browser."""

from selenium import webdriver

from tests.processes import wait_until


def text(browser, selector: str) -> str:
  return browser.execute_script(
    "return document.querySelector(arguments[0])?.textContent ?? null", selector
  )


def texts(browser, selector: str) -> list[str]:
  return browser.execute_script(
    "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector
  )


def press(browser, *keys: str) -> None:
  """Types into the focused element, as a user does.

  Waits for the page's first paint, because Chromium drops keys that are pressed before it.
  """
  painted = "return performance.getEntriesByType('paint').length > 0"
  wait_until(lambda: browser.execute_script(painted), "the page's first paint")
  webdriver.ActionChains(browser).send_keys(*keys).perform()


def wait_for(browser, selector: str) -> None:
  wait_until(lambda: text(browser, selector) is not None, selector)
