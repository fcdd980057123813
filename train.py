"""Train a system: `python train.py +experiment=NAME [section.key=value ...]`; see README.md."""

import sys

from vlp.training import signals

if __name__ == "__main__":
    signals.listen()  # before the imports below, which take seconds

    from vlp.training.exits import leave
    from vlp.training.launch import main

    leave(main(sys.argv[1:]))
