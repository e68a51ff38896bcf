"""Serve checkpoints: a chat page, and OpenAI's endpoints for any client.

    python posttrain/serve.py --checkpoint runs/sft                                     then open http://127.0.0.1:8000
    python posttrain/serve.py --checkpoint base=checkpoints/base --checkpoint runs/sft --checkpoint runs/dpo      to compare them

A checkpoint is a Hugging Face folder, a run directory (its newest), RUN/checkpoints/step_000200, or a ckpt.pt file. It is used with
its own template, system prompt and stop tokens. Votes of the page's comparison go to --preferences, which data_prep/prepare_dpo.py reads.
If the environment has POSTTRAIN_API_KEY, clients must send it.
"""

import sys
from pathlib import Path


def main() -> None:
    """Read the command line and serve."""
    from posttrain.common.options import Parser, path
    from posttrain.model.command_line import add_checkpoint_options, parse, refuse_missing
    from posttrain.parallel.launched import take_gpu

    parser = Parser("serve", __doc__)
    add_checkpoint_options(parser, "give it several times to compare")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines (default: this one only)")
    parser.add_argument("--port", type=int, default=8000, help="(8000)")
    parser.add_argument("--device", metavar="D", help="cuda, cuda:1 or cpu (a GPU where there is one)")
    parser.add_argument("--engine", choices=("auto", "transformers", "vllm"), default="auto", help="default: vLLM where it is installed")
    parser.add_argument("--max_batch", type=int, default=32, metavar="N", help="answers of a model that are generated at once (32)")
    parser.add_argument("--max_queue", type=int, default=128, metavar="N", help="requests of a model that may wait; more get 429 (128)")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds that an answer may take, waiting included (300)")
    parser.add_argument("--max_body", type=int, default=2**20, metavar="BYTES", help="longest request (1048576)")
    parser.add_argument(
        "--preferences", type=path, default=Path("preferences.jsonl"), metavar="FILE", help="where votes go (preferences.jsonl)"
    )
    options = parse(parser, max_batch=1, max_queue=0, timeout=1, max_body=1)
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port must be from 0 to 65535, not {options.port}")
    refuse_missing(options)
    options.device = options.device and take_gpu(options.device)
    from posttrain.serving.server import serve  # only now: it imports torch and transformers, which takes seconds

    serve(options)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder with posttrain in it, which need not be installed
    from posttrain.parallel.script import run_script

    if len(sys.argv) == 1:
        sys.argv.append("--help")
    run_script(main)
