"""Train a system: `python train.py +experiment=NAME [section.key=value ...]`; see README.md."""

import sys

from vlp.training.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
