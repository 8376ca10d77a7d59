"""The repository's own sources, parsed: what they import and the flags that they define."""

import ast
import functools
import pathlib

from serving.tf_serving import server_flags

REPOSITORY = pathlib.Path(__file__).parents[1]
PACKAGES = (
  "realm_tf",
  "beam_jobs",
  "serving",
  "configs",
  "quickstart_corpus",
  "benchmarks",
  "tests",
)


@functools.cache
def sources(package: str) -> dict[str, ast.Module]:
  """Module name without the package → its parsed source."""
  root = REPOSITORY / package
  return {
    ".".join(path.relative_to(root).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(root.rglob("*.py"))
  }


@functools.cache
def modules() -> set[str]:
  return {
    f"{package}.{name}".removesuffix(".__init__")
    for package in PACKAGES
    for name in sources(package)
  }


def imported(tree: ast.Module) -> set[str]:
  """Returns all modules that a source imports anywhere, also in functions, as dotted names."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"relative import of {node.module}"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def own_imports(tree: ast.Module, known: set[str]) -> set[str]:
  """Those of our packages: `from configs.paper import get_config` counts as configs.paper."""
  found = set()
  for name in imported(tree):
    if name.split(".")[0] in PACKAGES:
      found.add(name if name in known else name.rpartition(".")[0])
  return found


def flags_of(program: str) -> set[str]:
  """Returns the names of the flags that a program defines."""
  if program == "serving/model_server.py":
    values = server_flags.flags.FlagValues()
    server_flags.define(values)
    return set(values)
  tree = ast.parse((REPOSITORY / program).read_text())
  return {
    node.args[0].value
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
    and isinstance(node.func, ast.Attribute)
    and node.func.attr.startswith("DEFINE_")
  }
