"""Answers calls, one JSON line each, inside the environment of a peer: `python serve.py MODULE`."""

import importlib
import json
import os
import sys
import traceback


def main(module_name: str) -> None:
    """Call functions of a module as standard input asks for, until it ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print does not get between the answers
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # told to the bench, which names the peer
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        return
    print(json.dumps({"result": "ready"}), file=answers, flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        try:
            answer = {"result": getattr(module, call["function"])(**call["arguments"])}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
