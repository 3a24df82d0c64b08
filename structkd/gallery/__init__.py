"""Teacher samples by class, and the search for a student's nearest."""

from structkd.gallery.gallery import RetrievalGallery

__all__ = ["RetrievalGallery"]
