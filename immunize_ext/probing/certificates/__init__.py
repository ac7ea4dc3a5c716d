"""What each kind of attacker pays: delay by optimizer, cap in work, price of undoing, and locks.

:func:`certify` measures all of it for one extractor; the modules say why each number is what it is.
"""

from __future__ import annotations

from immunize_ext.probing.certificates.certificate import Certificate, certify
from immunize_ext.probing.certificates.few_samples import sample_curve, samples_to
from immunize_ext.probing.certificates.layers import LayerProbe, layer_features, layer_probes
from immunize_ext.probing.certificates.learning_curve import (
    Spectrum,
    best_risk,
    effective_ridge,
    expected_risk,
)
from immunize_ext.probing.certificates.linear_information import (
    LinearInformation,
    linear_information,
)
from immunize_ext.probing.certificates.nonlinear_probes import kernel_probe, perceptron_probe
from immunize_ext.probing.certificates.number_formats import FormatFloor, format_floor, served
from immunize_ext.probing.certificates.rewhitening import (
    aligned,
    gaussian_kappa_left,
    raised,
    rewhitened,
    whitening_map,
)
from immunize_ext.probing.certificates.work import factorisation_steps, work_cap
from immunize_ext.probing.metrics import EXPONENT, IMPOSSIBLE, kappa_under

__all__ = [
    "EXPONENT",
    "IMPOSSIBLE",
    "Certificate",
    "FormatFloor",
    "LayerProbe",
    "LinearInformation",
    "Spectrum",
    "aligned",
    "best_risk",
    "certify",
    "effective_ridge",
    "expected_risk",
    "factorisation_steps",
    "format_floor",
    "gaussian_kappa_left",
    "kappa_under",
    "kernel_probe",
    "layer_features",
    "layer_probes",
    "linear_information",
    "perceptron_probe",
    "raised",
    "rewhitened",
    "sample_curve",
    "samples_to",
    "served",
    "whitening_map",
    "work_cap",
]
