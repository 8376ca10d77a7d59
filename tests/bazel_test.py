"""BUILD files say what the sources import: every file in one target, its deps its imports, every package pinned.

Whoever adds a file or an import is told the target to write.
"""

import ast
import dataclasses
import functools
import graphlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from tests import imports_test

REPOSITORY = imports_test.REPOSITORY
RULES = ("py_library", "py_binary", "py_test")


@dataclasses.dataclass(frozen=True)
class Target:
  """A Python target.

  Attributes:
    rule: one of RULES.
    package: folder, "" for the root.
    src: its one file, relative to the repository.
    deps: full labels.
    attributes: all, as written.
  """

  rule: str
  package: str
  name: str
  src: str
  deps: frozenset[str]
  attributes: dict = dataclasses.field(default_factory=dict, compare=False)

  @property
  def label(self) -> str:
    return f"//{self.package}:{self.name}"

  def __str__(self) -> str:
    """As it stands in a BUILD file."""
    buildifier_order = lambda label: (":/@".index(label[0]), label.replace(":", "!"))
    deps = sorted((_short(label, self.package) for label in self.deps), key=buildifier_order)
    values = {"name": self.name, "srcs": [os.path.basename(self.src)]}
    if self.rule == "py_test":
      values |= {"args": [self.src], "main_module": "pytest"}
    lines = [f"    {name} = {_quoted(value)}," for name, value in (values | {"deps": deps}).items() if value]
    return "\n".join([f"{self.rule}(", *lines, ")"])


def _quoted(value) -> str:
  if isinstance(value, str):
    return f'"{value}"'
  if len(value) == 1:
    return f'["{value[0]}"]'
  return "\n".join(["[", *(f'        "{one}",' for one in value), "    ]"])


def _short(label: str, package: str) -> str:
  where, _, name = label.partition(":")
  if where == f"//{package}":
    return f":{name}"
  return where if where.endswith(f"/{name}") else label


def _full(label: str, package: str) -> str:
  if label.startswith(":"):
    return f"//{package}{label}"
  return label if ":" in label or label.startswith("@") else f"{label}:{label.rpartition('/')[2]}"


# ----------------------------------------------------------------------------------------------------- what is written


@functools.cache
def build_files() -> dict[str, list[ast.Call]]:
  """Package → its rules, in order."""
  found = {}
  below = [path for package in imports_test.PACKAGES for path in (REPOSITORY / package).rglob("BUILD")]
  for path in [REPOSITORY / "BUILD", *below]:
    body = ast.parse(path.read_text()).body
    package = str(path.parent.relative_to(REPOSITORY)).removeprefix(".")
    found[package] = [node.value for node in body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
  return found


@functools.cache
def written() -> tuple[Target, ...]:
  """The Python targets of all BUILD files."""
  targets = []
  for package, calls in build_files().items():
    for call in calls:
      if call.func.id in RULES:
        attributes = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        (src,) = attributes["srcs"]
        deps = frozenset(_full(label, package) for label in attributes.get("deps", ()))
        targets.append(Target(call.func.id, package, attributes["name"], os.path.join(package, src), deps, attributes))
  return tuple(targets)


# ------------------------------------------------------------------------------------------------------ what is wanted


@functools.cache
def files() -> dict[str, str]:
  """Module → its file."""
  found = {}
  for package in imports_test.PACKAGES:
    for path in sorted((REPOSITORY / package).rglob("*.py")):
      file = str(path.relative_to(REPOSITORY))
      found[file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")] = file
  return found


def rule_of(file: str) -> str:
  if file.endswith("_test.py"):
    return "py_test"
  starts = '__name__ == "__main__"' in (REPOSITORY / file).read_text() or file.endswith("__main__.py")
  return "py_binary" if starts else "py_library"


def label_of(module: str) -> str:
  folder, name = os.path.split(files()[module])
  return f"//{folder}:{os.path.basename(folder) if name == '__init__.py' else name.removesuffix('.py')}"


def pinned(file: str) -> dict[str, str]:
  """Normalised name → version of a requirements file."""
  lines = (REPOSITORY / file).read_text().splitlines()
  pins = (line.split("==") for line in lines if line and not line.startswith("#"))
  return {normalised(name): version for name, version in pins}


def normalised(name: str) -> str:
  return re.sub(r"[-_.]+", "_", name).lower()


@functools.cache
def distributions() -> dict[str, list[str]]:
  return dict(importlib.metadata.packages_distributions())


def pypi_labels(file: str, tree: ast.Module) -> set[str]:
  """Labels of the packages that a source imports from PyPI; what is not pinned may only be imported where it is used."""
  labels = set()
  first = imports_test.imported(ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], []))
  for name in imports_test.imported(tree):
    top = name.split(".")[0]
    if top in sys.stdlib_module_names or top in imports_test.PACKAGES:
      continue
    found = ["protobuf"] if name.startswith("google.protobuf") else distributions().get(top, [])
    known = [normalised(one) for one in found if normalised(one) in pinned("requirements.txt")]
    if not known and name not in first:
      continue  # whoever wants it installs it
    assert known, f"{file} imports {name}: pin its package {' or '.join(found) or '(not installed)'} in requirements.txt"
    labels.add(f"@pypi//{known[0]}")
  return labels


@functools.cache
def wanted() -> dict[str, Target]:
  """File → the target that it should have."""
  targets, known = {}, set(files())
  for module, file in files().items():
    tree = ast.parse((REPOSITORY / file).read_text())
    folder, own = os.path.dirname(file), label_of(module)
    deps = {label_of(name) for name in imports_test.own_imports(tree, known)} | pypi_labels(file, tree)
    package = folder.replace("/", ".")
    if module != package and package in files():
      deps.add(label_of(package))
    elif "." in package:
      deps.add(label_of(package.rpartition(".")[0]))
    rule = rule_of(file)
    if rule != "py_library":
      deps |= {label_of(name) for name in started_programs(tree)}
    if rule == "py_test":
      deps |= {"//tests:conftest", "@pypi//pytest", "@pypi//pytest_timeout"}
    targets[file] = Target(rule, folder, own.rpartition(":")[2], file, frozenset(deps - {own}))
  return targets


def started_programs(tree: ast.Module) -> set[str]:
  """Our programs that a source names in a string, to start them with `python -m`."""
  named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
  programs = {module.removesuffix(".__main__"): module for module, file in files().items() if rule_of(file) == "py_binary"}
  return {programs[name] for name in named & set(programs)}


# --------------------------------------------------------------------------------------------------------------- tests


def test_every_file_has_one_target_with_its_imports_as_deps():
  got = {}
  for target in written():
    assert target.src not in got, f"{target.src} stands in {got[target.src].label} and in {target.label}"
    got[target.src] = target
  programs = {target.label for target in wanted().values() if target.rule == "py_binary"}
  wrong = []
  for file, target in wanted().items():
    now = got.pop(file, None)
    # A program may be a dep although nothing imports it: what is started under a name that is put together.
    if (now is None or dataclasses.replace(now, deps=target.deps) != target
        or not target.deps <= now.deps <= target.deps | programs):
      wrong.append(f"{target.package}/BUILD should have\n\n{target}\n")
  wrong += [f"{target.label}: there is no {file}; delete it" for file, target in got.items()]
  print(f"{len(wanted())} files in {len(build_files())} packages, {sum(len(target.deps) for target in written())} deps")
  assert not wrong, "\n".join(wrong)


def test_no_target_depends_on_itself():
  graph = graphlib.TopologicalSorter({target.label: target.deps for target in written()})
  order = list(graph.static_order())
  print(f"{len(order)} targets and packages; the last one to build is {order[-1]}")


def test_every_test_runs_under_pytest():
  for target in written():
    if target.rule == "py_test":
      assert (target.attributes["main_module"], target.attributes["args"]) == ("pytest", [target.src]), target.label


def test_every_other_file_is_data_of_its_package():
  """Web pages and the like."""
  for package in imports_test.PACKAGES:
    for path in (REPOSITORY / package).rglob("*"):
      file = path.relative_to(REPOSITORY)
      if path.is_file() and path.suffix not in (".py", ".pyc") and path.name != "BUILD" and "__pycache__" not in file.parts:
        data = {name for target in written() if target.package == str(file.parent) for name in target.attributes.get("data", ())}
        assert path.name in data, f'{file}: add data = ["{path.name}"] to the target in {file.parent}/BUILD that reads it'


def test_lock_is_all_that_requirements_need():
  """pip.parse installs what is in requirements_lock.txt and nothing else."""
  needed, todo = {}, [Requirement(name) for name in pinned("requirements.txt")]
  while todo:
    requirement = todo.pop()
    extras = requirement.extras or {""}
    key = normalised(requirement.name), tuple(sorted(extras))
    if key in needed:
      continue
    found = importlib.metadata.distribution(requirement.name)
    needed[key] = f"{found.metadata['Name']}=={found.version}"
    parsed = [Requirement(one) for one in found.requires or ()]
    todo += [one for one in parsed if not one.marker or any(one.marker.evaluate({"extra": extra}) for extra in extras)]
  wanted_lines = {line.split("==")[0]: line for line in needed.values()}
  versions = {normalised(name): line.split("==")[1] for name, line in wanted_lines.items()}
  got = pinned("requirements_lock.txt")
  print(f"{len(pinned('requirements.txt'))} packages need {len(versions)}")
  for name, version in pinned("requirements.txt").items():
    assert versions[name] == version, f"requirements.txt pins {name}=={version}, installed is {versions[name]}"
  assert got == versions, "requirements_lock.txt should be\n" + "\n".join(sorted(wanted_lines.values(), key=str.lower))


def test_buildifier_finds_nothing():
  found = shutil.which("buildifier") or next(iter(sorted(REPOSITORY.glob("node_modules/.bin/buildifier"))), None)
  if found is None:
    pytest.skip("no buildifier on PATH (npm install @bazel/buildifier)")
  paths = [REPOSITORY / "MODULE.bazel", *(REPOSITORY / package / "BUILD" for package in build_files())]
  done = subprocess.run([str(found), "-mode=check", "-lint=warn", *map(str, paths)], capture_output=True, text=True, timeout=60)
  print(f"buildifier read {len(paths)} files {done.stdout}{done.stderr}")
  assert done.returncode == 0, done.stderr + done.stdout
