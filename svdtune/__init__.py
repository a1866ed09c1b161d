"""A PEFT method that tunes the singular values of a transformer's weights.

Importing this package registers the method with ``peft``, which can then create, save and load its adapters.
"""

from svdtune.versions import check_versions

check_versions()  # before imports that would fail with an unclear error

from svdtune.config import SVDScaleShiftConfig
from svdtune.hotswap import hotswap_adapter
from svdtune.model import SVDScaleShiftModel
from svdtune.optimization import parameter_groups
from svdtune.registration import register
from svdtune.sam_conversion import convert_sam_adapter
from svdtune.version import __version__

register(SVDScaleShiftConfig, SVDScaleShiftModel)

__all__ = [
    "SVDScaleShiftConfig",
    "SVDScaleShiftModel",
    "__version__",
    "convert_sam_adapter",
    "hotswap_adapter",
    "parameter_groups",
]
