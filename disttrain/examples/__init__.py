"""Whole trainings on real data, each one a page: start here, copy one, put your own model and data in."""
