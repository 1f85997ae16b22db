"""The tables. One fixed schema; never a table made at run time.

Times in integer ns, instants in UTC epoch us.

The migrations make exactly these tables; a test compares the two. A change here needs a new
migration.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from portattn.tuning_db.snapshot import REVISIONS

VERSION_TABLE = "portattn_version"
HEAD = REVISIONS[-1]

# What measurement.status may be; the T4 exchange format's invalidities map onto these.
STATUSES = (
    "ok",
    "rejected_static",
    "compile_error",
    "compile_timeout",
    "resource",
    "launch_error",
    "run_timeout",
    "crash",
    "wrong_result",
    "nan",
    "oob",
)
SOURCES = ("tuned", "seed", "import", "transfer")
RUN_STATES = ("running", "partial", "failed", "done")
JOB_STATES = ("queued", "leased", "done", "failed")
MAX_CASE_CHARS = 1 << 20

metadata = MetaData()
# SQLite numbers rows only for a column declared INTEGER.
_BIG = BigInteger().with_variant(Integer(), "sqlite")


def _id() -> Column[int]:
    return Column("id", _BIG, primary_key=True, autoincrement=True)


def _sha(name: str, *, unique: bool = False, default: str | None = None) -> Column[str]:
    return Column(name, String(64), nullable=False, unique=unique, server_default=default)


def _text(name: str, length: int = 128) -> Column[str]:
    return Column(name, String(length), nullable=False)


def _int(name: str, default: str | None = None) -> Column[int]:
    return Column(name, BigInteger, nullable=False, server_default=default)


def _ints(names: str) -> list[Column[int]]:
    return [_int(name) for name in names.split()]


def _texts(names: str) -> list[Column[str]]:
    return [_text(name) for name in names.split()]


def _measures(names: str) -> list[Column[int | None]]:
    """Integers that are null where nothing was measured."""
    return [Column(name, BigInteger, nullable=True) for name in names.split()]


def _ref(name: str, target: str, *, nullable: bool = False) -> Column[int]:
    return Column(name, _BIG, ForeignKey(f"{target}.id"), nullable=nullable)


def _json(name: str, most: int = 65536) -> tuple[Column[str], CheckConstraint]:
    """Canonical JSON, bounded."""
    return Column(name, Text, nullable=False), CheckConstraint(
        f"length({name}) < {most}", name=f"ck_{name}_length"
    )


meta = Table(
    "meta",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)

device = Table(
    "device",
    metadata,
    _id(),
    _sha("fp_sha256", unique=True),
    *(_text(name, 256) for name in ("vendor", "kind", "name", "arch")),
    *_ints(
        "sm_count smem_optin_bytes regs_per_sm l2_bytes l3_bytes mem_bytes mem_clock_khz "
        "sm_clock_max_khz power_limit_mw"
    ),
    _text("mig_profile"),
    _int("cores"),
    _int("threads_used"),
    *_json("isa_json"),
    _text("family", 256),
)

toolchain = Table(
    "toolchain",
    metadata,
    _id(),
    _sha("fp_sha256", unique=True),
    *_texts(
        "portattn torch triton ptxas cuda_runtime nvrtc cupy driver compiler_cpu python_minor"
    ),
)

kernel = Table(
    "kernel",
    metadata,
    _id(),
    _text("name"),
    _text("backend"),
    _sha("source_sha256"),
    _sha("space_sha256"),
    _int("space_version"),
    UniqueConstraint("name", "backend", "source_sha256", "space_sha256", name="uq_kernel"),
)

problem = Table(
    "problem",
    metadata,
    _id(),
    _sha("key_sha256", unique=True),
    *(_text(name) for name in ("op", "dtype", "acc_dtype")),
    *_ints("head_dim head_dim_v hq hkv batch_bucket sq_bucket sk_bucket"),
    Column("causal", Boolean, nullable=False),
    _int("window_bucket"),
    _text("mask_kind"),
    _int("sparsity_bucket"),
    _int("block_size"),
    _text("layout"),
    Column("varlen", Boolean, nullable=False),
    Column("deterministic", Boolean, nullable=False),
    _text("features"),
    _int("bucket_version"),
)

config = Table(
    "config",
    metadata,
    _id(),
    _ref("kernel_id", "kernel"),
    *_json("params_json"),
    _sha("params_sha256"),
    UniqueConstraint("kernel_id", "params_sha256", name="uq_config"),
)

run = Table(
    "run",
    metadata,
    Column("id", String(36), primary_key=True),  # a UUID
    _text("host", 256),
    _int("pid"),
    _int("started_us"),
    _int("heartbeat_us"),
    _text("effort"),
    _int("seed"),
    *_json("budget_json"),
    _text("git_sha"),
    _text("argv_sha256"),
    _text("state"),
    # Who continues the run counts this up: what the process before it still writes is refused.
    _int("fence", default="0"),
    _sha("work_sha256", default=""),  # of what the run does: an equal one may continue it
)

measurement = Table(
    "measurement",
    metadata,
    _id(),
    _ref("device_id", "device"),
    _ref("toolchain_id", "toolchain"),
    _ref("config_id", "config"),
    _ref("problem_id", "problem"),
    Column("run_id", String(36), ForeignKey("run.id"), nullable=False),
    _int("round"),
    _text("policy"),
    *_json("shape_json"),
    _text("status"),
    *_measures("median_ns p20_ns p80_ns mean_ns stdev_ns n ci95_lo_ns ci95_hi_ns ref_median_ns"),
    Column("max_abs_err", Float, nullable=True),
    Column("max_rel_err", Float, nullable=True),
    *_measures("compile_ns shared_bytes regs spill_bytes sm_clock_khz_median temp_c"),
    Column("throttled", Boolean, nullable=True),
    Column("error_text", String(2048), nullable=False),
    _int("created_us"),
    _sha("shape_sha256", default=""),  # of shape_json: several shapes of a bucket in one run
    UniqueConstraint(
        *("run_id", "device_id", "config_id", "problem_id", "shape_sha256", "policy", "round"),
        name="uq_measurement",
    ),
)

best = Table(
    "best",
    metadata,
    _ref("device_id", "device"),
    _text("toolchain_class"),
    _text("kernel_name"),
    _ref("problem_id", "problem"),
    _text("policy"),
    _text("backend"),
    _ref("config_id", "config"),
    _int("median_ns"),
    _int("default_ns"),
    Column("gain", Float, nullable=False),
    _int("ci95_lo"),
    _int("ci95_hi"),
    _int("verified_seeds"),
    _text("verified_rule"),
    _text("source"),
    _int("rev"),
    _ref("measurement_id", "measurement", nullable=True),
    _int("updated_us"),
    *_measures("confirm_median_ns confirm_default_ns"),  # in a process of its own; null: imported
    PrimaryKeyConstraint(
        "device_id", "toolchain_class", "kernel_name", "problem_id", "policy", name="pk_best"
    ),
)

# What a fleet's workers have to tune; see `portattn.tuning_db.jobs`.
job = Table(
    "job",
    metadata,
    _id(),
    _text("device_family", 256),
    _text("kernel"),  # "": every kernel
    _ref("problem_id", "problem"),
    *_json("case_json", MAX_CASE_CHARS),
    *_json("options_json"),
    _int("priority"),
    _text("state"),
    _text("lease_owner"),
    _int("lease_until_us"),
    _int("fence"),
    _int("attempts"),
    Column("run_id", String(36), ForeignKey("run.id"), nullable=True),
    _text("error_text", 2048),
    _int("created_us"),
    _int("updated_us"),
    UniqueConstraint("device_family", "kernel", "problem_id", name="uq_job"),
)

miss = Table(
    "miss",
    metadata,
    _ref("device_id", "device"),
    _sha("problem_key_sha256"),
    *_json("problem_json"),
    _int("count"),
    _int("first_us"),
    _int("last_us"),
    _text("served_from"),
    PrimaryKeyConstraint("device_id", "problem_key_sha256", name="pk_miss"),
)

quarantine = Table(
    "quarantine",
    metadata,
    _text("kernel"),
    _sha("params_sha256"),
    _text("device_family", 256),
    _text("reason", 2048),
    _int("count"),
    _int("last_us"),
    PrimaryKeyConstraint("kernel", "params_sha256", "device_family", name="pk_quarantine"),
)
