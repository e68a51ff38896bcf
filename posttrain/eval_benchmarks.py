"""Measure checkpoints on benchmarks, with lm-evaluation-harness's prompts and scoring.

    python posttrain/eval_benchmarks.py --checkpoint base=DIR --checkpoint runs/sft --checkpoint runs/dpo --benchmark arc_easy
    deepspeed --num_gpus 8 posttrain/eval_benchmarks.py ...        the same, the items dealt to the GPUs

--mode logprob takes the likeliest of the choices, --mode generate reads the answer from what the model says. Rows come from the hub, or
from DIR/arc_easy.jsonl ... with --data DIR. --output gets a table, results.json (also for report.py --results), a plot, every item with
prompt, answer and score, and the task files with which lm_eval's own command gives the same numbers.
"""

import os
import sys
from argparse import SUPPRESS
from pathlib import Path


def main() -> None:
    """Read the command line and measure. All ranks."""
    from posttrain.common.files import refuse_existing
    from posttrain.common.options import Parser, path
    from posttrain.evaluation.tasks import BENCHMARKS, MODES, chosen_benchmarks
    from posttrain.model.command_line import add_checkpoint_options, parse, refuse_missing
    from posttrain.parallel.script import is_rank_0

    parser = Parser("eval", __doc__)
    add_checkpoint_options(parser, "give it several times to compare")
    parser.add_argument("--benchmark", action="append", required=True, metavar="B[,B]", help=f"of {', '.join(('all', *BENCHMARKS))}")
    parser.add_argument("--mode", choices=MODES, default="logprob", help="(logprob)")
    parser.add_argument("--max_samples", type=int, metavar="N", help="the first N items of each benchmark only")
    parser.add_argument("--data", type=path, metavar="DIR", help="not from the hub: DIR/arc_easy.jsonl ..., with the hub's columns")
    parser.add_argument("--output", type=path, default=Path("runs/evaluation"), metavar="DIR", help="(runs/evaluation)")
    parser.add_argument("--chat", choices=("auto", "on", "off"), default="auto", help="ask in the chat template; auto: where there is one")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="sequences of a forward pass (16)")
    parser.add_argument("--local_rank", type=int, help=SUPPRESS)  # the deepspeed launcher's
    options = parse(parser, max_samples=1, batch_size=1)
    names, left_out = chosen_benchmarks(options.benchmark, options.mode, options.data)
    refuse_existing(options.output, "results.json")
    refuse_missing(options)
    if not sys.stderr.isatty() or not is_rank_0():
        os.environ["TQDM_DISABLE"] = "1"  # progress bars are for terminals; tqdm reads this when it is imported
    from posttrain.evaluation.benchmarks import evaluate  # only now: it imports torch, transformers and lm_eval

    evaluate(options, names, left_out)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder with posttrain in it, which need not be installed
    from posttrain.parallel.script import run_script

    if len(sys.argv) == 1:
        sys.argv.append("--help")
    run_script(main)
