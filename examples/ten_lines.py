"""Asks the trained quickstart: `make quickstart`, then `.venv/bin/python -m examples.ten_lines`."""

import realm_tf

system = realm_tf.load("runs/quickstart/finetune/realm")

answer = system.answer("who built the bridge over the Gorneth?")
print(f"{answer.text} (score {answer.score:.2f}), read in: {answer.passage.text}")

for passage in system.retrieve("rivers of the north", num=5):
  print(f"{passage.score:6.2f}  {passage.title}: {passage.text}")
