"""Runs on a cluster: preflight, what to do when a start ends, following runs."""
