"""Triton kernels of the training attention (Eq. 7), forward and backward.

A flash attention that walks over packed tokens: the columns of a sample are ordered kept first, so that a row of the output
costs its kept tokens only. Every token's view of itself (the diagonal of G) is one row-wise product, outside the tiles; inside them
"sees" is "stands before". Dropped columns are visited once, in the backward pass, for the gradient of their keep mask.

Scores are kept in base 2. Products of tiles take the inputs' dtype and add up in float32.
"""

import triton
import triton.language as tl

_PADDING = tl.constexpr(2)  # blocks.PADDING
_INF = tl.constexpr(float("inf"))


@triton.jit
def _tile(base, index, stride, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `index` of a [*, D] matrix, 0 where masked."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + index[:, None] * stride + d[None, :]
    return tl.load(pointers, mask=mask[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store_tile(base, index, stride, mask, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    pointers = base + index[:, None] * stride + d[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask[:, None] & (d < D)[None, :])


@triton.jit
def _rows_product(left, right):
    return tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)


@triton.jit
def _block_bounds(rank, first, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """How many packed kept columns all rows of a block see, in whole tiles, and how many its last row sees."""
    shared = tl.load(rank + tl.maximum(first - 1, 0), mask=first > 0, other=0)
    end = tl.load(rank + tl.minimum(first + ROWS, length) - 1)
    return shared // COLUMNS * COLUMNS, end


@triton.jit
def _attend(
    acc, top, total, query, rows, k, v, k_row, v_row, order, start, end, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the packed columns [start, end)."""
    for place in range(start, end, COLUMNS):
        places = place + tl.arange(0, COLUMNS)
        present = places < end
        columns = tl.load(order + places, mask=present, other=0)
        keys = _tile(k, columns, k_row, present, D, BLOCK_D)
        values = _tile(v, columns, v_row, present, D, BLOCK_D)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        if MASKED:
            visible = present[None, :] & (columns[None, :] < rows[:, None])
            scores = tl.where(visible, scores, -_INF)
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        if MASKED:
            anchor = tl.where(new_top == -_INF, 0.0, new_top)
        else:
            anchor = new_top
        weights = tl.exp2(scores * scale - anchor[:, None])
        shrink = tl.exp2(top - anchor)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit
def _forward_kernel(
    q, k, v, out, lse, cap, packing,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    heads, groups, length, scale, max_exponent,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(length, ROWS)
    first = (blocks - 1 - tl.program_id(0) % blocks) * ROWS  # the longest rows first
    slice_ = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = slice_ // heads, slice_ % heads
    order = packing + batch * 3 * length
    rank, kind = order + length, order + 2 * length
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head // groups * k_head
    v += batch * v_batch + head // groups * v_head
    out += batch * o_batch + head * o_head

    rows = first + tl.arange(0, ROWS)
    inside = rows < length
    real = tl.load(kind + rows, mask=inside, other=_PADDING) != _PADDING
    query = _tile(q, rows, q_row, inside, D, BLOCK_D)
    itself = _rows_product(query, _tile(k, rows, k_row, inside, D, BLOCK_D)) * scale
    top = tl.where(real, itself, -_INF)
    total = tl.where(real, 1.0, 0.0)
    acc = tl.where(real[:, None], _tile(v, rows, v_row, inside, D, BLOCK_D).to(tl.float32), 0.0)

    shared, end = _block_bounds(rank, first, length, ROWS, COLUMNS)
    for masked in tl.static_range(2):  # first the columns that all of the rows see
        acc, top, total = _attend(
            acc, top, total, query, rows, k, v, k_row, v_row, order,
            shared if masked else 0, end if masked else shared, scale, masked, D, BLOCK_D, COLUMNS, PRECISION,
        )  # fmt: skip

    some = total > 0
    divisor = tl.where(some, total, 1.0)
    _store_tile(out, rows, o_row, inside, acc / divisor[:, None], D, BLOCK_D)
    # A row that sees nothing: +inf makes all its weights 0 in the backward pass.
    tl.store(lse + slice_ * length + rows, tl.where(some, top + tl.log2(divisor), _INF), mask=inside)
    tl.store(cap + slice_ * length + rows, max_exponent - tl.log2(divisor), mask=inside)


@triton.jit
def _query_gradient(
    acc, query, upstream, lse, delta, rows, k, v, k_row, v_row, order, start, end, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for place in range(start, end, COLUMNS):
        places = place + tl.arange(0, COLUMNS)
        present = places < end
        columns = tl.load(order + places, mask=present, other=0)
        keys = _tile(k, columns, k_row, present, D, BLOCK_D)
        values = _tile(v, columns, v_row, present, D, BLOCK_D)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        if MASKED:
            visible = present[None, :] & (columns[None, :] < rows[:, None])
            scores = tl.where(visible, scores, -_INF)
        weights = tl.exp2(scores * scale - lse[:, None])
        pull = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
        gradient = weights * (pull - delta[:, None])
        acc = tl.dot(gradient.to(keys.dtype), keys, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _query_kernel(
    q, k, v, out, upstream, lse, delta, grad_q, packing,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    u_batch, u_head, u_row, g_batch, g_head, g_row,
    heads, groups, length, scale, scaling,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries, and delta_i = dO_i . O_i for the kernels after this one."""
    blocks = tl.cdiv(length, ROWS)
    first = (blocks - 1 - tl.program_id(0) % blocks) * ROWS
    slice_ = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = slice_ // heads, slice_ % heads
    order = packing + batch * 3 * length
    rank, kind = order + length, order + 2 * length
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head // groups * k_head
    v += batch * v_batch + head // groups * v_head

    rows = first + tl.arange(0, ROWS)
    inside = rows < length
    grad_out = _tile(upstream + batch * u_batch + head * u_head, rows, u_row, inside, D, BLOCK_D)
    result = _tile(out + batch * o_batch + head * o_head, rows, o_row, inside, D, BLOCK_D)
    row_delta = _rows_product(grad_out, result)
    tl.store(delta + slice_ * length + rows, row_delta, mask=inside)
    row_lse = tl.load(lse + slice_ * length + rows, mask=inside, other=_INF)

    real = tl.load(kind + rows, mask=inside, other=_PADDING) != _PADDING
    query = _tile(q, rows, q_row, inside, D, BLOCK_D)
    own_key = _tile(k, rows, k_row, inside, D, BLOCK_D)
    own_value = _tile(v, rows, v_row, inside, D, BLOCK_D)
    weight = tl.where(real, tl.exp2(_rows_product(query, own_key) * scale - row_lse), 0.0)
    acc = (weight * (_rows_product(grad_out, own_value) - row_delta))[:, None] * own_key.to(tl.float32)

    shared, end = _block_bounds(rank, first, length, ROWS, COLUMNS)
    for masked in tl.static_range(2):
        acc = _query_gradient(
            acc, query, grad_out, row_lse, row_delta, rows, k, v, k_row, v_row, order,
            shared if masked else 0, end if masked else shared, scale, masked, D, BLOCK_D, COLUMNS, PRECISION,
        )  # fmt: skip
    _store_tile(grad_q + batch * g_batch + head * g_head, rows, g_row, inside, acc * scaling, D, BLOCK_D)


@triton.jit
def _kept_gradient(
    grad_k, grad_v, grad_keep, keys, values, columns, q, upstream, q_row, u_row, lse, delta, start, end, length, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for first in range(start, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = rows < length
        query = _tile(q, rows, q_row, inside, D, BLOCK_D)
        grad_out = _tile(upstream, rows, u_row, inside, D, BLOCK_D)
        row_lse = tl.load(lse + rows, mask=inside, other=_INF)
        row_delta = tl.load(delta + rows, mask=inside, other=0.0)
        scores = tl.dot(keys, tl.trans(query), input_precision=PRECISION)  # [columns, rows]
        if MASKED:
            scores = tl.where(columns[:, None] <= rows[None, :], scores, -_INF)
        weights = tl.exp2(scores * scale - row_lse[None, :])
        grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
        pull = tl.dot(values, tl.trans(grad_out), input_precision=PRECISION)
        gradient = weights * (pull - row_delta[None, :])
        if MASKED:  # its own row sees a token whether it is kept or not
            grad_keep += tl.sum(tl.where(columns[:, None] < rows[None, :], gradient, 0.0), 1)
        else:
            grad_keep += tl.sum(gradient, 1)
        grad_k = tl.dot(gradient.to(query.dtype), query, grad_k, input_precision=PRECISION)
    return grad_k, grad_v, grad_keep


@triton.jit
def _dropped_gradient(
    grad_keep, keys, values, columns, q, upstream, q_row, u_row, lse, cap, delta, start, end, length, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for first in range(start, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = rows < length
        query = _tile(q, rows, q_row, inside, D, BLOCK_D)
        grad_out = _tile(upstream, rows, u_row, inside, D, BLOCK_D)
        row_lse = tl.load(lse + rows, mask=inside, other=_INF)
        row_cap = tl.load(cap + rows, mask=inside, other=0.0)
        row_delta = tl.load(delta + rows, mask=inside, other=0.0)
        scores = tl.dot(keys, tl.trans(query), input_precision=PRECISION)
        if MASKED:
            scores = tl.where(columns[:, None] < rows[None, :], scores, -_INF)
        weights = tl.exp2(tl.minimum(scores * scale - row_lse[None, :], row_cap[None, :]))
        pull = tl.dot(values, tl.trans(grad_out), input_precision=PRECISION)
        grad_keep += tl.sum(weights * (pull - row_delta[None, :]), 1)
    return grad_keep


@triton.jit
def _rows_that_see(columns, real, length, ROWS: tl.constexpr):
    """Blocks of rows: from the first that sees any of the columns, and from the first that sees them all."""
    start = tl.min(tl.where(real, columns, length)) // ROWS * ROWS
    whole = (tl.max(tl.where(real, columns, 0)) + ROWS) // ROWS * ROWS
    return start, whole


@triton.jit
def _kept_kernel(
    q, k, v, upstream, lse, delta, grad_k, grad_v, grad_keep, packing,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, u_batch, u_head, u_row,
    gk_batch, gk_head, gk_row, gv_batch, gv_head, gv_row,
    kv_heads, groups, length, scale, scaling,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of packed kept columns: keys, values and keep mask."""
    blocks = tl.cdiv(length, COLUMNS)
    slice_ = (tl.program_id(0) // blocks).to(tl.int64)
    batch, kv_head = slice_ // kv_heads, slice_ % kv_heads
    order = packing + batch * 3 * length
    stop = tl.load(order + length + length - 1)  # the number of kept columns
    places = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    if (tl.program_id(0) % blocks) * COLUMNS >= stop:
        return
    present = places < stop
    columns = tl.load(order + places, mask=present, other=0)
    keys = _tile(k + batch * k_batch + kv_head * k_head, columns, k_row, present, D, BLOCK_D)
    values = _tile(v + batch * v_batch + kv_head * v_head, columns, v_row, present, D, BLOCK_D)
    key_gradient = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    value_gradient = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    keep_gradient = tl.zeros([COLUMNS], tl.float32)
    start, whole = _rows_that_see(columns, present, length, ROWS)
    for member in range(groups):
        head = kv_head * groups + member
        of_rows = (batch * kv_heads * groups + head) * length
        queries = q + batch * q_batch + head * q_head
        upstreams = upstream + batch * u_batch + head * u_head
        for whole_rows in tl.static_range(2):  # last the rows that see all of the columns
            key_gradient, value_gradient, keep_gradient = _kept_gradient(
                key_gradient, value_gradient, keep_gradient, keys, values, columns, queries, upstreams, q_row, u_row,
                lse + of_rows, delta + of_rows, whole if whole_rows else start, length if whole_rows else whole, length, scale,
                not whole_rows, D, BLOCK_D, ROWS, PRECISION,
            )  # fmt: skip
    grad_k += batch * gk_batch + kv_head * gk_head
    grad_v += batch * gv_batch + kv_head * gv_head
    _store_tile(grad_k, columns, gk_row, present, key_gradient * scaling, D, BLOCK_D)
    _store_tile(grad_v, columns, gv_row, present, value_gradient, D, BLOCK_D)
    tl.store(grad_keep + slice_ * length + columns, keep_gradient, mask=present)


@triton.jit
def _dropped_kernel(
    q, k, v, upstream, lse, cap, delta, grad_k, grad_v, grad_keep, packing,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, u_batch, u_head, u_row,
    gk_batch, gk_head, gk_row, gv_batch, gv_head, gv_row,
    kv_heads, groups, length, scale, scaling,
    NEED_KEEP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of columns that are not kept: key and value matter to their own row, the keep mask to those behind."""
    blocks = tl.cdiv(length, COLUMNS)
    slice_ = (tl.program_id(0) // blocks).to(tl.int64)
    batch, kv_head = slice_ // kv_heads, slice_ % kv_heads
    order = packing + batch * 3 * length
    rank, kind = order + length, order + 2 * length
    place = tl.load(rank + length - 1) + (tl.program_id(0) % blocks) * COLUMNS
    if place >= length:
        return
    places = place + tl.arange(0, COLUMNS)
    present = places < length
    columns = tl.load(order + places, mask=present, other=0)
    real = tl.load(kind + columns, mask=present, other=_PADDING) != _PADDING
    keys = _tile(k + batch * k_batch + kv_head * k_head, columns, k_row, present, D, BLOCK_D)
    values = _tile(v + batch * v_batch + kv_head * v_head, columns, v_row, present, D, BLOCK_D)
    key_gradient = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    value_gradient = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    for member in range(groups):
        head = kv_head * groups + member
        own_rows = (batch * kv_heads * groups + head) * length + columns
        query = _tile(q + batch * q_batch + head * q_head, columns, q_row, real, D, BLOCK_D)
        grad_out = _tile(upstream + batch * u_batch + head * u_head, columns, u_row, real, D, BLOCK_D)
        own_lse = tl.load(lse + own_rows, mask=real, other=_INF)
        own_delta = tl.load(delta + own_rows, mask=real, other=0.0)
        weight = tl.where(real, tl.exp2(_rows_product(keys, query) * scale - own_lse), 0.0)
        gradient = tl.where(real, weight * (_rows_product(values, grad_out) - own_delta), 0.0)
        value_gradient += weight[:, None] * grad_out.to(tl.float32)
        key_gradient += gradient[:, None] * query.to(tl.float32)
    grad_k += batch * gk_batch + kv_head * gk_head
    grad_v += batch * gv_batch + kv_head * gv_head
    _store_tile(grad_k, columns, gk_row, present, key_gradient * scaling, D, BLOCK_D)
    _store_tile(grad_v, columns, gv_row, present, value_gradient, D, BLOCK_D)

    keep_gradient = tl.zeros([COLUMNS], tl.float32)
    if NEED_KEEP:
        start, whole = _rows_that_see(columns, real, length, ROWS)
        for member in range(groups):
            head = kv_head * groups + member
            of_rows = (batch * kv_heads * groups + head) * length
            queries = q + batch * q_batch + head * q_head
            upstreams = upstream + batch * u_batch + head * u_head
            for whole_rows in tl.static_range(2):
                keep_gradient = _dropped_gradient(
                    keep_gradient, keys, values, columns, queries, upstreams, q_row, u_row, lse + of_rows, cap + of_rows,
                    delta + of_rows, whole if whole_rows else start, length if whole_rows else whole, length, scale,
                    not whole_rows, D, BLOCK_D, ROWS, PRECISION,
                )  # fmt: skip
    tl.store(grad_keep + slice_ * length + columns, tl.where(real, keep_gradient, 0.0), mask=present)
