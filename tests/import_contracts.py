"""A contract for import-linter beside its own: commands are on top."""

import pathlib

import grimp
from importlinter import Contract, ContractCheck, fields, output
from importlinter.application import contract_utils

REPOSITORY = pathlib.Path(__file__).parents[1]


def is_command(module: str) -> bool:
  """Whether `python -m MODULE` is meant to be run: its source asks for `__main__`."""
  if module.endswith(".__main__"):
    return True
  path = REPOSITORY / f"{module.replace('.', '/')}.py"
  return path.is_file() and '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8")


class CommandsOnTop(Contract):
  """Forbids importing a command, so code that two commands share is in a module below both.

  Commands are found in the sources: a new one needs no line in pyproject.toml.

  Attributes:
    ignore_imports: exceptions, as in import-linter's own contracts. One that matches no import is
      an error.
  """

  ignore_imports = fields.SetField(subfield=fields.ImportExpressionField(), required=False)

  def check(self, graph: grimp.ImportGraph, verbose: bool) -> ContractCheck:
    """Collects the imports of commands that remain when the exceptions are removed."""
    warnings = contract_utils.remove_ignored_imports(
      graph, self.ignore_imports, contract_utils.AlertLevel.ERROR
    )
    found = [
      f"{importer} imports {module}"
      for module in sorted(filter(is_command, graph.modules))
      for importer in sorted(graph.find_modules_that_directly_import(module))
    ]
    return ContractCheck(kept=not found, warnings=warnings, metadata={"found": found})

  def render_broken_contract(self, check: ContractCheck) -> None:
    """Prints each import of a command."""
    for line in check.metadata["found"]:
      output.print_error(line, bold=False)
