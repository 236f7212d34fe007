"""Runs, looked at: their samples in a terminal, all of a run as a page of HTML."""
