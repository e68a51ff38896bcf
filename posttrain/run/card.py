"""Writes the model card of a result, in Markdown: base model, data, versions, validation results and recipe, from the run's own files."""

import json
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData

from posttrain.run.stored import read_facts, read_log

TITLES = {"sft": "Supervised fine-tuning", "dpo": "Direct Preference Optimization"}


def model_card(run: Path, recipe: dict, manifest: dict) -> str:
    """Returns the text of RUN/final/README.md. `recipe`: the resolved one; `manifest`: the prepared data's."""
    facts = read_facts(run, "kind", "packages")
    base = recipe.get("checkpoint_path") or recipe["sft_checkpoint_path"]
    data = ModelCardData(library_name="transformers", tags=["posttrain", facts["kind"], "deepspeed"], model_name=run.name)
    about = {"base model": base, "data": ", ".join(manifest["sources"])}
    about |= {f"{split} examples": f"{count:,}" for split, count in manifest["counts"].items()}
    about |= {"chat template": manifest["template_name"], **facts["packages"]}
    table = "\n".join(f"| {name} | {value} |" for name, value in about.items())
    return f"""---
{data.to_yaml()}
---
# {run.name}

{TITLES[facts["kind"]]} of `{base}` with posttrain.

| | |
|---|---|
{table}

## Results
{_results(run)}

## Recipe
```yaml
{yaml.safe_dump(recipe, sort_keys=False).strip()}
```

## Data
```json
{json.dumps(manifest, indent=2)}
```
"""


def _results(run: Path) -> str:
    """Returns a table of the first and the last validation, or of the last step if there was no validation."""
    records = read_log(run, "metrics.jsonl")
    validations = [record for record in records if record["split"] == "eval"]
    shown = [validations[0], validations[-1]] if validations else records[-1:]
    if not shown:
        return "No metrics were recorded.\n"
    names = [name for name in shown[-1] if name not in ("step", "split")]
    head = "| | " + " | ".join(f"{'validation' if validations else 'training'} at step {record['step']}" for record in shown) + " |"
    lines = [head, "|---|" + "---|" * len(shown)]
    return "\n".join(lines + [f"| {name} | " + " | ".join(_number(record.get(name)) for record in shown) + " |" for name in names])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"
