"""The body for masks with a cover: each block of queries meets only the keys that it may need.

Queries and keys are cut into blocks aligned by position. A query block's keys are gathered: the
band of blocks around its own and the drawn blocks (one piece), each set of global keys (one piece
each), and the keys of its residue class (one piece). A pair that lies in two pieces counts in the
first of: global keys in order, band and drawn blocks, residue class. Rows of global queries are
computed densely and put over the result. Time and memory are O(seqlen_q * keys per block).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from portattn.export.block_columns import block_columns
from portattn.export.body_dense import dense_rows
from portattn.export.expression import Opcode
from portattn.export.predicates import Coordinates

if TYPE_CHECKING:
    from portattn.export.cover import Cover, Positions
    from portattn.export.emitter import Value
    from portattn.export.scores import Scorer, Weights


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """Scores of every query block with some keys, and how its weights meet the values."""

    scores: Value
    nonempty: Value | None
    num_keys: Value
    apply: _Apply


class _Apply:
    """weights [batch, num_kv_heads, group, blocks, block, keys] -> output of the same blocks."""

    def __init__(self, kind: str, values: Value) -> None:
        self.kind = kind
        self.values = values

    def __call__(self, weights: Value) -> Value:
        if self.kind != "residue":
            return weights @ self.values
        turned = weights.transpose(0, 1, 2, 4, 3, 5) @ self.values
        return turned.transpose(0, 1, 2, 4, 3, 5)


class GatheredBody:
    """Writes one body."""

    def __init__(self, scorer: Scorer, cover: Cover) -> None:
        self.scorer = scorer
        self.cover = cover
        self.reads_tables = any(
            node.opcode in (Opcode.BLOCK_TABLE, Opcode.SEGMENTS, Opcode.DOCUMENTS)
            for node in scorer.expression.walk()
        )
        inputs, block = scorer.inputs, cover.block
        self.emitter = scorer.emitter
        self.batch, self.num_heads = inputs.query.dim(0), inputs.query.dim(1)
        self.seqlen_q, self.seqlen_k = inputs.query.dim(2), inputs.key.dim(2)
        self.head_dim, self.head_dim_v = inputs.query.dim(3), inputs.value.dim(3)
        self.num_kv_heads, self.group = inputs.group
        # Blocks start at multiples of the block size of the key positions.
        self.before = inputs.q_offset % block
        self.num_blocks = (self.before + self.seqlen_q + (block - 1)) // block
        self.num_key_blocks = ((self.seqlen_k + (block - 1)) // block).maximum(1)
        first_block = (inputs.q_offset - self.before)._binary("Div", block)
        self.block_index = self.emitter.range(self.num_blocks) + first_block
        self.offset_in_block = self.emitter.range(block)
        # int64 [blocks, block, 1]
        self.positions = (self.block_index * block).unsqueeze(
            1, 2
        ) + self.offset_in_block.unsqueeze(1)
        self.rows = self.positions - inputs.q_offset

    def write(self) -> tuple[Value, Value | None]:
        """The output [batch, num_heads, seqlen_q, head_dim_v] and the LSE or None."""
        pieces = [
            self._global_piece(index, keys) for index, keys in enumerate(sorted(self.cover.keys))
        ]
        if self.cover.num_band_blocks or self.cover.random or self.cover.tables:
            pieces.append(self._block_piece())
        if self.cover.residue:
            pieces.append(self._residue_piece())
        scores = self.emitter.concat([piece.scores for piece in pieces], -1)
        weights = self.scorer.softmax(scores, [piece.nonempty for piece in pieces], rank=3)
        output = weights.finish(self._apply(pieces, weights))
        output = self._rows_of(output, self.head_dim_v)
        lse = None if weights.lse is None else self._rows_of(weights.lse, 1)
        if lse is not None:
            lse = lse.reshape(self.batch, self.num_heads, self.seqlen_q)
        for queries in sorted(self.cover.queries):
            output, lse = self._with_global_rows(queries, output, lse)
        return output, lse

    def _apply(self, pieces: list[_Piece], weights: Weights) -> Value:
        if len(pieces) == 1:
            return pieces[0].apply(weights.value)
        sizes = self.emitter.concat([piece.num_keys for piece in pieces], 0)
        parts = self.emitter.ops("Split", weights.value, sizes, count=len(pieces), axis=-1)
        output = pieces[0].apply(parts[0])
        for piece, part in zip(pieces[1:], parts[1:], strict=True):
            output = output + piece.apply(part)
        return output

    def _query_blocks(self) -> Value:
        """[batch, num_kv_heads, group, blocks, block, head_dim], zeros where there is no row."""
        after = self.num_blocks * self.cover.block - self.before - self.seqlen_q
        padded = self.scorer.inputs.query.pad(self.before, after, axis=2)
        return padded.reshape(
            self.batch,
            self.num_kv_heads,
            self.group,
            self.num_blocks,
            self.cover.block,
            self.head_dim,
        )

    def _rows_of(self, blocks: Value, width: Value | int) -> Value:
        """[batch, num_heads, seqlen_q, width] from rows in blocks."""
        length = self.num_blocks * self.cover.block
        flat = blocks.reshape(self.batch, self.num_heads, length, width)
        return flat.slice(self.before, self.before + self.seqlen_q, axis=2)

    def _key_blocks(self, keys: Value, width: Value) -> Value:
        """[batch, num_kv_heads, key blocks, block, width] with zeros at the end."""
        after = self.num_key_blocks * self.cover.block - self.seqlen_k
        padded = keys.pad(0, after, axis=2)
        return padded.reshape(
            self.batch, self.num_kv_heads, self.num_key_blocks, self.cover.block, width
        )

    def _block_piece(self) -> _Piece:
        """The band around each block, and the drawn blocks outside it."""
        cover, block = self.cover, self.cover.block
        table = block_columns(self.scorer, cover, self.block_index)
        found = table.maximum(0).minimum(self.num_key_blocks - 1)
        num_keys = table.dim(1) * block

        def gathered(tensor: Value, width: Value) -> Value:
            blocks = self._key_blocks(tensor, width).gather(found, 2)
            return blocks.reshape(
                self.batch, self.num_kv_heads, 1, self.num_blocks, num_keys, width
            )

        start = table * block
        keys = start.unsqueeze(2) + self.offset_in_block
        keys = keys.reshape(self.num_blocks, 1, num_keys)
        if cover.random or cover.tables:
            difference = keys - self.positions
        else:
            # The same for every block: the band's masks are made once.
            first = self.emitter.range(num_keys, cover.low * block)
            difference = first.unsqueeze(0, 1) - self.offset_in_block.unsqueeze(0, 2)
        at = self._coordinates(keys, difference)
        inside = (keys >= 0) & (keys < self.seqlen_k)
        for positions in self.cover.keys:
            inside = inside & ~self._contains(positions, keys)
        products = self._query_blocks() @ gathered(
            self.scorer.inputs.key, self.head_dim
        ).transpose(0, 1, 2, 3, 5, 4)
        values = gathered(self.scorer.inputs.value, self.head_dim_v)
        return self._piece(products, at, inside, num_keys, _Apply("block", values))

    def _global_piece(self, index: int, positions: Positions) -> _Piece:
        """Keys that every block meets."""
        found = self._existing(positions, 0, self.seqlen_k)
        may_be_empty = positions.kind != "range" or positions.operands[0] > 0
        if may_be_empty:
            # And -1, which no row keeps: ONNX Runtime 1.23 cannot broadcast over no keys at all.
            none = self.emitter.range(self.seqlen_k.minimum(1), -1)
            found = self.emitter.concat([found, none], 0)
        keys = found.unsqueeze(0, 1)
        at = self._coordinates(keys, keys - self.positions)
        inside = keys >= 0 if may_be_empty else None
        for earlier in sorted(self.cover.keys)[:index]:
            outside = ~self._contains(earlier, keys)
            inside = outside if inside is None else inside & outside
        found = found.maximum(0)
        rows = self.group * self.num_blocks * self.cover.block
        flat = self._query_blocks().reshape(self.batch, self.num_kv_heads, rows, self.head_dim)
        count = found.dim(0)
        products = flat @ self.scorer.inputs.key.gather(found, 2).transpose(0, 1, 3, 2)
        products = products.reshape(
            self.batch, self.num_kv_heads, self.group, self.num_blocks, self.cover.block, count
        )
        values = self.scorer.inputs.value.gather(found, 2).unsqueeze(2, 3)
        return self._piece(products, at, inside, count, _Apply("global", values))

    def _residue_piece(self) -> _Piece:
        """Keys at the same offset in every block, for each offset."""
        block = self.cover.block
        steps = self.emitter.range(self.num_key_blocks)
        keys = (steps * block).unsqueeze(0, 1) + self.offset_in_block.unsqueeze(0, 2)
        at = self._coordinates(keys, keys - self.positions)
        inside = keys < self.seqlen_k
        if self.cover.num_band_blocks:
            distance = steps.unsqueeze(0, 1) - self.block_index.unsqueeze(1, 2)
            inside = inside & ((distance < self.cover.low) | (distance > self.cover.high))
        for positions in self.cover.keys:
            inside = inside & ~self._contains(positions, keys)
        queries = self._query_blocks().transpose(0, 1, 2, 4, 3, 5)
        by_offset = self._key_blocks(self.scorer.inputs.key, self.head_dim).transpose(
            0, 1, 3, 4, 2
        )
        products = (queries @ by_offset.unsqueeze(2)).transpose(0, 1, 2, 4, 3, 5)
        values = self._key_blocks(self.scorer.inputs.value, self.head_dim_v)
        values = values.transpose(0, 1, 3, 2, 4).unsqueeze(2)
        return self._piece(products, at, inside, self.num_key_blocks, _Apply("residue", values))

    def _coordinates(self, keys: Value, difference: Value) -> Coordinates:
        """Of all query blocks and these keys; tables are read inside the lengths only."""
        first = self.scorer.inputs.q_offset
        at = Coordinates(self.positions, keys, difference, 3, self.seqlen_k)
        if not self.reads_tables:
            return at
        return dataclasses.replace(
            at,
            table_query=self.positions.maximum(first).minimum(first + self.seqlen_q - 1),
            table_key=keys.maximum(0).minimum(self.seqlen_k - 1),
        )

    def _piece(
        self,
        products: Value,
        at: Coordinates,
        inside: Value | None,
        num_keys: Value,
        apply: _Apply,
    ) -> _Piece:
        keep = self.scorer.predicate(at)
        if inside is not None:
            keep = self.scorer.writer.both(keep, inside, per_batch_head=False)
        scores, nonempty = self.scorer.scores(products, at, keep, self.rows)
        return _Piece(scores, nonempty, num_keys, apply)

    def _existing(self, positions: Positions, first: Value | int, length: Value) -> Value:
        """int64 [count]: those of the positions in [first, first + length)."""
        kind, operands = positions.kind, positions.operands
        if kind == "modulo":
            period, low, high = operands
            starts = self.emitter.range((length + (period - 1)) // period) * period
            every = starts.unsqueeze(1) + self.emitter.range(high - low, low)
            every = every.reshape(starts.dim(0) * (high - low))
        elif kind == "range":
            every = self.emitter.range(max(0, operands[1] - operands[0]), operands[0])
        else:
            every = self.scorer.writer.positions(operands[0])
        valid = (every >= first) & (every < length + first)
        return self.emitter.op("Compress", every, valid, axis=0)

    def _contains(self, positions: Positions, at: Value) -> Value:
        if positions.kind == "modulo":
            period, low, high = positions.operands
            residue = at % period
            return (residue >= low) & (residue < high)
        if positions.kind == "range":
            return (at >= positions.operands[0]) & (at < positions.operands[1])
        return self.scorer.writer.is_member(positions.operands[0], at)

    def _with_global_rows(
        self, queries: Positions, output: Value, lse: Value | None
    ) -> tuple[Value, Value | None]:
        """The output with the rows of these queries computed over all keys."""
        inputs = self.scorer.inputs
        positions = self._existing(queries, inputs.q_offset, self.seqlen_q)
        # Row 0 too, which is harmless: ONNX Runtime 1.23 cannot broadcast over no rows at all.
        rows = self.emitter.concat(
            [positions - inputs.q_offset, self.emitter.range(self.seqlen_q.minimum(1))], 0
        )
        positions = rows + inputs.q_offset
        chosen, chosen_lse = dense_rows(
            self.scorer, inputs.query.gather(rows, 2), rows.unsqueeze(1), positions.unsqueeze(1)
        )
        index = self.emitter.op("Expand", rows.unsqueeze(1), self.emitter.op("Shape", chosen))
        output = self.emitter.op("ScatterElements", output, index, chosen, axis=2)
        if lse is not None and chosen_lse is not None:
            index = self.emitter.op("Expand", rows, self.emitter.op("Shape", chosen_lse))
            lse = self.emitter.op("ScatterElements", lse, index, chosen_lse, axis=2)
        return output, lse


def gathered_body(scorer: Scorer, cover: Cover) -> tuple[Value, Value | None]:
    """Attention through a cover of the mask."""
    return GatheredBody(scorer, cover).write()
