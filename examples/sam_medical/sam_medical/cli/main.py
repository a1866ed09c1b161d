"""`sam-medical COMMAND`: finds the command's module and calls its `main`.

Only the module of the command that was asked for is imported, so that help comes at once.
"""

from __future__ import annotations

import sys
from importlib import import_module

from sam_medical import __version__
from sam_medical.common.errors import UserError, one_line_errors

# Name of the command: its module, and what it does.
COMMANDS = {
    "train": ("train", "train S-SAM, or another method, on a folder of images and masks"),
    "evaluate": ("evaluate", "score a trained adapter on one split of a dataset"),
    "predict": ("predict", "segment images with a trained adapter"),
    "compare": ("compare", "train several methods alike and write one report"),
    "inspect": ("inspect_data", "show what is in a data folder and what the model would see"),
    "made-up": ("made_up", "write a small made-up dataset to try the commands on"),
}


@one_line_errors
def main() -> None:
    """Runs the command that the first argument names.

    Raises:
        SystemExit: 0 after help, 2 if there is no such command, otherwise the command's own status.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return
    if name == "--version":
        print(f"sam-medical {__version__}")
        return
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}; give one of {', '.join(COMMANDS)}.")
    sys.argv = [f"sam-medical {name}", *sys.argv[2:]]
    import_module(f"sam_medical.cli.{COMMANDS[name][0]}").main()


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sam-medical COMMAND [options]",
            "",
            *lines,
            "",
            "sam-medical COMMAND --help lists a command's options.",
        ]
    )
