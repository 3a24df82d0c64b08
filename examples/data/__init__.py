"""Images in two modalities: where they come from, what makes one poor, and batches of them."""

from data.batches import Batch, Batches
from data.images import NO_LABEL, Images
from data.mixed import MixedBatches
from data.views import Views, Wanted, open_views

__all__ = [
    "NO_LABEL",
    "Batch",
    "Batches",
    "Images",
    "MixedBatches",
    "Views",
    "Wanted",
    "open_views",
]
