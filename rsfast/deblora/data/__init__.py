"""Labelled images and features, and how often each class occurs."""
