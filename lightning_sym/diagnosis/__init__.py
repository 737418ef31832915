"""Sick or healthy? What readings mean, and what weights alone show, as findings."""

from lightning_sym.diagnosis.finding import Finding as Finding
from lightning_sym.diagnosis.rules import RULES as RULES
from lightning_sym.diagnosis.run import diagnose_course as diagnose_course, diagnose_run as diagnose_run
