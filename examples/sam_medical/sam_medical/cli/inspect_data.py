"""Show what is in a data folder, before anyone trains on it.

    python examples/sam_medical/inspect_data.py --dataset own --data-root FOLDER --sheet sheet.png

For each split: how many images, of which sizes, spacings and orientations; the range of their values, and what becomes
of it; how often each label is there, how much of it is left at the model's size, and how it stands out from its
surroundings; and images that are in two splits. --dump writes what the model would be given.
"""

from __future__ import annotations

from sam_medical.common.errors import one_line_errors
from sam_medical.options.commands import InspectOptions
from sam_medical.options.parsing import parse_options


@one_line_errors
def main() -> None:
    options = parse_options(InspectOptions)
    # Imported here, so that help and mistakes are answered before seconds of imports.
    from sam_medical.evaluation.inspection import inspect

    inspect(options)
