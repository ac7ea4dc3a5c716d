"""Attackers with their optimizers: who the protection holds against, and who it does not."""

from immunize_ext.attacks.budgets import BudgetOutcome, attack_at_budgets
from immunize_ext.attacks.linear_probe import AttackComparison, AttackCurve, attack, compare_attack
from immunize_ext.attacks.losses import LossName
from immunize_ext.attacks.probes import PROBES, Probe
from immunize_ext.attacks.registry import ATTACKERS, Attacker

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
