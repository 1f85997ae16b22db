"""Runs that are continued, several shapes and policies in one run, jobs with leases."""

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_BEFORE = ("run_id", "device_id", "config_id", "problem_id", "round")
_NOW = (*_BEFORE[:-1], "shape_sha256", "policy", "round")


def _length(column: str) -> tuple[sa.CheckConstraint]:
    """The constraint of a JSON column, which is forgotten where SQLite makes a table anew."""
    return (sa.CheckConstraint(f"length({column}) < 65536", name=f"ck_{column}_length"),)


def upgrade() -> None:
    """Add the columns, widen what identifies a measurement, and make the job table anew."""
    with op.batch_alter_table("run", table_args=_length("budget_json")) as run:
        run.add_column(sa.Column("fence", sa.BigInteger(), nullable=False, server_default="0"))
        run.add_column(sa.Column("work_sha256", sa.String(64), nullable=False, server_default=""))
    with op.batch_alter_table("measurement", table_args=_length("shape_json")) as measurement:
        measurement.add_column(
            sa.Column("shape_sha256", sa.String(64), nullable=False, server_default="")
        )
        measurement.drop_constraint("uq_measurement", type_="unique")
        measurement.create_unique_constraint("uq_measurement", _NOW)
    _hash_shapes()
    with op.batch_alter_table("best") as best:
        best.add_column(sa.Column("confirm_median_ns", sa.BigInteger(), nullable=True))
        best.add_column(sa.Column("confirm_default_ns", sa.BigInteger(), nullable=True))
    op.drop_table("job")  # nothing wrote into it before
    op.create_table(
        "job",
        sa.Column("id", _BIG, autoincrement=True, nullable=False),
        sa.Column("device_family", sa.String(256), nullable=False),
        sa.Column("kernel", sa.String(128), nullable=False),
        sa.Column("problem_id", _BIG, nullable=False),
        sa.Column("case_json", sa.Text(), nullable=False),
        sa.Column("options_json", sa.Text(), nullable=False),
        sa.Column("priority", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(128), nullable=False),
        sa.Column("lease_owner", sa.String(128), nullable=False),
        sa.Column("lease_until_us", sa.BigInteger(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("attempts", sa.BigInteger(), nullable=False),
        sa.Column("run_id", sa.String(36), nullable=True),
        sa.Column("error_text", sa.String(2048), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("updated_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("length(case_json) < 1048576", name="ck_case_json_length"),
        sa.CheckConstraint("length(options_json) < 65536", name="ck_options_json_length"),
        sa.ForeignKeyConstraint(["problem_id"], ["problem.id"]),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("device_family", "kernel", "problem_id", name="uq_job"),
    )


def _hash_shapes() -> None:
    connection = op.get_bind()
    table = sa.table("measurement", sa.column("shape_json"), sa.column("shape_sha256"))
    for shape in connection.execute(sa.select(table.c.shape_json).distinct()).scalars().all():
        digest = hashlib.sha256(shape.encode()).hexdigest()
        change = table.update().where(table.c.shape_json == shape)
        connection.execute(change.values(shape_sha256=digest))


def downgrade() -> None:
    """Back to the first schema; jobs are dropped, and so is what only the new columns say."""
    op.drop_table("job")
    op.create_table(
        "job",
        sa.Column("id", _BIG, autoincrement=True, nullable=False),
        sa.Column("device_family", sa.String(256), nullable=False),
        sa.Column("kernel", sa.String(128), nullable=False),
        sa.Column("problem_id", _BIG, nullable=False),
        sa.Column("priority", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(128), nullable=False),
        sa.Column("lease_owner", sa.String(128), nullable=False),
        sa.Column("lease_until_us", sa.BigInteger(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("attempts", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["problem_id"], ["problem.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("device_family", "kernel", "problem_id", name="uq_job"),
    )
    with op.batch_alter_table("best") as best:
        best.drop_column("confirm_default_ns")
        best.drop_column("confirm_median_ns")
    with op.batch_alter_table("measurement", table_args=_length("shape_json")) as measurement:
        measurement.drop_constraint("uq_measurement", type_="unique")
        measurement.create_unique_constraint("uq_measurement", _BEFORE)
        measurement.drop_column("shape_sha256")
    with op.batch_alter_table("run", table_args=_length("budget_json")) as run:
        run.drop_column("work_sha256")
        run.drop_column("fence")
