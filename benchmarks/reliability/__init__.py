"""Slow searches for what breaks: ``make campaign``. A short form of each runs with the tests."""
