"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create every table."""
    op.create_table(
        "device",
        sa.Column("id", _BIG, autoincrement=True, nullable=False),
        sa.Column("fp_sha256", sa.String(length=64), nullable=False),
        sa.Column("vendor", sa.String(length=256), nullable=False),
        sa.Column("kind", sa.String(length=256), nullable=False),
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("arch", sa.String(length=256), nullable=False),
        sa.Column("sm_count", sa.BigInteger(), nullable=False),
        sa.Column("smem_optin_bytes", sa.BigInteger(), nullable=False),
        sa.Column("regs_per_sm", sa.BigInteger(), nullable=False),
        sa.Column("l2_bytes", sa.BigInteger(), nullable=False),
        sa.Column("l3_bytes", sa.BigInteger(), nullable=False),
        sa.Column("mem_bytes", sa.BigInteger(), nullable=False),
        sa.Column("mem_clock_khz", sa.BigInteger(), nullable=False),
        sa.Column("sm_clock_max_khz", sa.BigInteger(), nullable=False),
        sa.Column("power_limit_mw", sa.BigInteger(), nullable=False),
        sa.Column("mig_profile", sa.String(length=128), nullable=False),
        sa.Column("cores", sa.BigInteger(), nullable=False),
        sa.Column("threads_used", sa.BigInteger(), nullable=False),
        sa.Column("isa_json", sa.Text(), nullable=False),
        sa.Column("family", sa.String(length=256), nullable=False),
        sa.CheckConstraint("length(isa_json) < 65536", name="ck_isa_json_length"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("fp_sha256"),
    )
    op.create_table(
        "kernel",
        sa.Column("id", _BIG, autoincrement=True, nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("backend", sa.String(length=128), nullable=False),
        sa.Column("source_sha256", sa.String(length=64), nullable=False),
        sa.Column("space_sha256", sa.String(length=64), nullable=False),
        sa.Column("space_version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name", "backend", "source_sha256", "space_sha256", name="uq_kernel"),
    )
    op.create_table(
        "meta",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_table(
        "problem",
        sa.Column("id", _BIG, autoincrement=True, nullable=False),
        sa.Column("key_sha256", sa.String(length=64), nullable=False),
        sa.Column("op", sa.String(length=128), nullable=False),
        sa.Column("dtype", sa.String(length=128), nullable=False),
        sa.Column("acc_dtype", sa.String(length=128), nullable=False),
        sa.Column("head_dim", sa.BigInteger(), nullable=False),
        sa.Column("head_dim_v", sa.BigInteger(), nullable=False),
        sa.Column("hq", sa.BigInteger(), nullable=False),
        sa.Column("hkv", sa.BigInteger(), nullable=False),
        sa.Column("batch_bucket", sa.BigInteger(), nullable=False),
        sa.Column("sq_bucket", sa.BigInteger(), nullable=False),
        sa.Column("sk_bucket", sa.BigInteger(), nullable=False),
        sa.Column("causal", sa.Boolean(), nullable=False),
        sa.Column("window_bucket", sa.BigInteger(), nullable=False),
        sa.Column("mask_kind", sa.String(length=128), nullable=False),
        sa.Column("sparsity_bucket", sa.BigInteger(), nullable=False),
        sa.Column("block_size", sa.BigInteger(), nullable=False),
        sa.Column("layout", sa.String(length=128), nullable=False),
        sa.Column("varlen", sa.Boolean(), nullable=False),
        sa.Column("deterministic", sa.Boolean(), nullable=False),
        sa.Column("features", sa.String(length=128), nullable=False),
        sa.Column("bucket_version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("key_sha256"),
    )
    op.create_table(
        "quarantine",
        sa.Column("kernel", sa.String(length=128), nullable=False),
        sa.Column("params_sha256", sa.String(length=64), nullable=False),
        sa.Column("device_family", sa.String(length=256), nullable=False),
        sa.Column("reason", sa.String(length=2048), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("last_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("kernel", "params_sha256", "device_family", name="pk_quarantine"),
    )
    op.create_table(
        "run",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("host", sa.String(length=256), nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=False),
        sa.Column("started_us", sa.BigInteger(), nullable=False),
        sa.Column("heartbeat_us", sa.BigInteger(), nullable=False),
        sa.Column("effort", sa.String(length=128), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("budget_json", sa.Text(), nullable=False),
        sa.Column("git_sha", sa.String(length=128), nullable=False),
        sa.Column("argv_sha256", sa.String(length=128), nullable=False),
        sa.Column("state", sa.String(length=128), nullable=False),
        sa.CheckConstraint("length(budget_json) < 65536", name="ck_budget_json_length"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "toolchain",
        sa.Column("id", _BIG, autoincrement=True, nullable=False),
        sa.Column("fp_sha256", sa.String(length=64), nullable=False),
        sa.Column("portattn", sa.String(length=128), nullable=False),
        sa.Column("torch", sa.String(length=128), nullable=False),
        sa.Column("triton", sa.String(length=128), nullable=False),
        sa.Column("ptxas", sa.String(length=128), nullable=False),
        sa.Column("cuda_runtime", sa.String(length=128), nullable=False),
        sa.Column("nvrtc", sa.String(length=128), nullable=False),
        sa.Column("cupy", sa.String(length=128), nullable=False),
        sa.Column("driver", sa.String(length=128), nullable=False),
        sa.Column("compiler_cpu", sa.String(length=128), nullable=False),
        sa.Column("python_minor", sa.String(length=128), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("fp_sha256"),
    )
    op.create_table(
        "config",
        sa.Column("id", _BIG, autoincrement=True, nullable=False),
        sa.Column("kernel_id", _BIG, nullable=False),
        sa.Column("params_json", sa.Text(), nullable=False),
        sa.Column("params_sha256", sa.String(length=64), nullable=False),
        sa.CheckConstraint("length(params_json) < 65536", name="ck_params_json_length"),
        sa.ForeignKeyConstraint(
            ["kernel_id"],
            ["kernel.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("kernel_id", "params_sha256", name="uq_config"),
    )
    op.create_table(
        "job",
        sa.Column("id", _BIG, autoincrement=True, nullable=False),
        sa.Column("device_family", sa.String(length=256), nullable=False),
        sa.Column("kernel", sa.String(length=128), nullable=False),
        sa.Column("problem_id", _BIG, nullable=False),
        sa.Column("priority", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=128), nullable=False),
        sa.Column("lease_owner", sa.String(length=128), nullable=False),
        sa.Column("lease_until_us", sa.BigInteger(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("attempts", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["problem_id"],
            ["problem.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("device_family", "kernel", "problem_id", name="uq_job"),
    )
    op.create_table(
        "miss",
        sa.Column("device_id", _BIG, nullable=False),
        sa.Column("problem_key_sha256", sa.String(length=64), nullable=False),
        sa.Column("problem_json", sa.Text(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("first_us", sa.BigInteger(), nullable=False),
        sa.Column("last_us", sa.BigInteger(), nullable=False),
        sa.Column("served_from", sa.String(length=128), nullable=False),
        sa.CheckConstraint("length(problem_json) < 65536", name="ck_problem_json_length"),
        sa.ForeignKeyConstraint(
            ["device_id"],
            ["device.id"],
        ),
        sa.PrimaryKeyConstraint("device_id", "problem_key_sha256", name="pk_miss"),
    )
    op.create_table(
        "measurement",
        sa.Column("id", _BIG, autoincrement=True, nullable=False),
        sa.Column("device_id", _BIG, nullable=False),
        sa.Column("toolchain_id", _BIG, nullable=False),
        sa.Column("config_id", _BIG, nullable=False),
        sa.Column("problem_id", _BIG, nullable=False),
        sa.Column("run_id", sa.String(length=36), nullable=False),
        sa.Column("round", sa.BigInteger(), nullable=False),
        sa.Column("policy", sa.String(length=128), nullable=False),
        sa.Column("shape_json", sa.Text(), nullable=False),
        sa.Column("status", sa.String(length=128), nullable=False),
        sa.Column("median_ns", sa.BigInteger(), nullable=True),
        sa.Column("p20_ns", sa.BigInteger(), nullable=True),
        sa.Column("p80_ns", sa.BigInteger(), nullable=True),
        sa.Column("mean_ns", sa.BigInteger(), nullable=True),
        sa.Column("stdev_ns", sa.BigInteger(), nullable=True),
        sa.Column("n", sa.BigInteger(), nullable=True),
        sa.Column("ci95_lo_ns", sa.BigInteger(), nullable=True),
        sa.Column("ci95_hi_ns", sa.BigInteger(), nullable=True),
        sa.Column("ref_median_ns", sa.BigInteger(), nullable=True),
        sa.Column("max_abs_err", sa.Float(), nullable=True),
        sa.Column("max_rel_err", sa.Float(), nullable=True),
        sa.Column("compile_ns", sa.BigInteger(), nullable=True),
        sa.Column("shared_bytes", sa.BigInteger(), nullable=True),
        sa.Column("regs", sa.BigInteger(), nullable=True),
        sa.Column("spill_bytes", sa.BigInteger(), nullable=True),
        sa.Column("sm_clock_khz_median", sa.BigInteger(), nullable=True),
        sa.Column("temp_c", sa.BigInteger(), nullable=True),
        sa.Column("throttled", sa.Boolean(), nullable=True),
        sa.Column("error_text", sa.String(length=2048), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("length(shape_json) < 65536", name="ck_shape_json_length"),
        sa.ForeignKeyConstraint(
            ["config_id"],
            ["config.id"],
        ),
        sa.ForeignKeyConstraint(
            ["device_id"],
            ["device.id"],
        ),
        sa.ForeignKeyConstraint(
            ["problem_id"],
            ["problem.id"],
        ),
        sa.ForeignKeyConstraint(
            ["run_id"],
            ["run.id"],
        ),
        sa.ForeignKeyConstraint(
            ["toolchain_id"],
            ["toolchain.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint(
            "run_id", "device_id", "config_id", "problem_id", "round", name="uq_measurement"
        ),
    )
    op.create_table(
        "best",
        sa.Column("device_id", _BIG, nullable=False),
        sa.Column("toolchain_class", sa.String(length=128), nullable=False),
        sa.Column("kernel_name", sa.String(length=128), nullable=False),
        sa.Column("problem_id", _BIG, nullable=False),
        sa.Column("policy", sa.String(length=128), nullable=False),
        sa.Column("backend", sa.String(length=128), nullable=False),
        sa.Column("config_id", _BIG, nullable=False),
        sa.Column("median_ns", sa.BigInteger(), nullable=False),
        sa.Column("default_ns", sa.BigInteger(), nullable=False),
        sa.Column("gain", sa.Float(), nullable=False),
        sa.Column("ci95_lo", sa.BigInteger(), nullable=False),
        sa.Column("ci95_hi", sa.BigInteger(), nullable=False),
        sa.Column("verified_seeds", sa.BigInteger(), nullable=False),
        sa.Column("verified_rule", sa.String(length=128), nullable=False),
        sa.Column("source", sa.String(length=128), nullable=False),
        sa.Column("rev", sa.BigInteger(), nullable=False),
        sa.Column("measurement_id", _BIG, nullable=True),
        sa.Column("updated_us", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["config_id"],
            ["config.id"],
        ),
        sa.ForeignKeyConstraint(
            ["device_id"],
            ["device.id"],
        ),
        sa.ForeignKeyConstraint(
            ["measurement_id"],
            ["measurement.id"],
        ),
        sa.ForeignKeyConstraint(
            ["problem_id"],
            ["problem.id"],
        ),
        sa.PrimaryKeyConstraint(
            "device_id", "toolchain_class", "kernel_name", "problem_id", "policy", name="pk_best"
        ),
    )
    op.execute(
        "INSERT INTO meta (key, value) VALUES ('created_by', 'portattn'), ('time_unit', 'ns')"
    )


def downgrade() -> None:
    """Drop every table."""
    tables = "best measurement quarantine miss job run config problem kernel toolchain device meta"
    for table in tables.split():
        op.drop_table(table)
