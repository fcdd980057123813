"""Convert checkpoints, whatever strategy and number of ranks wrote them.

    python scripts/convert.py export RUN_OR_CHECKPOINT OUT.safetensors [--ema]    one file with every tensor
    python scripts/convert.py export --to hf_clip|open_clip RUN_OR_CHECKPOINT OUT_DIR    two towers in CLIP's layouts
    python scripts/convert.py parts RUN_OR_CHECKPOINT OUT_DIR [--ema]             Hugging Face and timm layouts
    python scripts/convert.py import --from KIND FILE OUT.safetensors             published weights, for init.run=OUT
    python scripts/convert.py run OUT.safetensors +experiment=NAME [KEY=VALUE ...]      a run to evaluate, untrained

What is exported has been loaded again and compared with the checkpoint. An import renames every tensor or says why it
is left out; which parameters of a run it fills, the run says when it starts from it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from safetensors.torch import save_file

from vlp.training import as_run, clip_layouts, export, published
from vlp.training.exits import reported


def main(arguments: list[str]) -> int:
    """Convert as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, out in (("export", _export, "OUT.safetensors"), ("parts", _parts, "OUT_DIR")):
        command = commands.add_parser(name, help=run.__doc__)
        command.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT")
        command.add_argument("out", type=Path, metavar=out)
        command.add_argument("--ema", action="store_true", help="the averaged weights")
        command.set_defaults(run=run, kind=None)
        if run is _export:
            command.add_argument("--to", dest="kind", choices=list(clip_layouts.LAYOUTS), help="a layout of CLIP")
    command = commands.add_parser("import", help=_import.__doc__)
    command.add_argument("--from", dest="kind", required=True, choices=list(published.LAYOUTS))
    command.add_argument("source", type=Path, metavar="FILE", help="or a folder with model.safetensors")
    command.add_argument("out", type=Path, metavar="OUT.safetensors")
    command.set_defaults(run=_import)
    command = commands.add_parser("run", help=_run.__doc__)
    command.add_argument("source", type=Path, metavar="OUT.safetensors")
    command.add_argument("overrides", nargs="+", metavar="OVERRIDE", help="as train.py takes them")
    command.set_defaults(run=_run)
    chosen = parser.parse_args(arguments)
    return reported(lambda: chosen.run(chosen))


def _export(chosen: argparse.Namespace) -> int:
    """Write one safetensors file with every frozen, tied and buffer tensor, or two towers in a layout of CLIP."""
    source = export.open_source(chosen.source)
    if chosen.kind is not None:
        left = export.export_clip(source, chosen.out, kind=chosen.kind, averaged=chosen.ema)
        print(f"{chosen.out}: step {source.stored.step} as {chosen.kind}; left out: {', '.join(left) or 'nothing'}")
        return 0
    count = export.export(source, chosen.out, averaged=chosen.ema)
    print(f"{chosen.out}: {count} tensors of step {source.stored.step}; its outputs are those of the checkpoint")
    return 0


def _parts(chosen: argparse.Namespace) -> int:
    """Write the parts that have a Hugging Face or timm layout."""
    print("\n".join(export.export_parts(export.open_source(chosen.source), chosen.out, averaged=chosen.ema)))
    return 0


def _run(chosen: argparse.Namespace) -> int:
    """Make a run directory of weights, for evaluate.py, the search page and vlp.load."""
    directory, report = as_run.make_run(chosen.source, chosen.overrides)
    print(f"{report.text()}\n{directory}: python evaluate.py run={directory} task=BENCHMARK")
    return 0


def _import(chosen: argparse.Namespace) -> int:
    """Give published weights the names of vlp."""
    found = published.import_file(chosen.source, chosen.kind)
    for name, reason in found.left_out.items():
        print(f"left out: {name}: {reason}")
    save_file(found.tensors, chosen.out)
    print(f"{chosen.out}: {len(found.tensors)} tensors, {len(found.left_out)} left out; start from it with init.run")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
