"""Alembic's environment: runs inside the caller's transaction, on the caller's connection."""

from alembic import context

from portattn.tuning_db.schema import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,  # Optuna's RDB storage uses Alembic's default name
)
context.run_migrations()
