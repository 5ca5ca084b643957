"""Recordings with reports and labels: manifests and their checks, data sets, prepared sets."""
