"""The self-supervised matcher: one embedding space for two modalities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structkd._checks import describe, number, whole
from structkd._modes import evaluating


class SemanticMatcher(nn.Module):
    r"""Learns a common embedding of two modalities from pairs that come for free.

    The pairs are rich images and poor ones made from them: of a multispectral image, its red,
    green and blue bands. With row embeddings a (teacher's modality) and b (student's),

    .. math::
        Z = b a^T / T, \qquad Y = \mathrm{softmax}_{row}\bigl(\tfrac{T}{2} (a a^T + b b^T)\bigr),
        \qquad
        L = -\frac{1}{2B} \sum_{ij} Y_{ij} \bigl(\log \mathrm{softmax}_{row}(Z)_{ij}
        + \log \mathrm{softmax}_{column}(Z)_{ij}\bigr)

    As published, gradients also reach the embeddings through Y, and the column-wise part reads Y
    as it is, whose columns need not sum to 1. Each embedding is LayerNorm(p + Dropout(W GELU(p)))
    of p = V encoder(x). Train it with AdamW, lr 1e-3, weight decay 1e-3, batch 64, 100 epochs.

    Args:
        teacher_encoder: Module from the teacher's images to ``(B, teacher_dim)``.
        student_encoder: Module from the student's images to ``(B, student_dim)``.
        teacher_dim: Width of the first; 512 for a ResNet-34.
        student_dim: Width of the second.
        embed_dim: Width of the common embedding.
        dropout: Probability in [0, 1).
        temperature: T > 0.

    Raises:
        TypeError, ValueError: If an argument has the wrong type or range.

    References:
        Wei et al., *Asymmetric Cross-Modal Knowledge Distillation: Bridging Modalities with Weak
        Semantic Consistency*, AAAI 2026, self-supervised semantic matching.

    Example:
        >>> bands = nn.Sequential(nn.Flatten(), nn.Linear(10 * 64, 32))
        >>> colour = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 16))
        >>> matcher = SemanticMatcher(bands, colour, 32, 16)
        >>> ms = torch.rand(4, 10, 8, 8)
        >>> matcher(ms, ms[:, [3, 2, 1]]).shape
        torch.Size([])
        >>> matcher.embed_teacher(ms).shape
        torch.Size([4, 256])
    """

    def __init__(
        self,
        teacher_encoder: nn.Module,
        student_encoder: nn.Module,
        teacher_dim: int,
        student_dim: int,
        *,
        embed_dim: int = 256,
        dropout: float = 0.1,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        for name, encoder in (
            ("teacher_encoder", teacher_encoder),
            ("student_encoder", student_encoder),
        ):
            if not isinstance(encoder, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {describe(encoder)}")
        width = whole("embed_dim", embed_dim)
        rate = number("dropout", dropout, at_least=0)
        if rate >= 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.temperature = number("temperature", temperature, above=0)
        self.teacher_encoder = teacher_encoder
        self.student_encoder = student_encoder
        self.teacher_head = _Head(whole("teacher_dim", teacher_dim), width, rate, "teacher")
        self.student_head = _Head(whole("student_dim", student_dim), width, rate, "student")

    def forward(self, teacher_images: Tensor, student_images: Tensor) -> Tensor:
        """Returns the matching loss of pairs, a scalar in float32 at least.

        Args:
            teacher_images: What the teacher's encoder takes, ``(B, ...)``, B >= 2.
            student_images: The same samples in the student's modality, in the same order.

        Raises:
            ValueError: If the batch sizes differ or are below 2, or an encoder's output does not
                fit its head.
        """
        if len(teacher_images) != len(student_images):
            raise ValueError(
                "teacher_images and student_images must be pairs, got "
                f"{len(teacher_images)} and {len(student_images)} samples"
            )
        if len(teacher_images) < 2:
            raise ValueError(
                "the matcher compares the samples of a batch: it needs at least 2, got "
                f"{len(teacher_images)}; use drop_last=True in the DataLoader"
            )
        a = self.teacher_head(self.teacher_encoder(teacher_images))
        b = self.student_head(self.student_encoder(student_images))
        with torch.autocast(a.device.type, enabled=False):
            a, b = _at_least_float32(a), _at_least_float32(b)
            logits = b @ a.T / self.temperature
            targets = torch.softmax((a @ a.T + b @ b.T) * (self.temperature / 2), dim=1)
            both = logits.log_softmax(dim=1) + logits.log_softmax(dim=0)
            return -(targets * both).sum() / (2 * len(a))

    @torch.no_grad()
    def embed_teacher(self, images: Tensor) -> Tensor:
        """Returns unit embeddings ``(B, embed_dim)`` of the teacher's images, without gradient.

        Runs in eval mode, whatever mode the matcher is in, and leaves that as it was.
        """
        with evaluating(self):
            return _unit(self.teacher_head(self.teacher_encoder(images)))

    @torch.no_grad()
    def embed_student(self, images: Tensor) -> Tensor:
        """Returns unit embeddings ``(B, embed_dim)`` of the student's images, as above."""
        with evaluating(self):
            return _unit(self.student_head(self.student_encoder(images)))

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class _Head(nn.Module):
    """``LayerNorm(p + Dropout(Linear(GELU(p))))`` with ``p = Linear(x)``."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float, side: str) -> None:
        super().__init__()
        self.side = side
        self.projection = nn.Linear(in_dim, out_dim)
        self.refine = nn.Sequential(nn.GELU(), nn.Linear(out_dim, out_dim), nn.Dropout(dropout))
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, encoded: Tensor) -> Tensor:
        width = self.projection.in_features
        if not isinstance(encoded, Tensor) or encoded.dim() != 2 or encoded.shape[1] != width:
            raise ValueError(
                f"{self.side}_encoder must give (B, {width}), the {self.side}_dim, got "
                f"{describe(encoded)}; pool and flatten its output, or set {self.side}_dim"
            )
        projected = self.projection(encoded)
        normed: Tensor = self.norm(projected + self.refine(projected))
        return normed


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _unit(embedding: Tensor) -> Tensor:
    return F.normalize(_at_least_float32(embedding), dim=1)
