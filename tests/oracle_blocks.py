# SPDX-License-Identifier: Apache-2.0
"""Block selection by its written rules, in float64 and plain loops; nothing of the package.

A choice comes with its margin: how far the nearest decision is from being another one, so that a
test may ask for equality exactly where float32 scores cannot have decided otherwise.
"""

import math

import torch


class Grid:
    """Tiles and blocks, as the rules speak of them."""

    def __init__(self, seqlen_q, seqlen_k, block_m, block_n, q_offset, causal, sink=0, local=0):
        self.tiles = math.ceil(seqlen_q / block_m)
        self.blocks = math.ceil(seqlen_k / block_n)
        self.diagonals = []
        for tile in range(self.tiles):
            last_row = min((tile + 1) * block_m, seqlen_q) - 1
            self.diagonals.append(math.floor((last_row + q_offset) / block_n))
        self.causal, self.sink, self.local = causal, sink, local

    def allowed(self, tile):
        return [j for j in range(self.blocks) if not self.causal or j <= self.diagonals[tile]]

    def forced(self, tile):
        near = range(self.diagonals[tile] - self.local + 1, self.diagonals[tile] + 1)
        return [j for j in self.allowed(tile) if j < self.sink or j in near]


def clean(score):
    return -math.inf if math.isnan(score) else score


def softmax(scores):
    top = max(scores, default=-math.inf)
    if top == -math.inf:
        return [0.0] * len(scores)
    weights = [math.exp(s - top) for s in scores]
    return [w / math.fsum(weights) for w in weights]


def top_k(scores, grid, budget):
    """scores: rows of floats [tiles][blocks]; budget(tile)."""
    chosen, margin = [], math.inf
    for tile in range(grid.tiles):
        forced = grid.forced(tile)
        free = [j for j in grid.allowed(tile) if j not in forced]
        free.sort(key=lambda j: (-clean(scores[tile][j]), j))
        count = max(0, budget(tile) - len(forced))
        if 0 < count < len(free):
            margin = min(margin, scores[tile][free[count - 1]] - scores[tile][free[count]])
        chosen.append(set(forced) | set(free[:count]))
    return chosen, margin


def _cover(masses, forced, share):
    """Keys of the dict `masses` (in index order): forced ones, then the fewest that cover."""
    total = math.fsum(masses.values())
    covered = math.fsum(masses[x] for x in forced)
    kept, margin = set(forced), math.inf
    order = sorted((x for x in masses if x not in kept), key=lambda x: -masses[x])  # stable
    for x in order:
        margin = min(margin, abs(covered - share * total))
        if not covered < share * total:
            last = [masses[y] for y in order if y in kept]
            if last:
                margin = min(margin, min(last) - masses[x])
            break
        kept.add(x)
        covered += masses[x]
    return kept, margin


def top_p(scores, grid, share, *, logits, whole=False):
    masses = []
    for tile in range(grid.tiles):
        allowed = grid.allowed(tile)
        row = [clean(scores[tile][j]) for j in allowed]
        weights = softmax(row) if logits else [max(s, 0.0) for s in row]
        masses.append(dict(zip(allowed, weights, strict=True)))
    if share >= 1:
        return [set(row) for row in masses], math.inf
    if whole:
        flat = {(t, j): m for t, row in enumerate(masses) for j, m in row.items()}
        forced = [(t, j) for t in range(grid.tiles) for j in grid.forced(t)]
        kept, margin = _cover(flat, forced, share)
        return [{j for t, j in kept if t == tile} for tile in range(grid.tiles)], margin
    rows = [_cover(masses[t], grid.forced(t), share) for t in range(grid.tiles)]
    return [row[0] for row in rows], min((row[1] for row in rows), default=math.inf)


def threshold(scores, grid, level):
    chosen, margin = [], math.inf
    for tile in range(grid.tiles):
        allowed = grid.allowed(tile)
        probs = softmax([clean(scores[tile][j]) for j in allowed])
        margin = min([margin, *(abs(p - level) for p in probs)])
        above = {j for j, p in zip(allowed, probs, strict=True) if p > level}
        chosen.append(above | set(grid.forced(tile)))
    return chosen, margin


def means(x, block):
    """x: float64 [seqlen, dim]."""
    return torch.stack([x[i : i + block].mean(0) for i in range(0, len(x), block)])


def pooled_scores(q, k, block_m, block_n, scale):
    return (means(q, block_m) @ means(k, block_n).T * scale).tolist()


def antidiagonal_scores(q, k, *, stride, block_m, block_n, scale, q_offset, causal):
    """Cell by cell and pair by pair; float64 [seqlen, dim] in, [tiles][blocks] out."""
    products = (q @ k.T * scale).tolist()
    cells_q, cells_k = math.ceil(len(q) / stride), math.ceil(len(k) / stride)
    out = [[0.0] * math.ceil(len(k) / block_n) for _ in range(math.ceil(len(q) / block_m))]
    for c in range(cells_q):
        last = min((c + 1) * stride, len(q)) - 1 + q_offset
        seen = [e for e in range(cells_k) if not causal or e * stride <= last]
        logits = []
        for e in seen:
            total = 0.0
            for r in range(stride):
                row, key = c * stride + r, e * stride + stride - 1 - r
                if row < len(q) and key < len(k):
                    total += products[row][key]
            logits.append(total / stride)
        for e, p in zip(seen, softmax(logits), strict=True):
            out[c * stride // block_m][e * stride // block_n] += p
    return out


def self_similarity(x, block):
    """Mean cosine over all pairs of rows of a block, a row with itself too."""
    result = []
    for i in range(0, len(x), block):
        rows = x[i : i + block]
        norms = rows.norm(dim=1)
        unit = torch.where(norms[:, None] > 0, rows / norms[:, None].clamp(min=1e-300), 0 * rows)
        result.append((unit @ unit.T).mean().item())
    return result


def window(q, k, rows, scale, q_offset, causal):
    """Probabilities of the last rows: [(position, [p of key 0, 1, ...])]."""
    result = []
    for i in range(len(q) - rows, len(q)):
        logits = (k @ q[i] * scale).tolist()
        seen = min(max(i + q_offset + 1, 0), len(k)) if causal else len(k)
        result.append((i + q_offset, softmax(logits[:seen]) + [0.0] * (len(k) - seen)))
    return result


def grid_mask(chosen, grid):
    mask = torch.zeros(grid.tiles, grid.blocks, dtype=torch.bool)
    for tile, blocks in enumerate(chosen):
        mask[tile, sorted(blocks)] = True
    return mask


def xattention(q, k, grid, share, **cells):
    """`cells`: stride, block_m, block_n, scale, q_offset, causal."""
    return top_p(antidiagonal_scores(q, k, **cells), grid, share, logits=False)


def sparge(q, k, grid, *, block_m, block_n, scale, similarity, top_p_share=None, density=None):
    scores = pooled_scores(q, k, block_m, block_n, scale)
    rows, keys = self_similarity(q, block_m), self_similarity(k, block_n)
    margin = min(abs(x - similarity) for x in rows + keys)
    always = {j for j, x in enumerate(keys) if x < similarity}
    open_scores = [[-math.inf if j in always else s for j, s in enumerate(row)] for row in scores]
    if density is None:
        chosen, close = top_p(open_scores, grid, top_p_share, logits=True)
    else:
        chosen, close = top_k(
            open_scores, grid, lambda t: math.ceil(density * len(grid.allowed(t)) - 1e-9)
        )
    close = math.inf if math.isnan(close) else close  # between two that are always kept
    for tile in range(grid.tiles):
        allowed = set(grid.allowed(tile))
        everything = rows[tile] < similarity
        chosen[tile] = allowed if everything else chosen[tile] | (always & allowed)
    return chosen, min(margin, close)


def _fewest(masses, share):
    """How many of the masses, best first, hold a share of their sum."""
    if share >= 1:
        return len(masses)
    total, covered, count = math.fsum(masses), 0.0, 0
    for mass in sorted(masses, reverse=True):
        if not covered < share * total:
            break
        covered, count = covered + mass, count + 1
    return count


def _best(sums, count):
    order = sorted(range(len(sums)), key=lambda j: (-sums[j], j))
    gap = sums[order[count - 1]] - sums[order[count]] if 0 < count < len(sums) else math.inf
    return set(order[:count]), gap


def flexprefill(q, k, grid, *, gamma, tau, low, high, block, scale, q_offset, causal):
    """low and high: bounds of the budgets in blocks, high may be None."""
    rows = window(q, k, min(block, len(q)), scale, q_offset, causal)
    columns = [math.fsum(p[j] for _, p in rows) for j in range(len(k))]
    diagonals = [0.0] * max(0, len(q) + q_offset)
    for position, p in rows:
        for j, mass in enumerate(p):
            if position >= j:
                diagonals[position - j] += mass
    sums = [
        [math.fsum(masses[i : i + block]) for i in range(0, len(masses), block)]
        for masses in (columns, diagonals)
    ]
    allowed = grid.allowed(grid.tiles - 1)
    logits = (means(k, block) @ q[-block:].mean(0) * scale).tolist()
    estimate = dict(zip(allowed, softmax([logits[j] for j in allowed]), strict=True))
    total = math.fsum(sums[0]) or 1.0
    divergence = 0.0
    for j in range(grid.blocks):
        a, b = estimate.get(j, 0.0), sums[0][j] / total
        divergence += sum(x * math.log(x / ((a + b) / 2)) / 2 for x in (a, b) if x > 0)
    distance = math.sqrt(max(divergence, 0.0))
    margin = abs(distance - tau) if tau > 0 else math.inf
    chosen = []
    for masses, blocks in zip((columns, diagonals), sums, strict=True):
        counts = {_fewest(masses, gamma * f) // block for f in (1 - 1e-5, 1, 1 + 1e-5)}
        count = max(low, _fewest(masses, gamma) // block + 1)
        count = min(count, max(low, len(blocks) if high is None else high))
        if distance < tau:
            count = low
        elif gamma < 1 and len(counts) > 1:
            margin = 0.0
        best, gap = _best(blocks, min(count, len(blocks)))
        chosen.append(best)
        margin = min(margin, gap)
    pairs = []
    for tile in range(grid.tiles):
        distances = {j: grid.diagonals[tile] - j for j in grid.allowed(tile)}
        kept = {j for j, d in distances.items() if j in chosen[0] or d in chosen[1]}
        pairs.append(kept | set(grid.forced(tile)))
    if distance < tau:
        scores = pooled_scores(q, k, block, block, scale)
        more, close = top_p(scores, grid, gamma, logits=True, whole=True)
        return [a | b for a, b in zip(pairs, more, strict=True)], min(margin, close)
    return pairs, margin


def quest(q, k, page, pages, allowed):
    """Pages that one row keeps: q [dim], k [seqlen, dim]; the last allowed one is its own."""
    bounds = []
    for i in range(0, len(k), page):
        low, high = k[i : i + page].amin(0), k[i : i + page].amax(0)
        bounds.append(torch.maximum(q * low, q * high).sum().item())
    order = sorted(range(allowed - 1), key=lambda j: (-bounds[j], j))
    return set(order[: max(pages - 1, 0)]) | ({allowed - 1} if allowed else set())
