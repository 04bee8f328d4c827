"""Sections of the report, one module an experiment: tables, figures, and claims set against what was measured.

A section is `section(place, results, columns) -> list of Markdown blocks`, made of stored results alone. Sentences about
results are computed from them.
"""
