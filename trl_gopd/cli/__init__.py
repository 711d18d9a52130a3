"""The command `trl-gopd`: one module a sub-command, imported when it is asked for."""

import importlib
import sys


COMMANDS = {
    "train": "distil a teacher into a student with GOPDTrainer",
    "quantize": "bring a model to 2, 3 or 4 bits with D2Quant",
    "evaluate": "measure a model, quantized or not, on a text and against another",
    "preflight": "see what each reward scale would do, before any training",
    "demo": "see the method work on this machine, without a hub",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a sub-command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    listing = "\n".join(f"  {name:9} {text}" for name, text in COMMANDS.items())
    usage = f"usage: trl-gopd COMMAND ...\n\n{listing}\n\nEach has --help."
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
    return importlib.import_module(f"trl_gopd.cli.{name}").main(rest)
