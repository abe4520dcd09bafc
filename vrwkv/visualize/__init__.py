"""Pictures of what a model looks at; needs matplotlib, the extra `vrwkv[visualize]`."""

from vrwkv.runtime.errors import MissingExtra

try:
    import matplotlib as _matplotlib  # noqa: F401
except ImportError as error:
    raise MissingExtra(f"vrwkv.visualize needs matplotlib ({error}): pip install 'vrwkv[visualize]'") from error

from vrwkv.visualize.draw import draw_decays, draw_gathering, draw_receptive_field, draw_votes
from vrwkv.visualize.files import to_picture, visualize
from vrwkv.visualize.measure import (
    Explanation,
    area_holding,
    class_votes,
    effective_receptive_field,
    explain,
    gathered_shares,
    spatial_mixes,
)

__all__ = [
    "Explanation",
    "area_holding",
    "class_votes",
    "draw_decays",
    "draw_gathering",
    "draw_receptive_field",
    "draw_votes",
    "effective_receptive_field",
    "explain",
    "gathered_shares",
    "spatial_mixes",
    "to_picture",
    "visualize",
]
