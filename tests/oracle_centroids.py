# SPDX-License-Identifier: Apache-2.0
"""Centroid lookup as its paper writes it: float64, one head and one query at a time."""

import torch


def means(keys, labels, clusters):
    """(centroids, counts) of one head: keys float64 [n, d], labels [n]."""
    centroids = torch.zeros(clusters, keys.shape[1], dtype=torch.float64)
    counts = torch.zeros(clusters, dtype=torch.int64)
    for c in range(clusters):
        members = keys[labels == c]
        counts[c] = len(members)
        if len(members):
            centroids[c] = members.sum(0) / len(members)
    return centroids, counts


def shares(q, centroids, counts, allowed, scale):
    """S_k(q) of one query, over the allowed clusters that have keys; -1 for the others."""
    result = torch.full((len(counts),), -1.0, dtype=torch.float64)
    used = (counts > 0) & allowed
    if used.any():
        logits = scale * (centroids[used] @ q)
        weights = (logits - logits.max()).exp()
        result[used] = weights / (counts[used] * weights).sum()
    return result


def tile_scores(q, centroids, counts, allowed, scale, group):
    """q float64 [heads of the group, rows, d]: mean over rows, then mean or max over heads."""
    heads = [
        torch.stack([shares(row, centroids, counts, allowed, scale) for row in head]).mean(0)
        for head in q
    ]
    stacked = torch.stack(heads)
    return stacked.amax(0) if group == "max" else stacked.mean(0)


def keep_clusters(scores, counts, threshold, budget):
    """bool [clusters] of one tile."""
    keep = [float(s) >= 0 and (threshold <= 0 or float(s) > threshold) for s in scores]
    if budget is not None:
        order = sorted((c for c, kept in enumerate(keep) if kept), key=lambda c: (-scores[c], c))
        keep, spent = [False] * len(scores), 0
        for place, c in enumerate(order):
            spent += int(counts[c])
            if place and spent > budget:
                break
            keep[c] = True
    return torch.tensor(keep, dtype=torch.bool)


def row_mask(keep, labels, clustered, prefix, seqlen_k, position):
    """bool [seqlen_k] of one row behind the prefix, causal."""
    mask = torch.arange(seqlen_k) <= position
    mask[:prefix] = True
    mask[:clustered] = keep[labels.long()]
    return mask


def nearest(keys, centroids):
    """Label of every key of one head, ties towards the lower number."""
    labels = []
    for key in keys:
        products = (centroids @ key).tolist()
        labels.append(products.index(max(products)))
    return torch.tensor(labels, dtype=torch.int32)


def lloyd(keys, labels, clusters, iterations):
    """Spherical k-means of one head from given labels; None once a cluster runs empty."""
    unit = keys / keys.norm(dim=1, keepdim=True)
    for _ in range(iterations):
        directions, counts = means(unit, labels, clusters)
        if (counts == 0).any():
            return None
        directions /= directions.norm(dim=1, keepdim=True)
        labels = (unit @ directions.T).argmax(1)
    return labels


def mean_cosine(keys, labels, clusters):
    unit = keys / keys.norm(dim=1, keepdim=True)
    directions, _ = means(unit, labels, clusters)
    directions /= directions.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return float((unit * directions[labels.long()]).sum(1).mean())


def plus_plus(keys, clusters, generator):
    """k-means++ as published: one centroid at a time; returns labels."""
    unit = keys / keys.norm(dim=1, keepdim=True)
    chosen = [int(torch.randint(len(keys), (1,), generator=generator))]
    distance = 1 - unit @ unit[chosen[0]]
    for _ in range(clusters - 1):
        chosen.append(int(torch.multinomial(distance.clamp(min=0), 1, generator=generator)))
        distance = torch.minimum(distance, 1 - unit @ unit[chosen[-1]])
    return (unit @ unit[chosen].T).argmax(1)
