"""Starting ranks: one machine, several hosts, Slurm, Kubernetes."""
