"""Composable distillation criteria for a rich teacher modality and a poor student one."""

from structkd import diagnostics
from structkd.capture import FeatureCapture
from structkd.criteria.base import Criterion
from structkd.criteria.coral import CORALLoss
from structkd.criteria.correlation import CrossCorrelationLoss
from structkd.criteria.logits import KDLoss
from structkd.criteria.structure import DSLoss
from structkd.criteria.uniformity import UniformityCalibrationLoss
from structkd.features import Features
from structkd.projectors import ConvAdapter, Projector

__version__ = "0.1.0"

__all__ = [
    "CORALLoss",
    "ConvAdapter",
    "Criterion",
    "CrossCorrelationLoss",
    "DSLoss",
    "FeatureCapture",
    "Features",
    "KDLoss",
    "Projector",
    "UniformityCalibrationLoss",
    "diagnostics",
]
