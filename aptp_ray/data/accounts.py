"""Rows in = rows out + rejected: the sums of an encoded split, how they are told, and when they are too bad."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from aptp_ray.config import ConfigError
from aptp_ray.data.ledger import Entry

_WORST = 5  # shards that the summary names
_REASONS = 12  # kinds of reasons that it names


class Accounts:
    """The sums of a split's ledger."""

    def __init__(self, label: str, entries: Sequence[Entry], views: int) -> None:
        """Adds up.

        Raises:
            RuntimeError: if a unit's sums do not add up: rows were lost or doubled.
        """
        self._label, self._entries, self._views = label, entries, views
        self._rows_in = sum(entry.rows_in for entry in entries)
        self._rows = sum(entry.rows for entry in entries)
        self._rejected = sum(len(entry.rejected) for entry in entries)
        for entry in entries:
            if entry.rows != views * (entry.rows_in - len(entry.rejected)) or entry.rows != sum(entry.files.values()):
                raise RuntimeError(
                    f"rows of {entry.name} were lost or doubled: {entry.rows_in} in, {len(entry.rejected)} rejected, "
                    f"{entry.rows} out in {views} views, {sum(entry.files.values())} in files"
                )

    def counts(self) -> dict[str, int]:
        return {"rows_in": self._rows_in, "rows": self._rows, "rejected": self._rejected, "views": self._views}

    def shards(self) -> dict[str, list[int]]:
        """Returns [rows in, rows, rejected] of each shard."""
        return {entry.name: [entry.rows_in, entry.rows, len(entry.rejected)] for entry in self._entries}

    def reasons(self) -> Counter[str]:
        """Counts reasons by their kind: what stands before the first colon."""
        return Counter(reason.partition(":")[0] for entry in self._entries for _, reason in entry.rejected)

    def summary(self) -> str:
        """Returns a table: totals, reasons, and the shards that lost most."""
        share = self._rejected / max(1, self._rows_in)
        views = f", {self._views} views each" if self._views > 1 else ""
        lines = [
            f"{self._label}: {self._rows_in:,} rows in, {self._rows:,} out{views}, {self._rejected:,} rejected "
            f"({share:.2%}), {len(self._entries):,} shards"
        ]
        if self._rejected:
            lines += [f"{'rejected':>10}  reason"]
            reasons = self.reasons().most_common()
            lines += [f"{count:>10,}  {reason}" for reason, count in reasons[:_REASONS]]
            others = sum(count for _, count in reasons[_REASONS:])
            lines += [f"{others:>10,}  (other reasons)"] if others else []
            lines += [f"{'rejected':>10} {'rows in':>10}  worst shards"]
            worst = sorted((entry for entry in self._entries if entry.rejected), key=lambda entry: -len(entry.rejected))
            lines += [f"{len(entry.rejected):>10,} {entry.rows_in:>10,}  {entry.name}" for entry in worst[:_WORST]]
            lines += [f"{'':>22} ({len(worst) - _WORST:,} more have rejected rows)"] if len(worst) > _WORST else []
        return "\n".join(lines)

    def check(self, max_rejected_fraction: float, listed: str) -> None:
        """Compares what was rejected with the bound.

        Args:
            max_rejected_fraction: of rows; and of shards, as to those out of reach: how many rows those hold is not known.
            listed: where the rejected rows are listed.

        Raises:
            ConfigError: if there is no usable row, or more than the bound is rejected.
        """
        common = "; ".join(f"{count:,} x {reason}" for reason, count in self.reasons().most_common(3))
        if not self._rows:
            first = self._entries[0].name
            raise ConfigError(
                f"no row of {self._label} could be encoded: {common or 'the source has no rows'} "
                f"({len(self._entries):,} shards, the first is {first}): check data.source"
            )
        unreachable = sum(entry.unreachable for entry in self._entries)
        share = max(self._rejected / self._rows_in, unreachable / len(self._entries))
        if share > max_rejected_fraction:
            raise ConfigError(
                f"{self._label}: {self._rejected:,} of {self._rows_in:,} rows were rejected, {unreachable:,} of "
                f"{len(self._entries):,} shards were unreachable ({common}): more than "
                f"encode.max_rejected_fraction={max_rejected_fraction:g}. They are listed in {listed}; what was encoded is "
                "kept: mend the source, or raise the bound and run the same command again"
            )
