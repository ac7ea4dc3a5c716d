"""Attackers with their optimizers: who the protection holds against, and who it does not."""

from immunize_ext.attacks.linear_probe import AttackComparison, AttackCurve, attack, compare_attack
from immunize_ext.attacks.probes import PROBES, Probe

__all__ = ["PROBES", "AttackComparison", "AttackCurve", "Probe", "attack", "compare_attack"]
