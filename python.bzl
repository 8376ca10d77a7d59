"""Python targets: a library for each package and a test for each test file."""

load("@pypi//:requirements.bzl", "all_requirements")
load("@rules_python//python:defs.bzl", "py_library", "py_test")

PACKAGES = [
    "//beam_jobs",
    "//benchmarks",
    "//configs",
    "//quickstart_corpus",
    "//realm_tf",
    "//serving",
]

def python_package(name, deps = []):
    """A top-level package with all below it: its sources, and its web pages and the like as data.

    What is installed from PyPI is the same for all packages; pyproject.toml says who needs what of it.

    Args:
      name: of the package, which is its folder's.
      deps: packages of this repository that its sources import.
    """
    py_library(
        name = name,
        srcs = native.glob(["**/*.py"]),
        data = native.glob(["**"], exclude = ["**/*.py", "**/__pycache__/**", "BUILD"], allow_empty = True),
        visibility = ["//visibility:public"],
        deps = deps + all_requirements,
    )

def pytest_files(deps, data, manual):
    """A py_test for each `*_test.py` of the folder and those below it.

    Args:
      deps: of all tests.
      data: files that tests read besides those of packages.
      manual: tests that read the whole tree, which is no input of one target; `make test` runs them.
    """
    for file in native.glob(["**/*_test.py"]):
        name = file.removesuffix(".py").replace("/", "_")
        py_test(
            name = name,
            srcs = [file],
            args = [native.package_name() + "/" + file],
            data = data,
            main_module = "pytest",
            tags = ["manual"] if name in manual else [],
            deps = deps,
        )
