"""Measure preferences: of a judge between two checkpoints' answers, or of a checkpoint between the answers of held-out pairs.

    python posttrain/eval_preferences.py --checkpoint runs/sft --checkpoint runs/dpo --prompts FILE --judge http://HOST/v1 --judge_model M
        both answer every prompt of FILE (a prompt a line), greedily; any OpenAI-compatible judge compares them in both orders
    python posttrain/eval_preferences.py --checkpoint runs/dpo --reference runs/sft --pairs data/dpo
        how often the policy has come to prefer the chosen answer of the held-out pairs, against its reference

The judge's key is read from OPENAI_API_KEY. Every prompt, answer and verdict is kept in --output.
"""

import sys
from pathlib import Path


def main() -> None:
    """Read the command line, and measure a win rate or a reward accuracy."""
    from posttrain.common.options import Parser, named_place, path
    from posttrain.common.places import command
    from posttrain.data.manifest import read_manifest
    from posttrain.model.command_line import add_checkpoint_options, parse, refuse_missing

    parser = Parser("eval-preferences", __doc__)
    add_checkpoint_options(parser)
    parser.add_argument("--prompts", type=path, metavar="FILE", help="a prompt a line")
    parser.add_argument("--judge", metavar="URL", help="of an OpenAI-compatible endpoint, with /v1")
    parser.add_argument("--judge_model", metavar="M")
    parser.add_argument("--reference", type=named_place, metavar="[NAME=]DIR", help="what the policy was trained against")
    parser.add_argument(
        "--pairs", type=path, metavar="DIR", help="data prepared by data_prep/prepare_dpo.py; its validation rows are taken"
    )
    parser.add_argument("--max_samples", type=int, metavar="N", help="the first N prompts or pairs only")
    parser.add_argument("--max_tokens", type=int, metavar="N", help="longest answer to a prompt (512)")
    parser.add_argument("--output", type=path, default=Path("runs/preferences"), metavar="DIR", help="(runs/preferences)")
    options = parse(parser, max_samples=1, max_tokens=1)
    by_judge = (options.prompts, options.judge, options.judge_model)
    by_pairs = (options.reference, options.pairs)
    if all(by_judge) and not any(by_pairs) and len(options.checkpoint) == 2:
        refuse_missing(options)
        from posttrain.evaluation.preferences import win_rate

        win_rate(options)
    elif all(by_pairs) and not any(by_judge) and len(options.checkpoint) == 1:
        if options.max_tokens:
            raise ValueError("--max_tokens is for answers to --prompts; with --pairs nothing is generated")
        read_manifest(str(options.pairs), command("prepare-dpo", "--output_dir", options.pairs), "dpo")
        refuse_missing(options, options.reference)
        from posttrain.evaluation.preferences import reward_accuracy

        reward_accuracy(options)
    else:
        raise ValueError(
            "give either two --checkpoint with --prompts, --judge and --judge_model, or one --checkpoint with --reference and --pairs"
        )


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder with posttrain in it, which need not be installed
    from posttrain.parallel.script import run_script

    if len(sys.argv) == 1:
        sys.argv.append("--help")
    run_script(main)
