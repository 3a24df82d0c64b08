"""Numbers that describe embeddings, filters, modalities and pairs of networks."""

from structkd.diagnostics.embeddings import effective_rank, self_similarity, uniformity
from structkd.diagnostics.filters import FilterDirections, filter_collapse
from structkd.diagnostics.modality_gap import ModalityGap, ModalityGapWarning, modality_gap
from structkd.diagnostics.predictable import predictable_share
from structkd.diagnostics.transport import transport_cost

__all__ = [
    "FilterDirections",
    "ModalityGap",
    "ModalityGapWarning",
    "effective_rank",
    "filter_collapse",
    "modality_gap",
    "predictable_share",
    "self_similarity",
    "transport_cost",
    "uniformity",
]
