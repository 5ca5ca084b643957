"""`report.html`: figures, tables, recordings and maps on one self-contained page."""
