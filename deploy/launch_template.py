"""What a Dataflow flex template's launcher starts.

Splits its parameters into a job's own flags and Beam's, and runs the job.

The launcher wants the job submitted, not waited for; the last step of a job publishes its folder,
wherever that runs.
"""

import json
import os
import sys

METADATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "template_metadata.json")


def command(arguments: list[str]) -> list[str]:
  """Arguments of python for what the launcher was given.

  That is `--name=value` of template_metadata.json and of Beam.
  """
  with open(METADATA, encoding="utf-8") as file:
    known = {parameter["name"] for parameter in json.load(file)["parameters"]}

  def name_of(argument):
    return argument.partition("=")[0].removeprefix("--")

  (job,) = [argument.partition("=")[2] for argument in arguments if name_of(argument) == "job"]
  own = [argument for argument in arguments if name_of(argument) in known - {"job"}]
  beam = [argument for argument in arguments if name_of(argument) not in known]
  return ["-m", f"beam_jobs.{job}", *own, "--", *beam, "--no_wait_until_finish"]


if __name__ == "__main__":
  os.execv(sys.executable, [sys.executable, *command(sys.argv[1:])])
