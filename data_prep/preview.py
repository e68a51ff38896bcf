"""Shows rows as the model sees them: what it reads and, in colour, what it is trained to say.

python data_prep/preview.py data/sft                     five rows; pairs with both answers side by side
python data_prep/preview.py data/sft --row 17 --ids      one row with its token ids
python data_prep/preview.py data/sft --html rows.html    the same as a page
python data_prep/preview.py data/sft --check             proves every row again, exits with 1 if one fails
"""

import sys
from pathlib import Path


def parse(argv):
    """Return the options of a command line. Raises ValueError where they contradict each other."""
    from posttrain.common.options import Parser, place

    parser = Parser("preview", __doc__)
    parser.add_argument("directory", type=place, help="a folder that prepare_sft.py or prepare_dpo.py wrote")
    parser.add_argument("--split", choices=("train", "validation"), help="which rows (train)")
    parser.add_argument("--rows", type=int, help="how many, spread over the split (5)")
    parser.add_argument("--row", type=int, help="this one only, counted from 0")
    parser.add_argument("--ids", action="store_true", help="with token ids")
    parser.add_argument("--html", type=place, metavar="FILE", help="write a page instead of printing")
    parser.add_argument("--check", action="store_true", help="prove every row again instead; exit status 1 if one fails")
    options = parser.parse_args(argv)
    if options.check and (options.html or options.ids or options.split or options.rows is not None or options.row is not None):
        raise ValueError("--check goes over all rows and shows none: give it alone")
    if options.row is not None and options.rows is not None:
        raise ValueError("give --row or --rows, not both")
    options.split, options.rows = options.split or "train", 5 if options.rows is None else options.rows
    if options.rows < 1:
        raise ValueError("--rows should be 1 or more")
    return options


def main() -> None:
    """Show or check the rows of a prepared folder, as the command line asks."""
    options = parse(sys.argv[1:])
    from posttrain.common.places import command
    from posttrain.data.manifest import read_manifest

    read_manifest(options.directory, f"{command('prepare-sft')} or {command('prepare-dpo')}")
    from data_prep.show import show  # only now: it imports torch and transformers, which takes seconds

    try:
        show(options)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder with posttrain in it, which need not be installed
    from posttrain.parallel.script import run_script

    run_script(main)
