"""Clusters, de-biased centres and calibrated features."""
