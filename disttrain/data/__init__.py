"""Real data that is on every machine: scikit-learn's digits, and text."""
