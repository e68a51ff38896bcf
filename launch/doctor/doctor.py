"""Looks at every host of a hostfile before a run does, and says what to fix: python launch/doctor/doctor.py [HOSTFILE] [--key=value ...]

It reaches each host by ssh, compares what must be the same on all, looks for what would stop a run, and lets all ranks send each other
data. It changes nothing. Without HOSTFILE (or the variable of that name) it looks at this machine alone. Keys are those of a recipe, whose
model, data and out_dir are looked at. Environment: RECIPE, NUM_GPUS, MASTER_ADDR, MASTER_PORT as for launch/multinode.py. Exit code: 0 all
is well, 1 there is something to fix, 2 a mistake in the command.
"""

import sys
from pathlib import Path


def main() -> None:
    """Examine, as the command line asks, and exit with its code."""
    if "--help" in sys.argv:
        from posttrain.common.places import in_this_form

        print(in_this_form(__doc__))
        return
    from examine import examine

    sys.exit(examine(sys.argv[1:]))


if __name__ == "__main__":
    launch = Path(__file__).resolve().parents[1]
    root = next(above for above in launch.parents if (above / "posttrain").is_dir())  # in a wheel launch/ lies inside posttrain/
    sys.path[:0] = [str(root), str(launch)]
    from posttrain.parallel.script import run_script

    run_script(main)
