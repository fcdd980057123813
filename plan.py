"""Show what a run would cost, without data: `python plan.py +experiment=NAME`."""

import sys

from vlp.planning.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
