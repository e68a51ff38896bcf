"""Files that hold a JSON object a line, which grow while a run goes on."""

import json
from pathlib import Path


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a file with one in each line; none where there is no file. A last line that is not whole is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
