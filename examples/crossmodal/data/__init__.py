"""Images in two modalities: where they come from, what makes one poor, and batches of them."""

from crossmodal.data.batches import Batch, Batches
from crossmodal.data.images import NO_LABEL, Images
from crossmodal.data.mixed import MixedBatches
from crossmodal.data.views import Views, Wanted, open_views

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
