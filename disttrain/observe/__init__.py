"""What people see of a run: progress, the summary, the log."""
