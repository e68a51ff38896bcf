"""Write one page about runs, from their files alone: python posttrain/report.py RUN [RUN ...] [--output DIR] [--results FILE]

DIR/report.html needs no network and no file beside it; DIR also gets its pictures as PNG files.
"""

import sys
from pathlib import Path


def main() -> None:
    """Read the command line and write the page."""
    from posttrain.common.options import Parser, path

    parser = Parser("report", __doc__)
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="a run's directory")
    parser.add_argument("--output", type=path, help="folder to write to; default: report/ beside the first run")
    parser.add_argument("--results", type=path, help="measured results of models, as launch/quickstart/measure.py writes them")
    options = parser.parse_args()
    from posttrain.run.report import read_results, read_runs, write  # only now: it imports matplotlib

    runs, results = read_runs(options.runs), read_results(options.results)
    print(f"report: {write(runs, results, options.output or options.runs[0].resolve().parent / 'report')}")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder with posttrain in it, which need not be installed
    from posttrain.parallel.script import run_script

    if len(sys.argv) == 1:
        sys.argv.append("--help")
    run_script(main)
