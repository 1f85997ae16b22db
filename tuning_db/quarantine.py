"""Configs that failed on a kind of device: hung, crashed or computed the wrong thing.

They are not tried again there, until the kernel's source changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy

from portattn.tuning_db import schema
from portattn.tuning_db.identity import sha256
from portattn.tuning_db.rows import dialect_insert, now_us, storable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portattn.tuning_db.records import Measurement
    from portattn.tuning_db.store import Store

_SOURCE_CHARS = 16  # of the hash: enough to tell two sources of one kernel apart


def _kernel(name: str, source_sha256: str) -> str:
    return f"{name}@{source_sha256[:_SOURCE_CHARS]}"


def params_in(store: Store, kernel: str, source_sha256: str, family: str) -> frozenset[str]:
    """Hashes (`identity.sha256`) of a kernel's configs that are in quarantine for a family."""
    table = schema.quarantine
    query = sqlalchemy.select(table.c.params_sha256).where(
        table.c.kernel == _kernel(kernel, source_sha256), table.c.device_family == family
    )
    with store.transaction() as connection:
        return frozenset(connection.execute(query).scalars())


def add(
    store: Store, kernel: str, source_sha256: str, family: str, failed: Sequence[Measurement]
) -> None:
    """Put configs into quarantine; one that is there is counted."""
    table = schema.quarantine
    with store.transaction() as connection:
        # One order for all, so that two tuners never wait for each other.
        for one in sorted(failed, key=lambda measured: sha256(measured.params)):
            insert = dialect_insert(connection, table).values(
                kernel=_kernel(kernel, source_sha256),
                params_sha256=sha256(one.params),
                device_family=family,
                reason=storable(f"{one.status}: {one.error}"),
                count=1,
                last_us=now_us(),
            )
            connection.execute(
                insert.on_conflict_do_update(
                    index_elements=[column.name for column in table.primary_key],
                    set_={
                        "reason": insert.excluded.reason,
                        "count": table.c.count + 1,
                        "last_us": insert.excluded.last_us,
                    },
                )
            )
