"""SimpleITK and pydicom without their warnings. Our own error messages report damaged files."""

from __future__ import annotations

from typing import Any


def simpleitk() -> Any:
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def pydicom() -> Any:
    import warnings

    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    warnings.filterwarnings("ignore", module=r"pydicom\.|highdicom\.")
    return pydicom
