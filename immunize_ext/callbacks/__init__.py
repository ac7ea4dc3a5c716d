"""Condition numbers inside training loops of others: what is logged, and what is added to the loss.

    from immunize_ext.callbacks import FeatureMonitor, FeatureRegularizer
    from immunize_ext.callbacks.transformers import KappaCallback, ImmunizingTrainerMixin
    from immunize_ext.callbacks.lightning import KappaCallback

``FeatureMonitor`` measures kappa and RIR of a layer's features, ``FeatureRegularizer`` is the term
that makes the harm ill-conditioned; both know no framework. The two modules below hang them into
``transformers.Trainer`` and Lightning, which are imported there alone.
"""

from immunize_ext.callbacks.features import FeatureMonitor, FeatureRegularizer

__all__ = ["FeatureMonitor", "FeatureRegularizer"]
