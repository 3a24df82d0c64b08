"""Images in two modalities: where they come from, what makes one poor, and batches of them."""

from data.batches import Batch, Batches, MixedBatches
from data.images import NO_LABEL, Images
from data.options import Options
from data.readers import APART
from data.views import Views, open_views

__all__ = [
    "APART",
    "NO_LABEL",
    "Batch",
    "Batches",
    "Images",
    "MixedBatches",
    "Options",
    "Views",
    "open_views",
]
