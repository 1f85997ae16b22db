"""``portattn serve``: the tuning database over HTTP, read only.

For machines that cannot reach it, and to look at. `app.build` makes the application; ``exchange``
the JSON that machines load through ``PORTATTN_DB=http://...`` or merge with `portattn import-db`.
"""
