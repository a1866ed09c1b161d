"""Removes local paths and the host name from options and messages that are published."""

from __future__ import annotations

import re
import socket
from dataclasses import replace
from pathlib import Path

from sam_medical.common.paths import own_name
from sam_medical.options.commands import CompareOptions

DATA, RUNS, HOME, HOST = "DATA", "RUNS", "HOME", "HOST"
# Options of the local machine, without influence on the results.
OPTIONS_OF_A_MACHINE = ("output_dir", "report", "jobs", "extensions")
_IN_A_PATH = r"[^\s'\"`:;,()\[\]]"
# Absolute paths with at least one folder, but not URLs. The group is the last name of the path.
_ABSOLUTE = re.compile(rf"(?<![\w./:~-])(?:[A-Za-z]:)?[\\/](?:{_IN_A_PATH}*[\\/])+({_IN_A_PATH}*)")


def portable_options(options: CompareOptions) -> CompareOptions:
    """Returns the options with placeholders for folders, and with defaults for options of the machine."""
    return replace(
        options,
        data_root=None if options.data_root is None else DATA,
        backbone=own_name(options.backbone),
        text_encoder=own_name(options.text_encoder),
        **{name: getattr(type(options), name) for name in OPTIONS_OF_A_MACHINE},
    )


def portable_text(text: str, options: CompareOptions) -> str:
    """Replaces local paths in a message. Paths below the data folder stay relative to it, others keep their name."""
    places = {Path.home(): HOME, Path(options.output_dir): RUNS}
    if options.data_root is not None:
        places[Path(options.data_root)] = DATA
    spellings = {str(path): name for place, name in places.items() for path in (place.absolute(), place.resolve())}
    for folder in sorted(spellings, key=len, reverse=True):
        text = re.sub(rf"{re.escape(folder)}(?![\w.-])", spellings[folder], text)
    text = _ABSOLUTE.sub(lambda match: match[1] or "FOLDER", text)
    return re.sub(rf"(?<![\w-]){re.escape(socket.gethostname())}(?![\w-])", HOST, text)
