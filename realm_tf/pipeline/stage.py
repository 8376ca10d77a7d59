"""A stage: one documented command, with its inputs, outputs and dependencies."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

from realm_tf import errors
from realm_tf.pipeline.plan import Plan
from realm_tf.storage import artifacts

PORT = "{port}"  # placeholder in a stage's command for its server's port
_TRAINERS_LEAVE = (
  r"(warmup/)?(metrics\.jsonl|refresh\.log|tensorboard/.*)"
  r"|indexes/refreshing\.json"
)


class ConfigError(errors.UserError):
  """The config gives no valid stages."""


@dataclasses.dataclass(frozen=True)
class Stage:
  """One command.

  Attributes:
    name: short name, also used in `summary.json`.
    command: a module and its flags.
    inputs: files, folders or patterns; if their content changes, the stage is out of date.
    outputs: artifacts and files that exist when the stage is done.
    folder: the folder or file that `--redo` deletes.
    settings: settings of the config that the result depends on, "section.name" → value; only
      trainers have any.
    differs: settings of this stage only, which override the config's.
    server: a second command that runs while the stage does and writes its port to --port_file.
    leaves: regular expression of the files below `folder` that the command writes outside of
      artifacts.
    advice: what to do instead of making the outputs anew; ends an error message.
  """

  name: str
  command: Sequence[str]
  inputs: Sequence[str]
  outputs: Sequence[str]
  folder: str
  settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
  differs: Mapping[str, object] = dataclasses.field(default_factory=dict)
  server: Sequence[str] = ()
  leaves: str = ""
  advice: str = ""


def trainer(
  plan: Plan,
  module: str,
  *,
  name: str,
  workdir: str,
  inputs: Sequence[str],
  outputs: Sequence[str],
  sections: Sequence[str],
  differs: Mapping[str, object] | None = None,
) -> Stage:
  """Returns a stage that trains.

  Args:
    plan: plan of the run.
    module: the trainer's module in realm_tf.
    name: see `Stage`.
    workdir: workdir of the trainer.
    inputs: see `Stage`.
    outputs: see `Stage`.
    sections: sections of the config, and settings outside sections, that the result depends on.
    differs: see `Stage`.
  """
  changed = {**plan.overrides, **(differs or {})}
  return Stage(
    name,
    (
      f"realm_tf.{module}",
      f"--config={plan.config_path}",
      *(f"--config.{path}={value}" for path, value in changed.items()),
      f"--workdir={workdir}",
    ),
    inputs=inputs,
    outputs=outputs,
    folder=workdir,
    settings={
      path: value for path, value in plan.settings.items() if path.partition(".")[0] in sections
    },
    differs=differs or {},
    leaves=_TRAINERS_LEAVE,
  )


def preset_folders(plan: Plan) -> list[str]:
  """Returns the folders of published encoders; a preset without a folder is only a setting."""
  return [preset for preset in plan.presets if artifacts.gfile.exists(preset)]


def snapshot(workdir: str, steps: int) -> str:
  """Returns the snapshot that a trainer writes after `steps` steps."""
  return artifacts.step_folder(os.path.join(workdir, "snapshots"), steps)


def index(workdir: str, steps: int) -> str:
  """Returns the index of that snapshot."""
  return artifacts.step_folder(os.path.join(workdir, "indexes"), steps)
