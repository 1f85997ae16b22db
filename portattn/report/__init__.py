"""What the tuning database holds, for people: tables and charts in HTML.

``records`` is what is shown, ``reader`` reads it (and never writes), ``charts`` draws SVG,
``html`` makes pages; `write.report` puts all of it into one file, and `portattn.serve` serves it.
"""
