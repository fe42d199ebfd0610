"""Kubernetes: manifests that run as they stand, and a lint for those that people change."""

KINDS = ("mpijob", "indexed-job", "trainjob", "jobset", "pvc")
