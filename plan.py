"""Show what a config would train, without data: `python plan.py +experiment=NAME`."""

import sys

from vlp.training.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
