"""BUILD files, run as Bazel runs them: no file is missing, deps match imports, all is pinned.

A new file needs no entry. If a file imports another package, the failure says what to write.
"""

import ast
import dataclasses
import functools
import graphlib
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import types

import pytest
from packaging.requirements import Requirement

from benchmarks import environments
from tests import source_code
from tests.dependencies import distributions, normalised, pinned
from tests.source_code import PACKAGES, REPOSITORY

DOCKERFILE = (REPOSITORY / "deploy" / "Dockerfile").read_text()


@dataclasses.dataclass(frozen=True)
class Target:
  """A target as Bazel would see it.

  Attributes:
    rule: its function, as py_library.
    package: folder, "" for the root.
    attributes: as given, globs as lists of files.
  """

  rule: str
  package: str
  attributes: dict

  @property
  def label(self) -> str:
    return f"//{self.package}:{self.attributes['name']}"

  @property
  def deps(self) -> set[str]:
    """Full labels."""
    return {_full(label, self.package) for label in self.attributes.get("deps", ())}


def _full(label: str, package: str) -> str:
  if label.startswith(":"):
    return f"//{package}{label}"
  return label if ":" in label or label.startswith("@") else f"{label}:{label.rpartition('/')[2]}"


# ---------------------------------------------------------------------------------- what is written


def build_files() -> list[str]:
  """Folders that have a BUILD file, "" for the root."""
  found = [*REPOSITORY.glob("BUILD")]
  for package in (*PACKAGES, "deploy", "docs", "testdata"):
    found += (REPOSITORY / package).rglob("BUILD")
  return sorted(str(path.parent.relative_to(REPOSITORY)).removeprefix(".") for path in found)


def matches(file: str, patterns: list[str]) -> bool:
  """Whether one of Bazel's glob patterns matches: `**` is any number of folders."""
  words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
  return any(
    re.fullmatch(
      "".join(words.get(part) or re.escape(part) for part in re.split(r"(\*\*/|\*\*|\*)", pattern)),
      file,
    )
    for pattern in patterns
  )


def glob(folder: pathlib.Path, include, exclude=(), *, allow_empty: bool = False) -> list[str]:
  """Bazel's function of that name, in a folder."""
  files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
  found = sorted(file for file in files if matches(file, include) and not matches(file, exclude))
  assert found or allow_empty, f"{folder}/BUILD: no file matches {include}"
  return found


def targets_of(package: str) -> list[Target]:
  """Runs a BUILD file as Python, which is close enough to Starlark."""
  targets = []

  def rule(name):
    return lambda **attributes: targets.append(Target(name, package, attributes))

  def load(scope, label, *names):
    if label == "//:python.bzl":
      scope |= {name: value for name, value in run("python.bzl").items() if name in names}
    elif label == "@pypi//:requirements.bzl":
      scope["all_requirements"] = [f"@pypi//{name}" for name in pinned("requirements_lock.txt")]
    else:
      scope |= {name: rule(name) for name in names}

  def run(file):
    own_glob = functools.partial(glob, REPOSITORY / package)
    scope = {
      "exports_files": lambda names: [rule("exported")(name=name) for name in names],
      "filegroup": rule("filegroup"),
      "glob": own_glob,
      "native": types.SimpleNamespace(glob=own_glob, package_name=lambda: package),
    }
    scope["load"] = functools.partial(load, scope)
    exec(compile((REPOSITORY / file).read_text(), file, "exec"), scope)
    return scope

  run(f"{package}/BUILD".removeprefix("/"))
  return targets


@functools.cache
def written() -> tuple[Target, ...]:
  """The targets of all BUILD files."""
  return tuple(target for package in build_files() for target in targets_of(package))


def library(package: str) -> Target:
  (found,) = [
    target for target in written() if (target.rule, target.package) == ("py_library", package)
  ]
  return found


# ----------------------------------------------------------------------------------- what is wanted


def files(package: str) -> set[str]:
  """All files of a package and of what is below it, relative to it."""
  folder = REPOSITORY / package
  return {
    str(path.relative_to(folder))
    for path in folder.rglob("*")
    if path.is_file() and "__pycache__" not in path.parts and path.name != "BUILD"
  }


def unpinned(package: str) -> list[str]:
  """Imports of a package that no line of requirements.txt provides, each with what to pin.

  An unpinned package may only be imported inside the function that uses it. The peers of benchmarks
  run in environments of their own, and import what those pin.
  """
  own, found = set(pinned("requirements.txt")), []
  for name, tree in source_code.sources(package).items():
    peer = package == "benchmarks" and name.split(".")[-1].startswith("peer")
    first = source_code.imported(
      ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    )
    for module in sorted(first):
      top = module.split(".")[0]
      if top in sys.stdlib_module_names or top in PACKAGES:
        continue
      google = module.startswith("google.protobuf")
      names = ["protobuf"] if google else distributions().get(top, [])
      if peer and top in peer_packages() or {normalised(one) for one in names} & own:
        continue
      found.append(f"{package}.{name} imports {module} of {names or '(not installed)'}")
  return found


def peer_packages() -> set[str]:
  """Modules that the environments of the benchmarks' peers pin; faiss-cpu is imported as faiss."""
  pins = (pin for pins in environments.PINS.values() for pin in pins)
  return {normalised(Requirement(pin).name.removesuffix("-cpu")) for pin in pins}


@functools.cache
def wanted_deps(package: str) -> frozenset[str]:
  """Labels of our packages that the sources of a package import."""
  known = source_code.modules()
  names = {
    module.split(".")[0]
    for tree in source_code.sources(package).values()
    for module in source_code.own_imports(tree, known)
  }
  return frozenset(f"//{name}:{name}" for name in names - {package})


# -------------------------------------------------------------------------------------------- tests


def test_every_package_has_its_build_file():
  # None below: a folder with a BUILD file of its own is left out of the globs above it.
  assert set(build_files()) == {"", *PACKAGES}


@pytest.mark.parametrize("package", PACKAGES)
def test_library_holds_every_file(package):
  target = library(package)
  sources, data = set(target.attributes["srcs"]), set(target.attributes["data"])
  assert target.label == f"//{package}:{package}"
  assert sources == {file for file in files(package) if file.endswith(".py")}
  assert data == files(package) - sources  # such as web pages


@pytest.mark.parametrize("package", PACKAGES)
def test_deps_are_the_imports(package):
  got = {label for label in library(package).deps if not label.startswith("@pypi//")}
  if package == "tests":  # they start modules that they do not import
    assert got == {f"//{name}:{name}" for name in PACKAGES} - {"//tests:tests"}
  else:
    assert got == wanted_deps(package), f"{package}/BUILD should have these deps"


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_pinned(package):
  assert not unpinned(package), "pin these packages in requirements.txt"


def test_every_library_has_what_is_locked():
  for package in PACKAGES:
    got = {label for label in library(package).deps if label.startswith("@pypi//")}
    assert got == {f"@pypi//{name}" for name in pinned("requirements_lock.txt")}


def test_program_has_all_packages():
  """Tests `bazel run //:run -- realm_tf.pipeline`, which starts other commands."""
  (program,) = [target for target in written() if target.rule == "py_binary"]
  assert program.deps == library("tests").deps - {
    label for label in library("tests").deps if label.startswith("@pypi//")
  }
  done = subprocess.run(
    [sys.executable, "-m", program.attributes["main_module"], "serving.signatures"],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert done.stdout.startswith("# Signatures"), done.stderr


def test_every_label_exists():
  known = {target.label for target in written()}
  known |= {f"@pypi//{name}" for name in pinned("requirements_lock.txt")}
  for target in written():
    data = {label for label in target.attributes.get("data", ()) if label.startswith(("//", ":"))}
    assert target.deps | {_full(label, target.package) for label in data} <= known, target.label


def test_no_target_depends_on_itself():
  graph = graphlib.TopologicalSorter({target.label: target.deps for target in written()})
  assert list(graph.static_order())  # raises if there is a cycle


def test_every_test_runs_under_pytest():
  tests = {target.label: target for target in written() if target.rule == "py_test"}
  names = {file.removesuffix(".py") for file in files("tests") if file.endswith("_test.py")}
  assert set(tests) == {f"//tests:{name.replace('/', '_')}" for name in names}
  for name in names:
    target = tests[f"//tests:{name.replace('/', '_')}"]
    assert target.attributes["srcs"] == [f"{name}.py"]
    assert target.attributes["args"] == [f"tests/{name}.py"]
    assert target.attributes["main_module"] == "pytest"
    assert target.deps == {"//tests:tests"}


def test_module_reads_the_lock():
  """The hub `@pypi` is made from the file that the Makefile uses for constraints."""
  calls = {
    ast.unparse(node.func): {
      keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords
    }
    for node in ast.walk(ast.parse((REPOSITORY / "MODULE.bazel").read_text()))
    if isinstance(node, ast.Call)
  }
  assert calls["pip.parse"]["hub_name"] == "pypi"
  lock = calls["pip.parse"]["requirements_lock"]
  assert lock in {target.label for target in written() if target.rule == "exported"}
  assert (REPOSITORY / lock.removeprefix("//:")).is_file()
  versions = {calls[name]["python_version"] for name in ("pip.parse", "python.toolchain")}
  assert versions == {re.search(r"FROM python:(\d+\.\d+)", DOCKERFILE)[1]}


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
    todo += [
      one
      for one in parsed
      if not one.marker or any(one.marker.evaluate({"extra": extra}) for extra in extras)
    ]
  wanted_lines = {line.split("==")[0]: line for line in needed.values()}
  versions = {normalised(name): line.split("==")[1] for name, line in wanted_lines.items()}
  got = pinned("requirements_lock.txt")
  for name, version in pinned("requirements.txt").items():
    assert versions[name] == version, (
      f"requirements.txt pins {name}=={version}, but {versions[name]} is installed"
    )
  assert got == versions, "requirements_lock.txt should be\n" + "\n".join(
    sorted(wanted_lines.values(), key=str.lower)
  )


def test_buildifier_finds_nothing():
  found = shutil.which("buildifier") or next(
    iter(sorted(REPOSITORY.glob("node_modules/.bin/buildifier"))), None
  )
  if found is None:
    pytest.skip("no buildifier on PATH (npm install @bazel/buildifier)")
  paths = [
    REPOSITORY / "MODULE.bazel",
    REPOSITORY / "python.bzl",
    *(REPOSITORY / package / "BUILD" for package in build_files()),
  ]
  done = subprocess.run(
    [str(found), "-mode=check", "-lint=warn", *map(str, paths)],
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr + done.stdout
