"""Every name in conftest.py's list of slow tests is that of a test."""

import ast

from tests.conftest import SLOW
from tests.source_code import sources


def test_every_slow_name_begins_a_test():
  names = {
    f"{file.rpartition('.')[2]}.py::{node.name}"
    for file, tree in sources("tests").items()
    if file.endswith("_test")
    for node in tree.body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
  }
  unknown = [name for name in SLOW if not any(test.startswith(name) for test in names)]
  assert not unknown and len(names) > 600, unknown
