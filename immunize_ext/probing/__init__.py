"""Condition-number immunization of features, and the probes that attack it."""
