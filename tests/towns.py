"""A corpus of thirty towns, one passage each, for tests that update it."""

import json
from pathlib import Path

SIZES = {"max_tokens": 32, "passages_per_shard": 7, "segment_passages": 25}


def town(number: int, text: str = "", **more) -> dict:
  text = text or f"Town {number} lies by a river. Queen {number} founded it in {1000 + number}."
  return {"id": number, "title": f"T{number}", "text": text} | more


TOWNS = [town(number) for number in range(30)]


def write(path: Path, rows: list[dict]) -> str:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)
