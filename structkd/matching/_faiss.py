"""FAISS: its import, and the indexes that a gallery's factory string asks for."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from structkd.matching._flat import TorchFlat

TORCH_DEVICES = ("cuda",)  # where torch itself searches a flat index
_POINTS = 39  # a centroid, FAISS's own least for k-means


@functools.cache
def load_faiss() -> ModuleType:
    """Imports FAISS, after torch: the other order hangs forked DataLoader workers that search."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "RetrievalGallery needs FAISS: pip install 'structkd[cpu]', or 'structkd[gpu]' for "
            "approximate indexes on the GPU"
        ) from error
    # A forked child has no OpenMP threads to wait for.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(faiss.omp_set_num_threads, 1))
    module: ModuleType = faiss
    return module


class IndexSpec:
    """What every class's index is made from: a checked factory string, parameters and a device.

    Attributes:
        is_flat: Whether the index compares a query with every row.
        names_rows: Whether it returns the numbers that rows were added with, not positions.
        training_size: How many vectors its training needs; 0 where it needs none.
    """

    def __init__(self, width: int, factory: str, parameters: str, device: str) -> None:
        self.width, self.factory, self.parameters = width, factory, parameters
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda[:n]', got {device!r}")
        self.resources: Any = None
        self.is_flat, self.names_rows, self.training_size = True, False, 0
        if self._on_torch and factory == "Flat" and not parameters:
            self._check_device()
            return
        faiss = load_faiss()
        if self.device.type == "cuda":
            if not hasattr(faiss, "StandardGpuResources"):
                raise ImportError(
                    f"index={factory!r} on device={device!r} needs FAISS with GPU support: pip "
                    "install 'structkd[gpu]', or take index='Flat', which torch searches"
                )
            self._check_device()
            self.resources = faiss.StandardGpuResources()
        # What the factory refuses, it refuses here and not at the first large class.
        index = self._on_cpu()
        self.is_flat = isinstance(index, faiss.IndexFlat)
        self.names_rows = isinstance(_inner(index), faiss.IndexIVF)
        self.training_size = 0 if index.is_trained else _training_size(index)

    def new(self) -> Any:
        """Returns a new empty index on its device."""
        return self.flat() if self.is_flat else self.to_device(self._on_cpu())

    def flat(self) -> Any:
        """Returns a new empty exact index on its device."""
        if self._on_torch:
            return TorchFlat(self.width, self.device)
        return load_faiss().IndexFlatIP(self.width)

    def to_device(self, index: Any) -> Any:
        """Moves a FAISS index to the GPU if there is to be one."""
        if self.resources is None:
            return index
        faiss = load_faiss()
        moved = faiss.index_cpu_to_gpu(self.resources, self.device.index or 0, index)
        if self.parameters:
            faiss.GpuParameterSpace().set_index_parameters(moved, self.parameters)
        return moved

    def to_bytes(self, index: Any) -> torch.Tensor:
        """Returns a FAISS index as a tensor of bytes."""
        faiss = load_faiss()
        index = index if self.resources is None else faiss.index_gpu_to_cpu(index)
        return torch.from_numpy(faiss.serialize_index(index))

    def from_bytes(self, content: Any) -> Any:
        """Returns the index that :meth:`to_bytes` wrote, on this device."""
        faiss = load_faiss()
        index = faiss.deserialize_index(torch.as_tensor(content).numpy())
        if self.parameters:
            faiss.ParameterSpace().set_index_parameters(index, self.parameters)
        return self.to_device(index)

    @property
    def _on_torch(self) -> bool:
        return self.device.type in TORCH_DEVICES

    def _check_device(self) -> None:
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"device={str(self.device)!r}, but torch sees no CUDA device here: take 'cpu', or "
                "install a torch that fits the driver"
            )

    def _on_cpu(self) -> Any:
        faiss = load_faiss()
        try:
            index = faiss.index_factory(self.width, self.factory, faiss.METRIC_INNER_PRODUCT)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"index must be a FAISS factory string for inner products and vectors of width "
                f"{self.width}, got {self.factory!r}: {error}"
            ) from error
        try:
            faiss.ParameterSpace().set_index_parameters(index, self.parameters)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"parameters must be a FAISS parameter string for index={self.factory!r}, "
                f"'nprobe=16' for example, got {self.parameters!r}: {error}"
            ) from error
        return index


def _inner(index: Any) -> Any:
    """Returns what follows an index's rotations."""
    faiss = load_faiss()
    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index


def _training_size(index: Any) -> int:
    """Returns how many vectors give every centroid enough; 256 where none are trained."""
    faiss, centroids = load_faiss(), 0
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexRefine):
        if isinstance(index, faiss.IndexRefine):
            index = faiss.downcast_index(index.base_index)
            continue
        steps = (faiss.downcast_VectorTransform(step) for step in _each(index.chain))
        if any(isinstance(step, faiss.OPQMatrix) for step in steps):
            centroids = 256  # of the product quantiser that a rotation is fitted for
        index = faiss.downcast_index(index.index)
    quantiser = getattr(index, "pq", None)
    codes = 1 << quantiser.nbits if quantiser is not None else 0
    return _POINTS * max(centroids, codes, getattr(index, "nlist", 0)) or 256


def _each(vector: Any) -> Iterator[Any]:
    """Iterates over a std::vector as FAISS hands it out."""
    return (vector.at(place) for place in range(vector.size()))
