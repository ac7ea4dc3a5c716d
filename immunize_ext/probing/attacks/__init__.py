"""Attackers with their optimizers: who the protection holds against, and who it does not."""

from __future__ import annotations

from immunize_ext.probing.attacks.linear_probe import (
    AttackComparison,
    AttackCurve,
    BudgetOutcome,
    attack,
    attack_at_budgets,
    compare_attack,
)
from immunize_ext.probing.attacks.losses import LossName
from immunize_ext.probing.attacks.probes import PROBES, Probe
from immunize_ext.probing.attacks.registry import ATTACKERS, Attacker

__all__ = [
    "ATTACKERS",
    "PROBES",
    "AttackComparison",
    "AttackCurve",
    "Attacker",
    "BudgetOutcome",
    "LossName",
    "Probe",
    "attack",
    "attack_at_budgets",
    "compare_attack",
]
