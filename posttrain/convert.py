"""Convert a model between the forms that this package reads and writes; what SRC is decides the direction.

python posttrain/convert.py SRC DST [--tokenizer T]
    SRC  a ckpt.pt file                       DST becomes a Hugging Face folder, with the tokenizer T where one is given
         a Hugging Face folder                DST becomes a ckpt.pt file (Llama models)
         RUN/checkpoints/step_000200          DST becomes a Hugging Face folder, or a ckpt.pt file where its name ends in .pt

Every conversion is checked: what was written is read back and must give SRC's logits, or nothing is left of it.
"""

import os
import sys
from pathlib import Path


def main() -> None:
    """Read the command line and convert."""
    from posttrain.common.options import Parser, place
    from posttrain.model.command_line import add_code_option
    from posttrain.model.forms import find_model

    parser = Parser("convert", __doc__)
    parser.add_argument("src", type=place, metavar="SRC")
    parser.add_argument("dst", type=place, metavar="DST")
    parser.add_argument(
        "--tokenizer", type=place, metavar="T", help="a Hugging Face folder or a SentencePiece .model file, put into a new folder"
    )
    add_code_option(parser)
    options = parser.parse_args()
    find_model(options.src, "Name a ckpt.pt file, a Hugging Face folder or a folder of a run's checkpoints")
    os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed looks for a GPU: conversions need none
    from posttrain.model import own_code
    from posttrain.model.convert import convert

    if options.trust_remote_code:
        own_code.register(options.src)
    convert(Path(options.src), Path(options.dst), options.tokenizer)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder with posttrain in it, which need not be installed
    from posttrain.parallel.script import run_script

    if len(sys.argv) == 1:
        sys.argv.append("--help")
    run_script(main)
