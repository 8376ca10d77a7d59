"""The wheel: its files, its metadata and its requirements."""

import ast
import email.message
import email.parser
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging import requirements, specifiers

from tests import dependencies, source_code
from tests.dependencies import normalised, pinned
from tests.source_code import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Package of the wheel → the extras that its commands may need besides the dependencies.
PACKAGES = {
  "realm_tf": ("scann", "tagger"),
  "beam_jobs": ("beam", "pdf", "tagger"),
  "serving": ("scann", "serving"),
  "configs": (),
  "quickstart_corpus": (),
}
# The modules that cannot be imported without an extra.
NEED_AN_EXTRA = {"realm_tf.train_tagger", "beam_jobs", "serving"}


def names(lines: list[str]) -> set[str]:
  """Normalised names of requirements, without this package."""
  found = {normalised(requirements.Requirement(line).name) for line in lines}
  return found - {"realm_tf"}


DEPENDENCIES = names(PROJECT["dependencies"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
  """The files that `pip install .` installs, as on workers and in images."""
  folder = tmp_path_factory.mktemp("wheel")
  source = folder / "source"
  for package in PACKAGES:
    shutil.copytree(
      REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__")
    )
  for file in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(REPOSITORY / file, source)
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "pip",
      "wheel",
      "--quiet",
      "--no-deps",
      "--no-build-isolation",
      f"--wheel-dir={folder}",
      str(source),
    ],
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert done.returncode == 0, done.stderr
  (path,) = folder.glob("*.whl")
  return path


def metadata(wheel: pathlib.Path) -> email.message.Message:
  with zipfile.ZipFile(wheel) as archive:
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return email.parser.Parser().parsestr(archive.read(name).decode())


def test_the_package_holds_every_file(wheel):
  with zipfile.ZipFile(wheel) as archive:
    got = {name for name in archive.namelist() if ".dist-info/" not in name}
    licenses = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert "Apache License" in archive.read(*licenses).decode()
  wanted = {
    str(path.relative_to(REPOSITORY))
    for package in PACKAGES
    for path in (REPOSITORY / package).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts and path.name != "BUILD"
  }
  assert got == wanted
  assert "realm_tf/py.typed" in got


def test_metadata(wheel):
  got = metadata(wheel)
  assert (got["Name"], got["Version"]) == ("realm-tf", PROJECT["version"])
  assert got["License-Expression"] == "Apache-2.0"
  assert set(got.get_all("Provides-Extra")) == set(EXTRAS)
  assert got["Description-Content-Type"] == "text/markdown"
  assert "Requires-Dist: tensorflow<2.21,>=2.20" in str(got)
  plain = [line for line in got.get_all("Requires-Dist") if "extra ==" not in line]
  assert names(plain) == DEPENDENCIES


def test_plain_install_brings_no_tests_and_no_cloud():
  unwanted = {
    name
    for name in DEPENDENCIES
    if name.startswith(("pytest", "selenium", "google", "apache", "grpcio", "import_linter"))
  }
  assert not unwanted
  assert not DEPENDENCIES & names([line for lines in EXTRAS.values() for line in lines])


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_installed(package):
  """The top of a module may import dependencies.

  Elsewhere, and in commands of an extra, the packages of the extra are allowed, too."""
  extra = names([line for name in PACKAGES[package] for line in EXTRAS[name]])
  for name, tree in source_code.sources(package).items():
    module = f"{package}.{name}"
    needs_one = bool({module, package} & NEED_AN_EXTRA)
    for node in ast.walk(tree):
      if isinstance(node, (ast.Import, ast.ImportFrom)):
        allowed = DEPENDENCIES | extra if needs_one or node not in tree.body else DEPENDENCIES
        for imported in source_code.imported(ast.Module([node], [])):
          found = distributions(imported)
          assert found is None or found & allowed, f"{module} imports {imported}: {allowed}"


def distributions(module: str) -> set[str] | None:
  """Returns the packages that provide a module: None if Python or this repository does."""
  top = module.split(".")[0]
  if top in sys.stdlib_module_names or top in source_code.PACKAGES:
    return None
  if module.startswith("google.protobuf"):
    return {"protobuf"}
  # A package that is not installed has the name of its module.
  return {normalised(one) for one in dependencies.distributions().get(top, [top])}


def test_ranges_hold_what_is_pinned():
  pins = pinned("requirements.txt")
  lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
  assert set(pins) <= names(lines), "each line of requirements.txt belongs to an extra"
  for line in lines:
    required = requirements.Requirement(line)
    pin = pins.get(normalised(required.name))
    assert pin is None or required.specifier.contains(pin), f"{line}, but {pin} is pinned"


def test_python_versions():
  versions = [
    line.rpartition(" ")[2] for line in PROJECT["classifiers"] if " :: Python :: 3." in line
  ]
  wanted = specifiers.SpecifierSet(PROJECT["requires-python"])
  assert versions == [f"3.{minor}" for minor in range(30) if wanted.contains(f"3.{minor}")]


def test_citation_names_version_and_paper():
  citation = (REPOSITORY / "CITATION.cff").read_text()
  assert f"\nversion: {PROJECT['version']}\n" in citation
  assert f"\nlicense: {PROJECT['license']}\n" in citation
  assert "REALM: Retrieval-Augmented Language Model Pre-Training" in citation
