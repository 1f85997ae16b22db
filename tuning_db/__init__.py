"""The tuning database: what was measured, and the best config for each problem and device.

Modules: ``key`` (the tuning key), ``identity`` (fingerprints), ``schema`` and ``migrations``,
``location`` and ``engine`` (where and how it opens), ``store`` (writes), ``snapshot``, ``seeds``
and ``lookup`` (reads, on the call path), ``exchange`` (JSON export and import). Importing this
package, or ``lookup``, loads no SQLAlchemy.
"""

from portattn.tuning_db.location import TuningDatabaseWarning

__all__ = ["TuningDatabaseWarning"]
