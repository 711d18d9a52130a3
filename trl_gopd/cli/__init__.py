"""The command `trl-gopd`. Each sub-command has a module of its own, which is imported only when it is run."""

import importlib
import sys


COMMANDS = {
    "train": "distill a teacher into a student with GOPDTrainer",
    "quantize": "quantize a model to 2, 3, 4 or 8 bits with D2Quant",
    "evaluate": "measure a model, quantized or not, on a text and compare it with another model",
    "preflight": "predict the effect of each reward scale λ before training",
    "demo": "run small demonstrations on this machine, without access to the Hub",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a sub-command and returns the exit status of the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    listing = "\n".join(f"  {name:9} {text}" for name, text in COMMANDS.items())
    usage = f"usage: trl-gopd COMMAND ...\n\n{listing}\n\nEach command has --help."
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from trl_gopd import __version__

        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"trl-gopd: there is no command {name!r}; there are {', '.join(COMMANDS)}.\n\n{usage}", file=sys.stderr)
        return 2
    status: int = importlib.import_module(f"trl_gopd.cli.{name}").main(rest)
    return status
