"""Reports in files: a page, a pull request's comment, JSON, and what continuous integration reads.

:mod:`report_body` is what a report says (JSON, docs/report.schema.json); every other form is made of that:
:mod:`report_page` (HTML), :mod:`report_markdown`, :mod:`junit`, :mod:`annotations`.
"""
