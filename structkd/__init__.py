"""Composable distillation criteria for a rich teacher modality and a poor student one."""

from structkd import diagnostics, views
from structkd.capture import FeatureCapture
from structkd.criteria.adversarial import AdversarialFeatureLoss, AdversarialLogitsLoss
from structkd.criteria.alignment import SemanticAlignmentLoss
from structkd.criteria.base import Criterion, CriterionSum
from structkd.criteria.calibration import SemanticCalibrationLoss
from structkd.criteria.contrastive import ContrastiveRepresentationLoss
from structkd.criteria.coral import CORALLoss
from structkd.criteria.correlation import CrossCorrelationLoss
from structkd.criteria.dense import DenseStructureLoss
from structkd.criteria.flow import FlowMatrixLoss
from structkd.criteria.logits import (
    CurriculumTemperatureLoss,
    DKDLoss,
    KDLoss,
    LogitMSELoss,
    LogitStandardizationLoss,
)
from structkd.criteria.maps import (
    AttentionTransferLoss,
    ChannelWiseLoss,
    NeuronSelectivityLoss,
)
from structkd.criteria.regression import FitNetLoss, VariationalInformationLoss
from structkd.criteria.relations import (
    CorrelationCongruenceLoss,
    DistilVPRLoss,
    RelationalLoss,
)
from structkd.criteria.structure import DSLoss
from structkd.criteria.supervision import DiceLoss, SupervisionLoss
from structkd.criteria.uniformity import UniformityCalibrationLoss
from structkd.distiller import Distiller, falling
from structkd.features import Features
from structkd.gallery import RetrievalGallery
from structkd.matching.dataset import MatchedDataset, MatchedSample, RematchSchedule
from structkd.matching.semantic import SemanticMatcher
from structkd.matching.sembridge import ConvergenceWarning, Match, SemBridgeMatcher
from structkd.projectors import ConvAdapter, Projector
from structkd.transport import LagrangianPlanner, TransportPlan

__version__ = "0.2.0"

__all__ = [
    "AdversarialFeatureLoss",
    "AdversarialLogitsLoss",
    "AttentionTransferLoss",
    "CORALLoss",
    "ChannelWiseLoss",
    "ContrastiveRepresentationLoss",
    "ConvAdapter",
    "ConvergenceWarning",
    "CorrelationCongruenceLoss",
    "Criterion",
    "CriterionSum",
    "CrossCorrelationLoss",
    "CurriculumTemperatureLoss",
    "DKDLoss",
    "DSLoss",
    "DenseStructureLoss",
    "DiceLoss",
    "DistilVPRLoss",
    "Distiller",
    "FeatureCapture",
    "Features",
    "FitNetLoss",
    "FlowMatrixLoss",
    "KDLoss",
    "LagrangianPlanner",
    "LogitMSELoss",
    "LogitStandardizationLoss",
    "Match",
    "MatchedDataset",
    "MatchedSample",
    "NeuronSelectivityLoss",
    "Projector",
    "RelationalLoss",
    "RematchSchedule",
    "RetrievalGallery",
    "SemBridgeMatcher",
    "SemanticAlignmentLoss",
    "SemanticCalibrationLoss",
    "SemanticMatcher",
    "SupervisionLoss",
    "TransportPlan",
    "UniformityCalibrationLoss",
    "VariationalInformationLoss",
    "diagnostics",
    "falling",
    "views",
]
