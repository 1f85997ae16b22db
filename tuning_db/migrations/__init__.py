"""Alembic migrations, run by `portattn.tuning_db.engine`."""
