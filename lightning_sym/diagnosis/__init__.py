"""Sick or healthy? What readings mean, and what weights alone show, as findings."""

from lightning_sym.diagnosis.finding import Finding as Finding
from lightning_sym.diagnosis.rules import RULES as RULES
from lightning_sym.diagnosis.run import diagnose_course as diagnose_course, diagnose_run as diagnose_run
from lightning_sym.diagnosis.tensors import (
    diagnose_tensors as diagnose_tensors,
    inspect_tensors as inspect_tensors,
)
from lightning_sym.diagnosis.weights import (
    WeightsReport as WeightsReport,
    diagnose_weights as diagnose_weights,
    inspect_weights as inspect_weights,
)
