"""Evaluate a trained run: `python evaluate.py run=runs/NAME [task=retrieval] [section.key=value ...]`."""

import sys

from vlp.training.evaluate_run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
