"""Classifiers of features, and what measures them."""
